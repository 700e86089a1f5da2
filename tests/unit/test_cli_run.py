import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_llm import FakeLLM

from tokenmill.cli.main import main

PROGRAM = [sys.executable, str(Path(__file__).with_name("fake_llm.py"))]


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr("tokenmill.cli.run.open_llm", fake.open)
    return fake


def run(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(["run", *arguments])
    return exited.value.code


def test_text_to_stdout_and_the_rest_to_stderr(llm, capsys):
    assert run("hello") == 0
    out, err = capsys.readouterr()
    assert out == "<u:hello>\n"
    [line] = err.splitlines()
    assert line.startswith("7 tokens in, 9 out, 8.0 tok/s, loaded in ")
    assert llm.is_closed


def test_json_is_one_object(llm, capsys):
    assert run("hé", "--json", "--max-tokens", "3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["text"] == "<u:"
    assert result["token_ids"] == [ord(char) for char in "<u:"]
    assert result["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert result["timings"]["first_token_s"] == 0.5
    assert result["timings"]["decode_tokens_per_s"] == 2.0


def test_raw_gives_the_prompt_as_it_is(llm, capsys):
    assert run("hello", "--raw") == 0
    assert capsys.readouterr().out == "<hello>\n"


def test_a_model_without_template_gets_the_prompt_as_it_is(llm, capsys):
    llm.loaded.chat_template = None
    assert run("hello") == 0
    assert capsys.readouterr().out == "<hello>\n"


def test_system_precedes_the_prompt(llm, capsys):
    assert run("hello", "--system", "be kind") == 0
    assert capsys.readouterr().out == "<s:be kind|u:hello>\n"


def test_system_needs_a_template(llm, capsys):
    assert run("hello", "--system", "be kind", "--raw") == 2
    assert capsys.readouterr().err.startswith("error: --system needs a model with a chat template")


def test_options_reach_the_engine(llm):
    assert (
        run(
            *("hello", "--model", "m", "--quantization", "q8", "--activations", "int8"),
            *("--kv-cache", "f32", "--threads", "3", "--max-model-len", "99", "--offline"),
            *("--temperature", "0", "--top-p", "0.5", "--top-k", "7", "--min-p", "0.1"),
            *("--seed", "5", "--max-tokens", "11"),
        )
        == 0
    )
    [config], [params] = llm.configs, llm.params
    assert (config.model, config.quantization, config.activations) == ("m", "q8", "int8")
    assert (config.kv_cache, config.threads, config.max_model_len) == ("f32", 3, 99)
    assert config.offline
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 7, 0.1)
    assert (params.seed, params.max_tokens) == (5, 11)


@pytest.mark.parametrize(
    ("file", "flags", "wanted"),
    [
        ({}, (), (0.7, 0.95, 0, 1.0, 512)),
        ({"temperature": 0.2, "top_k": 64, "eos_token_id": 1}, (), (0.2, 0.95, 64, 1.0, 512)),
        (
            {"temperature": 0.2, "top_k": 64, "repetition_penalty": 1.1, "max_new_tokens": 9},
            ("--top-k", "0", "--temperature", "0"),
            (0, 0.95, 0, 1.1, 9),
        ),
        (
            {"repetition_penalty": 1.1, "max_new_tokens": 9, "top_p": 0.5},
            ("--repetition-penalty", "1", "--max-tokens", "20", "--top-p", "0.9"),
            (0.7, 0.9, 0, 1, 20),
        ),
    ],
)
def test_flags_win_over_what_the_models_makers_recommend(llm, file, flags, wanted):
    llm.generation_config = file
    assert run("hello", *flags) == 0
    [p] = llm.params
    found = (p.temperature, p.top_p, p.top_k, p.repetition_penalty, p.max_tokens)
    assert found == wanted


def test_dash_reads_standard_input(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert run("-", "--raw") == 0
    assert capsys.readouterr().out == "<two\nlines>\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["hi", "--temperature", "-1"], "temperature is -1.0"),
        (["hi", "--top-p", "2"], "top_p is 2.0"),
        (["hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["hi", "--threads", "0"], "threads is 0"),
        (["  "], "the prompt is empty"),
        (["a\udcffb"], "the prompt is not UTF-8"),
    ],
)
def test_wrong_use_is_one_line_before_the_model_is_loaded(llm, capsys, arguments, text):
    assert run(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert text in line
    assert llm.configs == []


def test_ctrl_c_ends_the_program_with_130():
    process = subprocess.Popen(
        [*PROGRAM, "run", "endless", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(12) == "<u:endless>."
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "closed True" in err


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [*PROGRAM, "run", "endless", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1) == "<"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert err.splitlines() == ["[aborted 1, closed True]"]


def test_text_that_the_terminal_cannot_show_is_replaced():
    done = subprocess.run(
        [*PROGRAM, "run", "é", "--raw"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, b"<?>\n")


def test_standard_input_that_is_no_utf8():
    done = subprocess.run(
        [*PROGRAM, "run", "-"],
        input=b"\xff\xfe",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard input is not UTF-8")
