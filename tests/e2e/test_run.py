"""`tokenmill run` with the real model: what a user sees, and where."""

import json
import re
import shutil
import signal
import subprocess

import pytest

from tests.e2e.command import (
    ANSWER,
    PROGRAM,
    QUESTION,
    ask,
    assert_answered,
    assert_refused,
    environment,
    run_command,
)
from tokenmill.config import ACTIVATIONS


def test_a_second_start_prints_the_text_and_one_line_beside_it(smollm2, warm_home):
    done = ask(smollm2, warm_home)
    assert_answered(done)
    [line] = done.stderr.splitlines()
    assert re.fullmatch(
        r"37 tokens in, 8 out, [\d.]+ tok/s, loaded in [\d.]+ s, first token after [\d.]+ s", line
    )


def test_the_default_model_needs_no_flag(smollm2, warm_home, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(warm_home, home)
    (home / "models").symlink_to(smollm2.parents[1])
    assert_answered(run_command("run", QUESTION, "--temperature", "0", "--offline", home=home))


def test_json_is_one_object_that_says_everything(smollm2, warm_home):
    done = ask(smollm2, warm_home, "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["text"] == ANSWER
    assert result["finish_reason"] == "stop"
    assert result["usage"] == {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}
    assert len(result["token_ids"]) == 8
    timings = result["timings"]
    assert 0 < timings["first_token_s"] < timings["total_s"]
    assert timings["load_s"] > 0
    assert timings["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("flags", [("--threads", "1"), ("--threads", "9"), ("--top-k", "5")])
def test_flags_that_cannot_change_a_greedy_answer(smollm2, warm_home, flags):
    assert_answered(ask(smollm2, warm_home, *flags))


def test_float32_activations_know_the_answer(smollm2, warm_home):
    assert_answered(ask(smollm2, warm_home, "--activations", "f32"))


def test_the_portable_row_runs_and_knows_the_answer(smollm2, warm_home):
    assert_answered(ask(smollm2, warm_home, TOKENMILL_ISA="portable"))


def test_the_same_seed_gives_the_same_text(smollm2, warm_home):
    def tell(seed: int) -> str:
        prompt = ("run", "Tell me a story.", "--model", str(smollm2), "--max-tokens", "24")
        done = run_command(*prompt, "--temperature", "1", "--seed", str(seed), home=warm_home)
        assert done.returncode == 0
        return done.stdout

    first = tell(7)
    assert tell(7) == first
    assert tell(8) != first


def test_standard_input_is_the_prompt(smollm2, warm_home):
    flags = ("--model", str(smollm2), "--temperature", "0")
    assert_answered(run_command("run", "-", *flags, home=warm_home, stdin=QUESTION))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_raw_completes_the_text(smollm2, warm_home, activations):
    flags = ("--model", str(smollm2), "--temperature", "0", "--raw", "--max-tokens", "2")
    done = run_command(
        "run", "The capital of France is", *flags, "--activations", activations, home=warm_home
    )
    assert done.stdout == " Paris.\n"
    assert "cut at the limit of tokens" in done.stderr


def test_ctrl_c_ends_it_with_what_was_printed(smollm2, warm_home):
    flags = ("--model", str(smollm2), "--max-tokens", "4000", "--temperature", "0.9")
    process = subprocess.Popen(
        [*PROGRAM, "run", "Count from 1 to 1000, in words.", *flags],
        env=environment(warm_home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == b""


def test_a_reader_that_leaves_ends_it_quietly(smollm2, warm_home):
    flags = ("--model", str(smollm2), "--max-tokens", "200", "--temperature", "0.9")
    process = subprocess.Popen(
        [*PROGRAM, "run", "Count from 1 to 100.", *flags],
        env=environment(warm_home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_chat_answers_each_line_knowing_those_before(smollm2, warm_home):
    def chat(*lines: str) -> list[str]:
        flags = ("--model", str(smollm2), "--temperature", "0", "--max-tokens", "16")
        done = run_command("chat", *flags, home=warm_home, stdin="\n".join(lines))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert chat(QUESTION)[0] == ANSWER
    *_, alone = chat("And of Germany?")
    first, *_, second = chat(QUESTION, "And of Germany?")
    assert first == ANSWER
    assert "Berlin" in second
    assert "Berlin" not in alone


# -- what is refused


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--threads", "0"), "threads is 0"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--max-model-len", "99999"), "made for 8192 tokens: give at most that"),
        (("--activations", "fp8"), "invalid choice: 'fp8'"),
    ],
)
def test_a_flag_out_of_range(smollm2, warm_home, flags, fragment):
    assert_refused(ask(smollm2, warm_home, *flags), 2, fragment)


def test_an_unknown_model(warm_home):
    done = run_command("run", QUESTION, "--model", "smolm2", home=warm_home)
    assert_refused(done, 2, "did you mean smollm2?")


def test_an_unknown_instruction_set(smollm2, warm_home):
    done = ask(smollm2, warm_home, TOKENMILL_ISA="mmx")
    assert_refused(done, 2, "'mmx'", "portable")


def test_no_network_and_no_model(tmp_path):
    done = run_command("run", QUESTION, home=tmp_path, settings={"TOKENMILL_OFFLINE": "1"})
    assert_refused(done, 2, "smollm2 is not on disk", "the network is off")


def test_a_prompt_longer_than_the_context(smollm2, warm_home):
    flags = ("--model", str(smollm2), "--max-model-len", "64")
    done = run_command("run", "word " * 64, *flags, home=warm_home)
    assert_refused(done, 2, "a context of 64", "shorten the prompt or raise max_model_len, up to")


@pytest.mark.parametrize("length", [3, 50, 5_000, 5_000_000])
def test_a_truncated_file(smollm2, warm_home, tmp_path, length):
    path = tmp_path / "short.gguf"
    with smollm2.open("rb") as whole:
        path.write_bytes(whole.read(length))
    assert_refused(ask(path, warm_home), 1, "short.gguf")


def test_out_of_range_token_ids(smollm2, caches):
    from tokenmill import LLM, SamplingParams
    from tokenmill.errors import UsageError

    with LLM(str(smollm2), max_model_len=256) as llm:
        for bad in (-1, 49_152, 10**12):
            with pytest.raises(UsageError, match="prompt 0"):
                llm.generate([[1, bad]], SamplingParams(max_tokens=1))
        assert llm.generate([[1, 49_151]], SamplingParams(max_tokens=1))[0].num_output_tokens == 1
