"""Embeddings, reranking and scores over HTTP, by a fake model whose states are hashes."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.unit.server.running import TOKENIZER, Running, running_server, wait_for


def embed(shared: Running, **fields):
    return shared.post("/v1/embeddings", **fields)


def test_floats_and_base64_are_the_same(shared: Running) -> None:
    plain = embed(shared, input="hello", model="alias", user="me").json()
    assert (plain["object"], plain["model"]) == ("list", "alias")
    [item] = plain["data"]
    assert (item["object"], item["index"]) == ("embedding", 0)
    assert np.isclose(np.linalg.norm(item["embedding"]), 1)
    [coded] = embed(shared, input="hello", encoding_format="base64").json()["data"]
    floats = np.frombuffer(base64.b64decode(coded["embedding"]), "<f4")
    assert floats.tolist() == item["embedding"]


def test_texts_and_ids_keep_their_order(shared: Running) -> None:
    ids = [TOKENIZER.encode(text) for text in ("hello", "world", "es")]
    texts = embed(shared, input=["hello", "world", "es"]).json()
    lists = embed(shared, input=ids).json()
    assert texts["data"] == lists["data"]
    assert [item["index"] for item in texts["data"]] == [0, 1, 2]
    assert texts["usage"]["prompt_tokens"] == texts["usage"]["total_tokens"] == sum(map(len, ids))
    assert (
        embed(shared, input=ids[1]).json()["data"][0]["embedding"]
        == (texts["data"][1]["embedding"])
    )


def test_normalize_and_truncation(shared: Running) -> None:
    long = embed(shared, input=list(range(1, 40)), truncate_prompt_tokens=5, normalize=False)
    short = embed(shared, input=[1, 2, 3, 4, 5], normalize=False).json()
    assert long.json()["data"] == short["data"]
    assert long.json()["usage"]["prompt_tokens"] == 5
    assert np.linalg.norm(short["data"][0]["embedding"]) > 2


def test_the_id_of_a_call(shared: Running) -> None:
    assert embed(shared, input="a", request_id="r1").json()["id"] == "embd-r1"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": 5}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": ["a", "b" * 600]}, "input"),
        ({"input": [1] * 600}, "input"),
        ({"dimensions": 3}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
        ({"endianness": "big"}, "endianness"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_embeddings_refuse(shared: Running, fields, param) -> None:
    error = shared.refuse(embed(shared, **{"input": "hello", **fields}))
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]


def test_an_unknown_model(shared: Running) -> None:
    error = shared.refuse(embed(shared, input="a", model="other"), 404)
    assert error["code"] == "model_not_found"


def test_a_call_may_have_more_texts_than_may_wait() -> None:
    texts = [str(number) for number in range(2048)]
    with running_server(max_waiting=3) as running:
        made = embed(running, input=texts).json()
        assert [item["index"] for item in made["data"]] == list(range(2048))
        vectors = [item["embedding"] for item in made["data"]]
        assert vectors[77:79] == [
            item["embedding"] for item in embed(running, input=texts[77:79]).json()["data"]
        ]
        assert made["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(t)) for t in texts)
        scores = running.post("/score", text_1=texts, text_2=texts[::-1]).json()
        assert len(scores["data"]) == 2048
        error = running.refuse(embed(running, input=[*texts, "one more"]))
        assert error["param"] == "input"
        running.wait_until_idle()


def test_a_long_call_leaves_room_and_a_full_queue_refuses_it() -> None:
    with running_server(max_waiting=8) as running, ThreadPoolExecutor(2) as pool:
        running.model.gate.clear()
        long = pool.submit(embed, running, input=["a"] * 1000)
        wait_for(lambda: running.service.bridge.num_live == 1000)
        short = pool.submit(embed, running, input=["a"] * 4)
        wait_for(lambda: running.service.bridge.num_live == 1004)
        error = running.refuse(embed(running, input="a"), 429)
        assert error["code"] == "queue_full"
        running.model.gate.set()
        assert short.result().status_code == 200
        assert len(long.result().json()["data"]) == 1000
        running.wait_until_idle()


def test_scores_are_cosines(shared: Running) -> None:
    vectors = [item["embedding"] for item in embed(shared, input=["a", "b", "c"]).json()["data"]]
    one = shared.post("/v1/score", text_1="a", text_2=["a", "b", "c"]).json()
    assert np.allclose([d["score"] for d in one["data"]], [np.dot(vectors[0], v) for v in vectors])
    assert one["data"][0]["score"] == pytest.approx(1)
    turns = shared.post("/score", text_1=["b", "c"], text_2=["c", "c"]).json()
    assert turns["data"][0]["score"] == pytest.approx(np.dot(vectors[1], vectors[2]))
    assert turns["data"][1] == {"object": "score", "index": 1, "score": pytest.approx(1)}


def test_documents_come_best_first(shared: Running) -> None:
    documents = ["b", {"text": "a"}, "c", "a"]
    ranked = shared.post("/v1/rerank", query="a", documents=documents).json()
    order = [result["index"] for result in ranked["results"]]
    assert order[:2] == [1, 3]
    assert sorted(order) == [0, 1, 2, 3]
    scores = [result["relevance_score"] for result in ranked["results"]]
    assert scores == sorted(scores, reverse=True)
    assert ranked["results"][0]["document"] == {"text": "a"}
    for path in ("/rerank", "/v2/rerank"):
        short = shared.post(
            path, query="a", documents=documents, top_n=2, return_documents=False
        ).json()
        assert short["results"] == [
            {"index": index, "relevance_score": score}
            for index, score in zip(order[:2], scores[:2], strict=True)
        ]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["a", "b" * 600]}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "softmax": True}, "softmax"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "b" * 600, "documents": ["b"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "b"}]}, "image"),
    ],
)
def test_what_scoring_refuses(shared: Running, path, fields, param) -> None:
    assert shared.refuse(shared.post(path, **fields))["param"] == param


def test_a_client_that_leaves_frees_its_blocks() -> None:
    with running_server() as running:
        running.model.gate.clear()
        body = json.dumps({"input": ["hello"] * 8}).encode()
        import socket

        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = (
                f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            wait_for(lambda: running.service.bridge.num_live == 8)
        running.model.gate.set()
        running.wait_until_idle()


def test_meters_count_no_generation(shared: Running) -> None:
    def value(name: str) -> float:
        lines = shared.client.get("/metrics").text.splitlines()
        [line] = [line for line in lines if line.startswith(f"tokenmill:{name}{{")]
        return float(line.split()[-1])

    names = ("e2e_request_latency_seconds_count", "time_to_first_token_seconds_count")
    before = [value(name) for name in (*names, "generation_tokens_total")]
    embed(shared, input=["a", "b"])
    after = [value(name) for name in (*names, "generation_tokens_total")]
    assert after == [before[0] + 2, *before[1:]]


def test_text_and_embeddings_from_one_server(shared: Running) -> None:
    text = shared.complete("hello", max_tokens=8, temperature=0).json()["choices"][0]["text"]
    vector = embed(shared, input="hello").json()["data"]
    assert (
        shared.complete("hello", max_tokens=8, temperature=0).json()["choices"][0]["text"] == text
    )
    assert embed(shared, input="hello").json()["data"] == vector
