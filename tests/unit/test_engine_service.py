"""What a server asks of the engine: many requests, sinks, samples, limits, numbers, and an end."""

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from fake_model import FakeModel, make_limits
from test_engine import Letters, SlowModel, make_llm

from tokenmill import LLM, SamplingParams
from tokenmill.cli.serve import capacity
from tokenmill.engine.engine import DrainingError, QueueFullError
from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.request import Delivery, Request
from tokenmill.engine.stats import BlockMap
from tokenmill.errors import CapacityError, UsageError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ENDLESS = SamplingParams(max_tokens=None)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


@pytest.fixture
def slow() -> Iterator[tuple[LLM, SlowModel]]:
    """An LLM whose steps wait until the gate is opened."""
    model = SlowModel(make_limits(blocks=24, rows=8))
    with make_llm(model) as made:
        yield made, model
        model.gate.set()


class Mailbox:
    """A sink that a test can wait for."""

    def __init__(self) -> None:
        self.batches: list[list[Delivery]] = []
        self._queue: SimpleQueue[list[Delivery]] = SimpleQueue()

    def put(self, batch: list[Delivery]) -> None:
        self._queue.put(batch)

    def until_finished(self, count: int) -> dict[Request, list[OutputDelta]]:
        """The deltas of each request, once `count` of them have ended."""
        deltas: dict[Request, list[OutputDelta]] = {}
        while count:
            self.batches.append(self._queue.get(timeout=20))
            for request, event in self.batches[-1]:
                assert isinstance(event, OutputDelta), event
                deltas.setdefault(request, []).append(event)
                count -= event.output is not None
        return deltas


def last(deltas: list[OutputDelta]) -> RequestOutput:
    output = deltas[-1].output
    assert output is not None
    return output


def test_one_sink_gets_what_is_new_for_all_once_a_step(llm: LLM) -> None:
    box = Mailbox()
    requests = [
        llm.make_request("ab" * n, GREEDY, sink=box.put, is_streaming=True) for n in (1, 2, 3)
    ]
    llm.engine.submit(requests)
    deltas = box.until_finished(3)
    assert len(box.batches) == 12
    for request in requests:
        assert "".join(delta.text for delta in deltas[request]) == last(deltas[request]).text


def test_requests_have_names(llm: LLM) -> None:
    box = Mailbox()
    request = llm.make_request("a", GREEDY, sink=box.put, request_id="mine")
    others = [llm.make_request("a", GREEDY, sink=box.put) for _ in range(2)]
    llm.engine.submit([request])
    assert last(box.until_finished(1)[request]).request_id == "mine"
    assert len({request.request_id, *(other.request_id for other in others)}) == 3


def test_several_samples_are_drawn_from_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=6)
    (output,) = llm.generate("hello", params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    assert (output.num_prompt_tokens, output.num_output_tokens) == (5, 18)
    (alone,) = llm.generate("hello", SamplingParams(seed=5, max_tokens=6))
    assert alone.token_ids == output.outputs[0].token_ids == output.token_ids
    (again,) = llm.generate("hello", params)
    assert again.outputs == output.outputs


def test_samples_stream_side_by_side_and_end_one_by_one(llm: LLM) -> None:
    deltas = list(llm.stream("hello", SamplingParams(n=2, seed=5, max_tokens=4)))
    output = last(deltas)
    for sample in output.outputs:
        mine = [delta for delta in deltas if delta.index == sample.index]
        assert [t for delta in mine for t in delta.token_ids] == sample.token_ids
        assert [delta.finish_reason for delta in mine] == [None] * 3 + ["length"]
    assert [delta.output for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_samples_that_end_together_are_all_there(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=4)
    deltas = list(llm.stream("hello", params))
    assert [delta.output is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    (whole,) = llm.generate("hello", params)
    for sample in whole.outputs:
        assert sample.text == Letters().text(sample.token_ids)
        assert sample.text == "".join(d.text for d in deltas if d.index == sample.index)


def test_logprobs_come_with_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=0)
    deltas = list(llm.stream("hello", params))
    output = last(deltas)
    assert output.logprobs is not None
    assert [next(iter(position)) for position in output.logprobs] == output.token_ids
    assert all(2 <= len(position) <= 3 for position in output.logprobs)
    assert [p for delta in deltas for p in delta.logprobs or []] == output.logprobs
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(p or {}) for p in output.prompt_logprobs[1:]] == [[4], [11], [11], [14]]


def test_without_being_asked_for_there_are_no_logprobs(llm: LLM) -> None:
    (output,) = llm.generate("hello", GREEDY)
    assert (output.logprobs, output.prompt_logprobs) == (None, None)


@pytest.mark.parametrize("speculative", ["off", "ngram"])
def test_tokens_behind_a_stop_string_are_taken_back(speculative: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0, allowed_token_ids=[3, 5])
    options = {"speculative": speculative, "num_speculative_tokens": 7}
    with make_llm(FakeModel(make_limits(rows=12)), options=options) as llm:
        (whole,) = llm.generate("hello", params)
        end = next(i for i in range(20, 40) if whole.text[i - 4 : i] not in whole.text[: i - 1])
        stop = whole.text[end - 4 : end]
        stopping = SamplingParams(
            temperature=0, max_tokens=40, logprobs=0, allowed_token_ids=[3, 5], stop=stop
        )
        (output,) = llm.generate("hello", stopping)
    assert output.text == whole.text[: end - 4]
    assert output.token_ids == whole.token_ids[:end]
    assert output.logprobs == (whole.logprobs or [])[:end]


def test_a_stop_string_or_token_may_be_left_in(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    for stop in ({"stop": whole.text[4:7]}, {"stop_token_ids": [whole.token_ids[6]]}):
        params = SamplingParams(
            temperature=0, max_tokens=12, include_stop_str_in_output=True, **stop
        )
        (output,) = llm.generate("hello", params)
        assert output.text == whole.text[: len(output.token_ids)]
        assert output.finish_reason == "stop"


def test_nothing_stops_before_the_minimum(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    params = SamplingParams(
        temperature=0, max_tokens=12, min_tokens=9, stop=list(set(whole.text[:8]))
    )
    (output,) = llm.generate("hello", params)
    assert output.num_output_tokens >= 9


def test_bad_words_are_never_said(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    letters = Letters(vocab_size=26)
    said = letters.text([t % 26 for t in whole.token_ids])
    bad = [said[3:5], said[8]]
    params = SamplingParams(
        temperature=0, max_tokens=30, bad_words=bad, allowed_token_ids=list(range(26))
    )
    (output,) = llm.generate("hello", params)
    assert not any(word in output.text for word in bad)


def test_the_end_of_a_long_prompt_is_kept(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, truncate_prompt_tokens=3)
    (output,) = llm.generate("hello", params)
    assert output.prompt_token_ids == [11, 11, 14]
    params = SamplingParams(temperature=0, max_tokens=12, truncate_prompt_tokens=-1)
    (output,) = llm.generate("ab" * 100, params)
    assert (output.num_prompt_tokens, output.num_output_tokens) == (99, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {1000: 1.0}),
        ("allowed_token_ids", [5, 1000]),
        ("stop_token_ids", [1000]),
    ],
)
def test_token_ids_that_the_model_does_not_have_are_refused(
    llm: LLM, field: str, value: object
) -> None:
    with pytest.raises(UsageError, match=f"^{field} holds token id 1000, but ids of this model"):
        llm.generate("a", SamplingParams(**{field: value}))


def test_the_models_defaults_apply_where_no_params_are_given() -> None:
    with make_llm(generation_defaults={"temperature": 0, "max_new_tokens": 3}) as llm:
        assert llm.default_params(seed=1) == SamplingParams(temperature=0, max_tokens=3, seed=1)
        (output,) = llm.generate("a")
        deltas = list(llm.stream("a"))
    assert output.token_ids == last(deltas).token_ids
    assert output.num_output_tokens == 3


def test_cached_tokens_are_reported_and_tenants_are_apart(llm: LLM) -> None:
    box = Mailbox()
    found = []
    for salt in ("x", "x", "y"):
        request = llm.make_request("a" * 40, GREEDY, sink=box.put, cache_salt=salt)
        llm.engine.submit([request])
        found.append(last(box.until_finished(1)[request]).num_cached_tokens)
    assert found == [0, 32, 0]


def test_stats_count_what_was_done(llm: LLM) -> None:
    llm.generate(["a" * 40, "a" * 40], GREEDY)
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (80, 24)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (80, 32)
    assert sum(stats.step_tokens.counts) == stats.num_steps
    assert stats.step_tokens.total == 40 + 8 + 2 * 11
    assert stats.kv_cache_usage == 0
    assert stats.num_cached_blocks == 3


def test_blocks_are_used_then_cached(slow: tuple[LLM, SlowModel]) -> None:
    llm, model = slow
    box = Mailbox()
    llm.engine.submit([llm.make_request("a" * 40, GREEDY, sink=box.put)])
    wait_for(lambda: llm.engine.stats().num_running == 1)
    blocks = llm.engine.block_map()
    assert blocks.states.count(BlockMap.USED) == sum(blocks.references) == 3
    model.gate.set()
    box.until_finished(1)
    blocks = llm.engine.block_map()
    assert blocks.states.count(BlockMap.CACHED) == 3
    assert blocks.states.count(BlockMap.FREE) == 21
    assert not any(blocks.references)


def test_an_abort_frees_the_blocks_before_the_next_step(slow: tuple[LLM, SlowModel]) -> None:
    llm, model = slow
    box = Mailbox()
    requests = [llm.make_request("ab", ENDLESS, sink=box.put) for _ in range(4)]
    llm.engine.submit(requests)
    wait_for(lambda: llm.engine.stats().num_running == 4)
    llm.engine.abort(requests)
    model.gate.set()
    deltas = box.until_finished(4)
    assert {last(each).finish_reason for each in deltas.values()} == {"abort"}
    assert len(model.steps) <= 3
    assert llm.engine.stats().num_used_blocks == 0


def test_too_many_waiting_requests_are_refused_all_or_none() -> None:
    model = SlowModel(make_limits(slots=1))
    with make_llm(model, options={"max_waiting": 2}) as llm:
        box = Mailbox()
        llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put) for _ in range(2)])
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put) for _ in range(2)])
        llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put)])
        assert issubclass(QueueFullError, CapacityError)
        model.gate.set()
        box.until_finished(3)
        llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put)])
        box.until_finished(1)


def pooled(llm: LLM, box: Mailbox, count: int) -> list[Request]:
    params = llm.embedder.params()
    return [
        llm.embedder.request([index % 20, 3], params, sink=box.put, name="text")
        for index in range(count)
    ]


def test_requests_in_turn_take_no_more_places_than_they_came_with() -> None:
    model = SlowModel(make_limits(slots=2))
    with make_llm(model, options={"max_waiting": 4}) as llm:
        long, short = Mailbox(), Mailbox()
        llm.engine.submit(pooled(llm, long, 50), in_turn=True)
        wait_for(lambda: llm.engine.stats().num_running == 2)
        llm.engine.submit(pooled(llm, short, 2), in_turn=True)
        with pytest.raises(QueueFullError):
            llm.engine.submit(pooled(llm, short, 1), in_turn=True)
        assert llm.engine.stats().num_waiting == 50
        model.gate.set()
        short.until_finished(2)
        assert len(long.until_finished(50)) == 50
        llm.engine.submit(pooled(llm, long, 500), in_turn=True)
        long.until_finished(500)


def test_requests_that_never_came_to_wait_are_aborted_with_the_others(
    slow: tuple[LLM, SlowModel],
) -> None:
    llm, model = slow
    box = Mailbox()
    requests = pooled(llm, box, 60)
    llm.engine.submit(requests, in_turn=True)
    wait_for(lambda: llm.engine.stats().num_running > 0)
    llm.engine.abort(requests[40:])
    model.gate.set()
    ends = {
        request: last(deltas).finish_reason for request, deltas in box.until_finished(60).items()
    }
    assert [ends[request] for request in requests[40:]] == ["abort"] * 20
    assert "abort" not in {ends[request] for request in requests[:40]}
    model.gate.clear()
    again = pooled(llm, box, 60)
    llm.engine.submit(again, in_turn=True)
    llm.engine.abort(again)
    model.gate.set()
    assert {last(each).finish_reason for each in box.until_finished(60).values()} == {"abort"}
    assert llm.engine.drain(timeout_s=20)


def test_draining_lets_what_runs_end_and_refuses_what_comes(slow: tuple[LLM, SlowModel]) -> None:
    llm, model = slow
    box = Mailbox()
    llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put)])
    assert not llm.engine.drain(timeout_s=0.02)
    with pytest.raises(DrainingError):
        llm.generate("a")
    model.gate.set()
    assert llm.engine.drain(timeout_s=20)
    assert last(*box.until_finished(1).values()).finish_reason == "length"


def test_a_paused_engine_starts_no_step_but_obeys(llm: LLM) -> None:
    llm.engine.pause()
    wait_for(lambda: llm.engine.heartbeat().is_paused)
    box = Mailbox()
    one, other = (llm.make_request("a", GREEDY, sink=box.put) for _ in range(2))
    llm.engine.submit([one, other])
    llm.engine.abort([other])
    assert last(box.until_finished(1)[other]).finish_reason == "abort"
    assert llm.engine.stats().num_steps == 0
    llm.engine.resume()
    assert last(box.until_finished(1)[one]).finish_reason == "length"


def test_a_heartbeat_tells_a_stuck_engine_from_an_idle_one(slow: tuple[LLM, SlowModel]) -> None:
    llm, model = slow
    assert llm.engine.heartbeat().is_alive
    assert not llm.engine.heartbeat().has_work
    llm.engine._beat_s -= 1000  # nobody asked for anything all the while
    box = Mailbox()
    llm.engine.submit([llm.make_request("a", GREEDY, sink=box.put)])
    first = llm.engine.heartbeat()
    assert first.has_work
    assert first.idle_s < 500
    wait_for(lambda: len(model.steps) > 0)
    first = llm.engine.heartbeat()
    wait_for(lambda: llm.engine.heartbeat().idle_s > first.idle_s + 0.02)
    model.gate.set()
    box.until_finished(1)
    assert not llm.engine.heartbeat().has_work


def test_a_dead_engine_has_no_heartbeat() -> None:
    with make_llm(FakeModel(make_limits(), fail_at_step=1)) as llm:
        with pytest.raises(RuntimeError):
            llm.generate("a")
        assert not llm.engine.heartbeat().is_alive
        assert llm.engine.drain(timeout_s=5)


def test_a_low_priority_value_overtakes_the_queue() -> None:
    model = SlowModel(make_limits(slots=1))
    with make_llm(model) as llm:
        box = Mailbox()
        requests = [
            llm.make_request("a", GREEDY, sink=box.put, priority=priority)
            for priority in (0, 0, -1)
        ]
        llm.engine.submit(requests)
        model.gate.set()
        assert next(iter(box.until_finished(3))) is requests[2]


def test_a_draft_model_is_loaded_warmed_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = FakeModel(make_limits(blocks=7))
    asked = []

    def load(config, progress, target):
        asked.append(
            (config.model, config.speculative, config.kv_cache_memory_bytes, target.blocks)
        )
        return SimpleNamespace(compiled=draft)

    monkeypatch.setattr("tokenmill.engine.llm._load", load)
    options = {"speculative": "small", "kv_cache_memory_bytes": 5}
    with make_llm(options=options) as llm:
        assert asked == [("small", "off", None, 24)]
        llm.warm_up()
        assert llm.loaded.compiled.is_warm
        assert draft.is_warm
        told = (
            "room for 3 sequences of 100 tokens in a KV cache of 384; the draft model's holds 112"
        )
        assert capacity(llm) == told
        assert llm.generate("hello", GREEDY)
    assert draft.is_closed


def test_a_draft_model_of_other_tokens_is_refused_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft, model = FakeModel(make_limits(vocab_size=9)), FakeModel(make_limits())
    loaded = SimpleNamespace(compiled=draft)
    monkeypatch.setattr("tokenmill.engine.llm._load", lambda *_, **__: loaded)
    with pytest.raises(UsageError, match="same tokenizer"):
        make_llm(model, options={"speculative": "small"})
    assert draft.is_closed
    assert model.is_closed


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never comes to that"
        threading.Event().wait(0.001)
