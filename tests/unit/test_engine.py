"""The engine's thread and the Python interface, on a fake model and a tokenizer of letters."""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from fake_model import STATE_SIZE, FakeModel, make_limits

from tokenmill import LLM, SamplingParams
from tokenmill.backends.base import StepOutput
from tokenmill.engine.engine import EngineDeadError
from tokenmill.errors import CapacityError, UsageError
from tokenmill.models.sentence_transformers import Pooling
from tokenmill.models.text.chat import ChatTemplate


@dataclass
class Letters:
    """Every id is a letter; text becomes the places of its letters in the alphabet."""

    vocab_size: int = 990
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    drops_first_space: bool = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def pieces(self, ids: Iterable[int], skip_special_tokens: bool = True) -> list[bytes]:
        known = list(ids)
        assert all(i < self.vocab_size for i in known)
        return [self.letter(i).encode() for i in known]

    def letter(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26) if token_id < self.vocab_size else ""

    def text(self, ids: Iterable[int]) -> str:
        return "".join(map(self.letter, ids))


@dataclass(eq=False)
class SlowModel(FakeModel):
    """Takes a while for each step, and lets a test hold one back."""

    step_s: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> StepOutput:
        self.gate.wait(timeout=20)
        time.sleep(self.step_s)
        return super().wait()


def make_llm(
    model: FakeModel | None = None, options: dict[str, object] | None = None, **changes: object
) -> LLM:
    loaded = SimpleNamespace(
        compiled=model or FakeModel(make_limits(blocks=24)),
        tokenizer=Letters(),
        chat_template=None,
        generation_defaults={},
        adapter_reader=None,
        pooling=Pooling(kind="last"),
        config=SimpleNamespace(
            context_length=100, longest_context=100, encoder=None, hidden_size=STATE_SIZE
        ),
    )
    vars(loaded).update(changes)
    return LLM("fake", loaded=loaded, **(options or {}))


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_outputs_come_in_the_order_of_the_prompts_and_as_if_alone(llm: LLM) -> None:
    prompts = ["hello", [1, 2, 3], {"prompt_token_ids": [4]}, {"prompt": "abc"}] * 3
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    together = llm.generate(prompts, GREEDY)
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [o.prompt for o in together[:4]] == ["hello", None, None, "abc"]
    assert together[0].prompt_token_ids == [7, 4, 11, 11, 14]
    assert all(o.text == Letters().text(o.token_ids) for o in together)


def test_an_output_counts_and_times(llm: LLM) -> None:
    (output,) = llm.generate("hello", GREEDY)
    assert (output.num_prompt_tokens, output.num_output_tokens) == (5, 12)
    assert (output.finish_reason, output.stop_reason) == ("length", None)
    assert 0 < output.timings.first_token_s <= output.timings.total_s


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (3, 1)]
    outputs = llm.generate(["a", "b"], params)
    assert [o.num_output_tokens for o in outputs] == [3, 1]
    with pytest.raises(UsageError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", params)
    with pytest.raises(UsageError, match="must be a SamplingParams"):
        llm.generate("a", {"temperature": 0})


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_progress_is_told(llm: LLM) -> None:
    told: list[tuple[int, int]] = []
    llm.generate(["a", "b"], GREEDY, progress=lambda *pair: told.append(pair))
    assert told == [(1, 2), (2, 2)]


def test_a_seed_repeats_a_request_and_no_seed_does_not(llm: LLM) -> None:
    seeded = [llm.generate("a", SamplingParams(seed=3))[0].token_ids for _ in range(2)]
    unseeded = [llm.generate("a", SamplingParams())[0].token_ids for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", ""], "prompt 1 is empty"),
        ([[1], [5, 1000]], "prompt 1 holds token id 1000 at index 1: ids of this model run from 0"),
        ([[1], [-1]], "prompt 1 holds token id -1"),
        (["a", "b" * 100], "prompt 1 has 100 tokens, but a context of 100 leaves room for 99"),
        ([3.5], "prompt 0 is a float"),
        ([{"text": "a"}], "prompt 0 has the keys"),
        ([{"prompt_token_ids": "abc"}], "prompt 0 has the keys"),
        ([["a", "b"]], "prompt 0 holds 'a' at index 0, which is not a token id"),
        (17, "prompts is a int"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_runs(llm: LLM, prompts: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        llm.generate(prompts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not llm.loaded.compiled.steps


def test_a_prompt_larger_than_the_cache_is_a_matter_of_capacity() -> None:
    with (
        make_llm(FakeModel(make_limits(blocks=2))) as llm,
        pytest.raises(CapacityError, match="prompt 0 has 40 tokens, but the KV cache of 32"),
    ):
        llm.generate("a" * 40)


def test_a_stream_is_the_same_text_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    deltas = list(llm.stream("hello", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas] == [None] * 11 + ["length"]
    assert deltas[-1].output.text == whole.text


def test_closing_a_stream_frees_what_it_held() -> None:
    model = SlowModel(make_limits(), step_s=0.002)
    model.gate.set()
    with make_llm(model) as llm:
        stream = llm.stream("hello", SamplingParams(max_tokens=None))
        next(stream)
        stream.close()
        (output,) = llm.generate("a", GREEDY)
        assert output.num_output_tokens == 12
        assert len(model.steps) < 40
        assert llm.engine._loop.scheduler.pool.num_free == model.limits.blocks


def test_a_stream_checks_at_once_and_starts_with_the_first_piece(llm: LLM) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.stream("")
    llm.stream("abc").close()
    assert not llm.loaded.compiled.steps


def test_a_stop_string_across_tokens_ends_the_text_before_itself(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    stop = whole.text[4:7]
    end = whole.text.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, stop=["never there", stop])
    (output,) = llm.generate("hello", params)
    assert (output.text, output.finish_reason) == (whole.text[:end], "stop")
    assert output.stop_reason == stop
    assert output.token_ids == whole.token_ids[: end + 3]
    assert "".join(d.text for d in llm.stream("hello", params)) == whole.text[:end]


def test_an_end_token_is_counted_but_not_shown(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    params = SamplingParams(temperature=0, stop_token_ids=[whole.token_ids[5]])
    (output,) = llm.generate("hello", params)
    end = whole.token_ids.index(whole.token_ids[5])
    assert output.token_ids == whole.token_ids[: end + 1]
    assert output.text == whole.text[:end]
    assert (output.finish_reason, output.stop_reason) == ("stop", whole.token_ids[5])


def test_the_end_tokens_of_the_tokenizer_end_an_answer(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    with make_llm(tokenizer=Letters(eos_ids=(whole.token_ids[3],))) as ending:
        (output,) = ending.generate("hello", GREEDY)
    assert output.finish_reason == "stop"
    assert output.stop_reason is None


def test_ids_that_pad_the_vocabulary_have_no_text() -> None:
    with make_llm(tokenizer=Letters(vocab_size=500)) as llm:
        (output,) = llm.generate("hello", GREEDY)
    assert any(i >= 500 for i in output.token_ids)
    assert output.text == Letters(vocab_size=500).text(output.token_ids)


def test_many_threads_share_one_llm(llm: LLM) -> None:
    wanted = {n: llm.generate("a" * n, GREEDY)[0].token_ids for n in range(1, 9)}
    got: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        got[n] = [t for d in llm.stream("a" * n, GREEDY) for t in d.token_ids]

    threads = [threading.Thread(target=ask, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert got == wanted


def test_an_error_in_the_engine_reaches_everybody_and_nothing_hangs() -> None:
    model = SlowModel(make_limits(), fail_at_step=3)
    llm = make_llm(model)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            llm.generate(["a", "b"], GREEDY)
        except EngineDeadError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    model.gate.set()
    for thread in threads:
        thread.join(timeout=20)
    assert len(errors) == 3
    assert all(isinstance(error.__cause__, FloatingPointError) for error in errors)
    with pytest.raises(EngineDeadError, match="the engine stopped: FloatingPointError: the fake"):
        llm.generate("a", GREEDY)
    with pytest.raises(EngineDeadError):
        next(llm.stream("a", GREEDY))
    llm.close()
    assert model.is_closed


def test_ctrl_c_aborts_the_call_and_leaves_the_llm_usable() -> None:
    model = SlowModel(make_limits(), step_s=0.002)
    model.gate.set()
    with make_llm(model) as llm:
        timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 20, SamplingParams(max_tokens=None))
        timer.join()
        (output,) = llm.generate("a", GREEDY)
        assert output.num_output_tokens == 12
        assert not llm.engine._live


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    model = SlowModel(make_limits(), step_s=0.002)
    model.gate.set()
    llm = make_llm(model)
    stream = llm.stream("hello", SamplingParams(max_tokens=None))
    next(stream)
    llm.close()
    llm.close()
    assert list(stream)[-1].finish_reason == "abort"
    assert model.is_closed
    with pytest.raises(UsageError, match="the LLM is closed"):
        llm.generate("a")


def test_an_llm_that_nobody_holds_closes_itself() -> None:
    model = FakeModel()
    llm = make_llm(model)
    llm.generate("a")
    del llm
    gc.collect()
    assert model.is_closed


@dataclass
class Template:
    """Puts the role's first letter before each message."""

    def render(self, messages: Iterable[dict[str, str]]) -> str:
        return "".join(m["role"][0] + m["content"] for m in messages)


def test_chat_renders_the_template() -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "yz"}]
    with make_llm(chat_template=Template()) as llm:
        (one,) = llm.chat(messages, GREEDY)
        several = llm.chat([messages, messages[1:]], GREEDY)
        plain = llm.generate(["sxuyz", "uyz"], GREEDY)
    assert one.token_ids == several[0].token_ids == plain[0].token_ids
    assert several[1].token_ids == plain[1].token_ids


def test_chat_checks_the_messages() -> None:
    with make_llm(chat_template=ChatTemplate("{{ messages[0].content }}")) as llm:
        for messages in ([], "hello", {"role": "user"}, [{"role": "user"}], [[]]):
            with pytest.raises(UsageError, match="message"):
                llm.chat(messages)


def test_chat_without_a_template_says_so(llm: LLM) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        llm.chat([{"role": "user", "content": "a"}])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tokenmill; print(sorted(m for m in sys.modules if 'numpy' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_work_that_no_step_can_be_planned_for_ends_the_engine() -> None:
    """It must not look healthy for ever."""
    with make_llm() as llm:
        llm.engine._loop.scheduler.schedule = lambda budget: None
        with pytest.raises(EngineDeadError, match="1 wait, but no step can be planned"):
            llm.generate("a", GREEDY)
        assert not llm.engine.heartbeat().is_alive


def test_what_fails_while_pooling_is_prepared_fails_for_its_caller_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make_llm() as llm:
        stream = llm.stream([1, 2, 3], GREEDY)
        next(stream)

        def fail() -> None:
            raise CapacityError("no memory is left")

        with monkeypatch.context() as patch:
            patch.setattr(llm.loaded.compiled, "prepare_pooling", fail)
            with pytest.raises(CapacityError, match="no memory"):
                llm.embed([[4, 5]])
        assert list(stream)[-1].output is not None
        assert llm.embed([[4, 5]])[0].outputs.embedding.shape == (STATE_SIZE,)
        assert llm.loaded.compiled.can_pool
