"""Keys, sizes, queues; clients that leave; health; and the end."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.unit.server.running import Running, events_of, running_server, wait_for

LONG = {"max_tokens": 400, "ignore_eos": True}


def test_keys_guard_every_route_but_the_probes_and_the_page() -> None:
    with running_server(api_keys=("first-key", "second-key")) as made:
        document = made.client.get("/openapi.json", headers=key("first-key")).json()
        probes = {"/live", "/ready", "/health"}
        for path in [*document["paths"], "/docs", "/openapi.json", "/nothing"]:
            basic = {"Authorization": "Basic first-key"}
            for given in ({}, key("wrong"), key("first-keys"), basic):
                method = "GET" if made.client.get(path).status_code != 405 else "POST"
                status = made.client.request(method, path, headers=given).status_code
                assert status == (200 if path in probes else 401), path
        assert made.client.get("/").status_code == 200
        for known in ("first-key", "second-key"):
            assert made.client.get("/v1/models", headers=key(known)).status_code == 200
        error = made.refuse(made.complete(), 401)
        assert error["code"] == "invalid_api_key"


def key(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_bodies_are_bounded_with_and_without_a_length() -> None:
    with running_server(max_body_bytes=1000) as made:
        assert made.complete("a" * 800, max_tokens=1).status_code == 400  # read, and too long
        made.refuse(made.complete("a" * 2000), 413)

        def chunks():
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"a" * 100
            yield b'"}'

        headers = {"Content-Type": "application/json"}
        for content in (chunks(), iter([b'{"prompt": "' + b"a" * 2000 + b'"}'])):
            made.refuse(made.client.post("/v1/completions", content=content, headers=headers), 413)
        assert made.complete(max_tokens=1).status_code == 200


def test_a_full_queue_says_when_to_come_back() -> None:
    with running_server(max_waiting=2, step_s=0.01) as made, ThreadPoolExecutor(12) as pool:
        made.model.gate.clear()
        asked = [pool.submit(made.complete, "a", max_tokens=2) for _ in range(12)]
        wait_for(lambda: sum(f.done() for f in asked) >= 4)
        made.model.gate.set()
        answers = [future.result() for future in asked]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert any(answer.status_code == 200 for answer in answers)
        for answer in refused:
            assert made.refuse(answer, 429)["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        made.wait_until_idle()


def connect(made: Running, body: bytes = b"", length: int | None = None) -> socket.socket:
    """A connection over which a request has begun, with so much of its body."""
    num_bytes = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {num_bytes}\r\n"
    connection = socket.create_connection(("127.0.0.1", made.client.base_url.port), timeout=20)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def hang_up(made: Running, ask, num_tokens: int = 0) -> None:
    """Ask, and leave before the answer is complete, once the engine has made so many tokens."""
    stats = made.service.llm.engine.stats
    with connect(made, json.dumps(ask).encode()):
        wait_for(lambda: stats().num_running == ask["n"])
        wait_for(lambda: stats().generation_tokens >= num_tokens)


def test_half_a_request_is_not_waited_for() -> None:
    with running_server(body_timeout_s=0.2, head_timeout_s=0.2) as made:
        with connect(made, b'{"prompt"', 100) as connection:
            answer = read_all(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert b'"code": "body_too_slow"' in answer
        for start in (b"", b"GET / HTTP/1.1\r\nHost", b"\r\n"):
            with socket.create_connection(("127.0.0.1", made.client.base_url.port), 20) as silent:
                silent.sendall(start)
                assert silent.recv(100) == b""
        assert made.complete(max_tokens=1).status_code == 200


def test_a_large_body_that_stops_is_answered() -> None:
    limits = {"max_body_bytes": 1000, "body_timeout_s": 0.2}
    with running_server(**limits) as made, connect(made, b"a" * 10, 2000) as connection:
        assert b" 413 " in read_all(connection).splitlines()[0]


def test_connections_are_counted() -> None:
    with running_server(max_connections=2) as made:
        assert made.client.get("/live").status_code == 200
        with connect(made, b"{", 9), connect(made) as third:
            answer = read_all(third)
        assert b" 503 " in answer.splitlines()[0]
        assert b"too_many_connections" in answer
        wait_for(lambda: len(made.server.server_state.connections) == 1)
        assert made.client.get("/live").status_code == 200


def test_a_client_that_reads_nothing_is_left() -> None:
    with running_server(write_timeout_s=0.2) as made:
        stats = made.service.llm.engine.stats
        ask = {"prompt": "hello", **LONG, "stream": True, "n": 100, "logprobs": 20}
        with connect(made, json.dumps(ask).encode()) as connection:
            wait_for(lambda: stats().num_running > 0)
            wait_for(lambda: not made.server.server_state.connections)
            assert b"[DONE]" not in read_all(connection)
        made.wait_until_idle()


def test_draining_does_not_wait_for_half_a_request(caplog) -> None:
    with running_server() as made:
        with connect(made, b'{"prompt"', 100) as connection:
            wait_for(lambda: len(made.server.server_state.tasks) == 1)
            made.tell()
            answer = read_all(connection)
            assert b" 503 " in answer.splitlines()[0]
            assert b'"code": "draining"' in answer
        wait_for(lambda: made.server.should_exit)
        assert made.server.is_drained
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


def test_draining_leaves_whom_it_cannot_tell(caplog) -> None:
    with running_server(drain_timeout_s=0.8, step_s=0.001) as made:
        ask = {"prompt": "hello", **LONG, "stream": True, "n": 100, "logprobs": 20}
        with connect(made, json.dumps(ask).encode()):
            wait_for(lambda: any(c.flow.write_paused for c in made.server.server_state.connections))
            made.tell()
            wait_for(lambda: made.server.should_exit)
            assert not made.server.is_drained
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_leaves_frees_its_blocks(is_streaming) -> None:
    with running_server(step_s=0.01) as made:
        ask = {"prompt": "hello", **LONG, "stream": is_streaming, "n": 2}
        engine, noticed_at = made.service.llm.engine, []
        abort = engine.abort

        def noting_abort(requests):  # runs when the server has noticed
            noticed_at.append(engine.stats().num_steps)
            abort(requests)

        engine.abort = noting_abort
        hang_up(made, ask)
        made.wait_until_idle()
        # One step is under way, and the next is planned already.
        assert engine.stats().num_steps <= noticed_at[0] + 3
        assert 'finished_reason="abort",model_name="fake"} 2.0' in made.client.get("/metrics").text


def test_what_can_never_be_queued_is_refused_for_good() -> None:
    with running_server(max_waiting=2) as made:  # and 4 run
        assert made.refuse(made.complete(n=7, max_tokens=1))["param"] == "n"
        assert made.refuse(made.chat(n=7, max_tokens=1))["param"] == "n"
        assert made.refuse(made.complete(["a"] * 4, n=2, max_tokens=1))["param"] == "prompt"
        assert made.complete(["a"] * 3, n=2, max_tokens=1).status_code == 200


def test_who_comes_after_the_engine_closed_is_told_to_go_elsewhere() -> None:
    with running_server() as made:
        made.service.llm.close()
        answer = made.complete()
        assert made.refuse(answer, 503)["code"] == "draining"
        assert answer.headers["retry-after"]


def test_a_long_text_keeps_nobody_waiting(monkeypatch) -> None:
    with running_server() as made, ThreadPoolExecutor(2) as pool:
        loaded = made.service.llm.loaded
        render, threads, gate = loaded.chat_template.render, set(), threading.Event()

        def slow_render(messages, **others):
            if len(messages[0]["content"]) > 5000:
                threads.add(threading.current_thread())
                gate.wait(20)
            return render(messages, **others)

        monkeypatch.setattr(loaded.chat_template, "render", slow_render)
        long = [pool.submit(made.chat, text * 6000) for text in "ab"]
        wait_for(lambda: threads)
        assert made.chat(max_tokens=1).status_code == 200
        gate.set()
        assert [future.result().status_code for future in long] == [400, 400]
        assert len(threads) == 1


def test_what_cannot_fit_is_not_even_encoded(monkeypatch) -> None:
    with running_server() as made:
        tokenizer = made.service.llm.loaded.tokenizer
        monkeypatch.setattr(tokenizer, "encode", None)
        text = "a" * (tokenizer.max_chars(made.service.llm.max_model_len) + 1)
        for answer in (made.complete(text), made.complete(["b", text]), made.chat(text)):
            assert "characters" in made.refuse(answer)["message"]


def test_a_dead_engine_fails_health_and_every_request() -> None:
    with running_server(fail_at_step=3) as made:
        assert made.client.get("/health").status_code == 200
        made.refuse(made.complete(**LONG), 503)
        for path in ("/health", "/ready"):
            assert made.refuse(made.client.get(path), 503)["code"] == "engine_dead"
        made.refuse(made.complete(), 503)
        assert made.client.get("/live").status_code == 200
        assert 'finished_reason="error",model_name="fake"} 1.0' in made.client.get("/metrics").text


def test_a_stream_that_breaks_says_so() -> None:
    with running_server(fail_at_step=5) as made:
        lines = made.complete(**LONG, stream=True).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"


def test_an_engine_that_stands_still_fails_health_only_while_work_waits() -> None:
    with running_server(stall_timeout_s=0.3) as made, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: made.service.llm.engine.heartbeat().idle_s > 0.4)
        assert made.client.get("/health").status_code == 200
        made.model.gate.clear()
        asked = pool.submit(made.complete, max_tokens=2)
        wait_for(lambda: made.client.get("/health").status_code == 503)
        assert made.refuse(made.client.get("/ready"), 503)["code"] == "engine_stuck"
        made.model.gate.set()
        assert asked.result().status_code == 200
        wait_for(lambda: not made.service.llm.engine.heartbeat().has_work)
        assert made.client.get("/health").status_code == 200


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    with running_server(step_s=0.01) as made, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(made.complete, **{**LONG, "max_tokens": 60}, stream=True)
        wait_for(lambda: made.service.llm.engine.stats().num_running > 0)
        made.tell()
        wait_for(lambda: made.client.get("/ready").status_code == 503)
        refused = made.complete()
        assert made.refuse(refused, 503)["code"] == "draining"
        assert refused.headers["retry-after"]
        assert made.client.get("/live").status_code == 200
        events = events_of(asked.result())
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        wait_for(lambda: made.server.should_exit)
        assert made.server.is_drained


def test_draining_ends_in_time_and_tells_whom_it_cuts_off() -> None:
    with running_server(drain_timeout_s=0.3) as made, ThreadPoolExecutor(2) as pool:
        made.model.gate.clear()  # they cannot end before they are seen to run
        whole = pool.submit(made.complete, **LONG)
        stream = pool.submit(made.complete, **LONG, stream=True)
        wait_for(lambda: made.service.bridge.num_live == 2)
        made.tell()
        wait_for(made.service.life.ended.is_set)
        made.model.gate.set()
        assert made.refuse(whole.result(), 503)["code"] == "draining"
        last = stream.result().text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        wait_for(lambda: made.server.should_exit)
        assert not made.server.is_drained


def test_a_live_view_does_not_keep_the_server_up() -> None:
    with running_server() as made:
        seen = threading.Event()

        def watch():
            with httpx.stream("GET", f"{made.url}/engine/events", timeout=20) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        assert (
                            json.loads(line[6:]).keys()
                            == made.client.get("/engine/stats").json().keys()
                        )
                        seen.set()

        thread = threading.Thread(target=watch)
        thread.start()
        assert seen.wait(10)
        made.tell()
        thread.join(10)
        assert not thread.is_alive()
        assert made.server.is_drained


def test_origins_are_refused_unless_allowed(shared: Running) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in shared.client.get("/live", headers=asked).headers
    with running_server(allowed_origins=("https://a.example",), api_keys=("k",)) as made:
        allowed = made.client.options("/v1/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = made.client.options(
            "/v1/completions", headers={**asked, "Origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in other.headers


def test_the_log_tells_of_a_request_but_not_what_was_said(shared: Running, caplog) -> None:
    with caplog.at_level("INFO", "tokenmill.access"):
        headers = {"X-Request-Id": "r-1"}
        ask = {"prompt": "secretprompt", "max_tokens": 3, "ignore_eos": True}
        answer = shared.client.post("/v1/completions", json=ask, headers=headers).json()
        shared.client.post("/v1/completions", json={"prompt": "a", "stop": "secret" * 500})
        wait_for(lambda: len(caplog.records) >= 2)
    line = json.loads(caplog.records[0].getMessage())
    assert line["request_id"] == "r-1"
    assert (line["status"], line["path"]) == (200, "/v1/completions")
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert line["output_tokens"] == 3
    assert "secret" not in caplog.text


def test_the_log_has_the_id_of_the_answer_and_what_was_used(caplog) -> None:
    with running_server(step_s=0.002) as made, caplog.at_level("INFO", "tokenmill.access"):
        answer = made.complete(max_tokens=1, request_id="zz")
        assert answer.json()["id"] == "cmpl-zz"
        assert answer.headers["x-request-id"] == "zz"
        for fields in ({"request_id": "gone"}, {"request_id": "left", "stream": True}):
            num_tokens = made.service.llm.engine.stats().generation_tokens
            hang_up(made, {"prompt": "hello", **LONG, "n": 2, **fields}, num_tokens + 6)
            made.wait_until_idle()
        wait_for(lambda: len(caplog.records) >= 3)
    first, *left = [json.loads(record.getMessage()) for record in caplog.records]
    assert first["request_id"] == "zz"
    assert {line["request_id"] for line in left} == {"gone", "left"}
    for line in left:
        assert (line["status"], line["finish_reason"]) == (499, "abort")
        assert line["prompt_tokens"] == len(made.service.llm.loaded.tokenizer.encode("hello"))
        # Those of the last step may be on their way yet.
        assert 4 <= line["output_tokens"] < 2 * LONG["max_tokens"]


def test_the_first_token_of_a_stream_is_counted_when_it_comes() -> None:
    with running_server() as made, ThreadPoolExecutor(1) as pool:
        name = 'tokenmill:time_to_first_token_seconds_count{model_name="fake"}'
        made.model.gate.clear()
        asked = pool.submit(made.complete, stream=True, max_tokens=50, ignore_eos=True)
        wait_for(lambda: made.service.bridge.num_live == 1)
        assert f"{name} 0.0" in made.client.get("/metrics").text
        made.model.step_s = 0.1
        made.model.gate.set()
        wait_for(lambda: f"{name} 1.0" in made.client.get("/metrics").text)
        assert made.service.bridge.num_live == 1
        made.model.step_s = 0
        assert asked.result().status_code == 200
        assert f"{name} 1.0" in made.client.get("/metrics").text


def test_metrics_have_the_names_of_vllm(shared: Running) -> None:
    shared.complete(max_tokens=4, ignore_eos=True, stream=True)
    shared.complete(max_tokens=4, ignore_eos=True)
    text = shared.client.get("/metrics").text
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("e2e_request_latency_seconds_sum", "request_queue_time_seconds_count"),
        *("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"),
        *("iteration_tokens_total_bucket", "spec_decode_num_draft_tokens_total"),
        *("spec_decode_num_accepted_tokens_total", "iteration_tokens_total_count"),
        *("request_prompt_tokens_sum", "request_generation_tokens_sum", "request_params_n_count"),
        *("request_params_max_tokens_sum", "request_time_per_output_token_seconds_count"),
        *("request_inference_time_seconds_sum", "num_evictions_total", "cache_config_info"),
    ):
        assert f"\ntokenmill:{name}{{" in text, name
    assert "_created" not in text
    assert "\nprocess_resident_memory_bytes " in text
    [count] = [line for line in text.splitlines() if "inter_token_latency_seconds_count" in line]
    assert float(count.split()[-1]) >= 6


def test_the_page_may_load_nothing_from_outside(shared: Running) -> None:
    page = shared.client.get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert shared.client.get("/app.js").headers["content-type"].startswith("text/javascript")
    assert "http" not in shared.client.get("/docs").text.replace("httpx", "")
