import asyncio

import pytest
from fake_openai import FAULTS, FakeServer, running

from tokenmill.errors import UsageError
from tokenmill.loadgen.records import LoadRequest
from tokenmill.loadgen.runner import run_load, warm_up
from tokenmill.loadgen.target import CHAT, COMPLETIONS, Target, TargetError, TargetOptions


def request(prompt="a b c", output_len=5):
    return LoadRequest(prompt=prompt, prompt_len=99, output_len=output_len)


def drive(server, timed, *, max_concurrency=None, **options):
    async def drive_it():
        with Target(TargetOptions(base_url=server.url, **options)) as target:
            await target.find_model()
            return await run_load(target, timed, max_concurrency=max_concurrency)

    return asyncio.run(drive_it())


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
def test_every_token_has_a_time(endpoint):
    with running(FakeServer(interval_s=0.02, delay_s=0.1, greets=True)) as server:
        run = drive(server, [(0, request())] * 3, endpoint=endpoint)
    for record in run.records:
        assert record.error is None
        assert record.text == "w0 w1 w2 w3 w4 "
        assert (record.prompt_len, record.output_len) == (3, 5)
        assert len(record.token_times_s) == 5
        assert record.ttft_s >= 0.1
        assert all(itl_s >= 0.01 for itl_s in record.itls_s)
        assert record.e2el_s == pytest.approx(record.ttft_s + sum(record.itls_s))
    assert run.duration_s >= 0.18


def test_without_usage_the_lengths_are_our_own_count():
    with running(FakeServer(names_usage=False)) as server:
        [record] = drive(server, [(0, request())]).records
    assert (record.prompt_len, record.output_len) == (99, 5)


def test_the_body_holds_what_was_asked_for():
    with running(FakeServer()) as server:
        drive(
            server,
            [(0, request([5, 6]))],
            ignore_eos=True,
            temperature=0.5,
            extra_body={"top_k": 3, "max_tokens": 2},
        )
    [body] = server.bodies
    assert body == {
        "model": "fake-model",
        "prompt": [5, 6],
        "max_tokens": 2,
        "temperature": 0.5,
        "ignore_eos": True,
        "top_k": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_no_more_at_a_time_than_allowed():
    with running(FakeServer(interval_s=0.002)) as server:
        drive(server, [(0, request())] * 20, max_concurrency=3)
        assert server.max_active == 3
        assert server.num_connections <= 4


def test_requests_are_sent_at_their_times():
    with running(FakeServer()) as server:
        run = drive(server, [(0.0, request()), (0.2, request()), (0.3, request())])
    for record, due_s in zip(run.records, (0.0, 0.2, 0.3), strict=True):
        assert record.started_s >= due_s


REASONS = {
    "busy": "HTTP 429: too many requests",
    "vanish": "closed the connection before its answer",
    "break": "closed the connection in the middle of its answer",
    "garbage": "no completion chunk",
    "silent": "no whole answer within 0.5 s",
    "endless": "without a finish reason",
    "page": 'no stream of completion chunks: {"hello": "world"}',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_counted_with_its_reason_and_harms_nobody(fault):
    with running(FakeServer()) as server:
        timed = [(0, request()), (0, request(f"{fault} x")), (0, request())]
        run = drive(server, timed, timeout_s=0.5)
    first, failed, last = run.records
    assert first.error is None
    assert last.error is None
    assert REASONS[fault] in failed.error


def test_the_warm_up_does_not_pass_over_failures():
    async def warm(url):
        with Target(TargetOptions(base_url=url, model="m")) as target:
            await warm_up(target, [request("busy")])

    with running(FakeServer()) as server, pytest.raises(TargetError, match="warm-up: HTTP 429"):
        asyncio.run(warm(server.url))


@pytest.mark.parametrize(
    ("server_options", "options", "fragment"),
    [
        ({}, {"model": "other"}, "no model 'other': it has fake-model"),
        ({"api_key": "k"}, {}, "refuses a request without --api-key"),
        ({"api_key": "k"}, {"api_key": "j"}, "refuses this --api-key"),
        ({"has_models": False}, {}, "name one with --model"),
    ],
)
def test_what_would_fail_every_request_is_said_before(server_options, options, fragment):
    with (
        running(FakeServer(**server_options)) as server,
        pytest.raises(TargetError, match=fragment),
    ):
        drive(server, [], **options)


def test_a_key_opens():
    with running(FakeServer(api_key="k")) as server:
        [record] = drive(server, [(0, request())], api_key="k").records
    assert record.error is None


def test_a_server_without_a_list_serves_the_model_that_is_named():
    with running(FakeServer(has_models=False)) as server:
        [record] = drive(server, [(0, request())], model="m").records
    assert record.error is None


def test_bad_options_are_refused():
    for options in ({"endpoint": "/v2"}, {"timeout_s": 0}, {"api_key": "a\nb"}):
        with pytest.raises(UsageError, match="--"):
            TargetOptions(**options)
