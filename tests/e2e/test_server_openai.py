"""The official client, with strict validation of responses, over every endpoint and field."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

import tokenmill
from tests.e2e.command import ANSWER, QUESTION
from tests.e2e.server_process import ServerProcess, serving, strict_client

MODEL = "small"
HELLO = [{"role": "user", "content": QUESTION}]
GREEDY = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def server(smollm2: Path, warm_home: Path) -> Iterator[ServerProcess]:
    flags = ("--served-model-name", MODEL, "--max-model-len", "2048", "--api-key", "sesame")
    with serving(smollm2, warm_home, *flags) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with strict_client(server.url, "sesame") as made:
        yield made


@pytest.fixture(scope="module")
def lenient(client: OpenAI) -> OpenAI:
    """For what OpenAI's servers send and its client's types leave out: null for the finish reason
    of a completion's chunk, and for the log probability of the first token of all."""
    return OpenAI(base_url=client.base_url, api_key="sesame", max_retries=0, timeout=60)


def chat(client: OpenAI, **fields):
    return client.chat.completions.create(**{"messages": HELLO, **GREEDY, **fields})


def complete(client: OpenAI, **fields):
    ask = {"prompt": "The capital of France is", "max_tokens": 8, **GREEDY, **fields}
    return client.completions.create(**ask)


def test_it_says_what_fits_and_how_to_try_it(server: ServerProcess) -> None:
    while not any(f"curl {server.url}/v1/chat/completions" in line for line in server.lines):
        time.sleep(0.01)
    text = "\n".join(server.lines)
    assert "room for" in text
    assert "sequences of 2,048 tokens" in text


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    again = chat(client)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16
    assert again.choices[0].message.content == ANSWER


def test_chat_stream(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    said = [choice for chunk in chunks for choice in chunk.choices]
    assert said[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in said) == ANSWER
    assert [choice.finish_reason for choice in said][-1] == "stop"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 8


def test_chat_stream_helper(client: OpenAI) -> None:
    """The client's own accumulation of a stream."""
    with client.chat.completions.stream(messages=HELLO, **GREEDY) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER


def test_chat_logprobs(client: OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3, max_completion_tokens=4)
    content = whole.choices[0].logprobs.content
    assert len(content) == 4
    assert ANSWER.startswith("".join(entry.token for entry in content))
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob
    chunks = chat(client, logprobs=True, top_logprobs=3, max_tokens=4, stream=True)
    streamed = [e for c in chunks for o in c.choices if o.logprobs for e in o.logprobs.content]
    assert streamed == content


def test_seeds_and_n(client: OpenAI) -> None:
    ask = {"temperature": 1.2, "seed": 11, "n": 3, "max_tokens": 12}
    first, second = (
        [choice.message.content for choice in chat(client, **ask).choices] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3
    assert [c.message.content for c in chat(client, **{**ask, "seed": 12}).choices] != first


def test_sampling_fields(client: OpenAI) -> None:
    extra = {
        **{"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3},
        **{"ignore_eos": True, "skip_special_tokens": False, "priority": -1},
        **{"bad_words": ["Paris"], "cache_salt": "mine", "request_id": "r1"},
        **{"include_stop_str_in_output": True, "stop_token_ids": [5]},
    }
    answer = chat(
        client,
        **{"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        **{"max_tokens": 10, "stop": ["\n\n"], "logit_bias": {"10": -100}, "user": "me"},
        metadata={"purpose": "test"},
        response_format={"type": "text"},
        extra_body=extra,
    )
    assert answer.id == "chatcmpl-r1"
    assert "Paris" not in answer.choices[0].message.content


def test_bias_and_allowed_tokens(client: OpenAI) -> None:
    answer = complete(client, logit_bias={"260": 100}, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [260] * 8
    extra = {"allowed_token_ids": [260, 261], "return_token_ids": True}
    assert set(complete(client, extra_body=extra).choices[0].token_ids) <= {260, 261}


def test_completions(client: OpenAI, lenient: OpenAI) -> None:
    whole = complete(client)
    assert whole.choices[0].text.startswith(" Paris")
    assert whole.choices[0].finish_reason == "length"
    chunks = list(complete(lenient, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 8
    stopped = complete(client, stop=["."])
    assert stopped.choices[0].text == " Paris"
    assert stopped.choices[0].stop_reason == "."


def test_several_prompts(client: OpenAI) -> None:
    prompts = ["The capital of France is", "The capital of Italy is"]
    both = complete(client, prompt=prompts)
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in both.choices] == alone


def test_completion_logprobs(client: OpenAI) -> None:
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert {len(values) for _, values in logprobs} == {8}
    assert logprobs.tokens[0] == " Paris"


def test_echo_and_scoring(lenient: OpenAI) -> None:
    ask = {"echo": True, "logprobs": 2}
    whole = complete(lenient, **ask).choices[0]
    assert whole.text.startswith("The capital of France is Paris")
    scored = complete(lenient, **ask, max_tokens=0).choices[0]
    assert scored.text == "The capital of France is"
    num_prompt = len(scored.logprobs.tokens)
    assert whole.logprobs.tokens[:num_prompt] == scored.logprobs.tokens
    assert whole.logprobs.token_logprobs[1:num_prompt] == pytest.approx(
        scored.logprobs.token_logprobs[1:], abs=1e-5
    )
    assert scored.logprobs.text_offset[:3] == [0, 3, 11]


def test_token_ids_as_a_prompt(client: OpenAI, server: ServerProcess) -> None:
    headers = {"Authorization": "Bearer sesame"}
    ask = {"prompt": "The capital of France is"}
    tokens = httpx.post(f"{server.url}/tokenize", json=ask, headers=headers).json()["tokens"]
    assert complete(client, prompt=tokens).choices[0].text == complete(client).choices[0].text
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}, headers=headers)
    assert back.json() == {"prompt": "The capital of France is"}


def test_a_message_is_continued(client: OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    answer = chat(client, messages=messages, extra_body=extra, max_tokens=4)
    assert answer.choices[0].message.content.startswith(" Paris")


def test_errors(client: OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="2048"):
        complete(client, prompt="word " * 3000)
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-5")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        chat(stranger)


def test_conversations_share_their_beginning_and_keep_their_words(client: OpenAI) -> None:
    """The same tokens, whatever the company."""
    from concurrent.futures import ThreadPoolExecutor

    system = {"role": "system", "content": "You answer in one short sentence. " * 8}
    topics = ("rain", "iron", "Rome", "bees", "salt", "jazz", "tea", "glass")

    def ask(topic: str) -> str:
        messages = [system, {"role": "user", "content": f"What is {topic}?"}]
        return chat(client, messages=messages, max_tokens=24).choices[0].message.content

    alone = [ask(topic) for topic in topics]
    with ThreadPoolExecutor(len(topics)) as pool:
        assert list(pool.map(ask, topics)) == alone


def test_prompt_logprobs(client: OpenAI) -> None:
    extra = {"prompt_logprobs": 2}
    choice = complete(client, extra_body=extra).choices[0]
    first, *rest = choice.prompt_logprobs
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} == set(v) for e in rest for v in e.values())
    assert chat(client, extra_body=extra).prompt_logprobs[0] is None


def test_a_prompt_is_truncated_from_the_left(client: OpenAI) -> None:
    extra = {"truncate_prompt_tokens": 3, "return_token_ids": True}
    whole = complete(client, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    assert complete(client, extra_body=extra).choices[0].prompt_token_ids == whole[-3:]
    assert complete(client, extra_body=extra).usage.prompt_tokens == 3


def test_the_template_gets_more_and_special_tokens_may_be_added(client: OpenAI) -> None:
    plain = chat(client, max_tokens=1, extra_body={"return_token_ids": True})
    extra = {
        **{"chat_template_kwargs": {"flag": True}, "add_special_tokens": True},
        "return_token_ids": True,
    }
    assert chat(client, max_tokens=1, extra_body=extra).prompt_token_ids == plain.prompt_token_ids
    extra = {"add_special_tokens": False}
    assert complete(client, extra_body=extra).choices[0].text == complete(client).choices[0].text
    with pytest.raises(openai.BadRequestError, match=r"chat_template_kwargs\.messages"):
        chat(client, extra_body={"chat_template_kwargs": {"messages": []}})


def test_echo_of_a_continued_message(client: OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    ask = {"messages": messages, "extra_body": extra, "max_tokens": 4}
    text = chat(client, **ask).choices[0].message.content
    assert text.startswith("The capital of France is Paris")
    said = [c.delta.content or "" for e in chat(client, **ask, stream=True) for c in e.choices]
    assert "".join(said) == text


def test_usage_while_it_streams(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, max_tokens=6, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_token_ids_of_a_stream(client: OpenAI, lenient: OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = chat(client, max_tokens=6, extra_body=extra)
    chunks = list(chat(client, max_tokens=6, stream=True, extra_body=extra))
    said = [choice for chunk in chunks for choice in chunk.choices]
    ids = [i for choice in said for i in getattr(choice, "token_ids", [])]
    assert ids == whole.choices[0].token_ids
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    chunks = list(complete(lenient, stream=True, extra_body=extra))
    ids = [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]
    assert ids == complete(client, extra_body=extra).choices[0].token_ids


def test_several_samples_stream_side_by_side(client: OpenAI, lenient: OpenAI) -> None:
    ask = {"temperature": 1.1, "seed": 4, "n": 3, "max_tokens": 8}
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(client, **ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [c.message.content for c in chat(client, **ask).choices]
    texts = {0: "", 1: "", 2: ""}
    for chunk in complete(lenient, **ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [c.text for c in complete(client, **ask).choices]


def test_the_other_routes(client: OpenAI, server: ServerProcess) -> None:
    for path in ("/health", "/live", "/ready"):  # without a key
        assert httpx.get(server.url + path).json() == {"status": "ok"}
    headers = {"Authorization": "Bearer sesame"}
    version = httpx.get(f"{server.url}/version", headers=headers).json()
    assert version == {"version": tokenmill.__version__}
    for path, kind in (("/docs", "text/html"), ("/openapi.json", "application/json")):
        assert httpx.get(server.url + path).status_code == 401
        answer = httpx.get(server.url + path, headers=headers)
        assert answer.headers["content-type"].startswith(kind)
        assert "/v1/chat/completions" in answer.text
    metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
    assert f'tokenmill:generation_tokens_total{{model_name="{MODEL}"}}' in metrics


def test_metrics_and_the_log_after_all_that(client: OpenAI, server: ServerProcess) -> None:
    headers = {"Authorization": "Bearer sesame"}
    stats = httpx.get(f"{server.url}/engine/stats", headers=headers).json()
    assert stats["num_used_blocks"] == 0
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert len(lines) > 20
    assert not any("capital" in line for line in server.lines if line.startswith("{"))


def test_sigterm_ends_it(server: ServerProcess) -> None:
    """Last in the file."""
    assert server.terminate() == 0
    assert server.lines[-1] == "stopped"
