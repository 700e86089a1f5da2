import json
from contextlib import closing
from types import SimpleNamespace

import pytest
from tiny_words import word_tokenizer

from tests.unit.fake_model import FakeModel, make_limits
from tokenmill import LLM
from tokenmill.cli.main import main


@pytest.fixture
def llm(monkeypatch):
    tokenizer = word_tokenizer()
    limits = make_limits(blocks=40, vocab_size=tokenizer.vocab_size)
    loaded = SimpleNamespace(
        compiled=FakeModel(limits),
        config=SimpleNamespace(context_length=128, longest_context=128),
        tokenizer=tokenizer,
        chat_template=None,
        generation_defaults={},
        adapter_reader=None,
    )
    with closing(LLM("fake", loaded=loaded)) as llm:
        monkeypatch.setattr("tokenmill.cli.bench.open_llm", lambda config: llm)
        yield llm


def bench(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(["bench", *map(str, arguments)])
    return exited.value.code


def test_throughput(llm, tmp_path, capsys):
    path = tmp_path / "r.json"
    lengths = ("--random-input-len", "20", "--output-len", "5")
    assert bench("throughput", "--num-prompts", "6", *lengths, "--output-json", path) == 0
    assert capsys.readouterr().out.startswith("Throughput: ")
    result = json.loads(path.read_text())
    assert result["num_requests"] == 6
    assert result["total_num_tokens"] == 6 * 25
    seconds = result["elapsed_time"]
    assert result["requests_per_second"] == pytest.approx(6 / seconds)
    assert result["tokens_per_second"] == pytest.approx(150 / seconds)
    assert result["output_tokens_per_second"] == pytest.approx(30 / seconds)


def test_latency(llm, tmp_path, capsys):
    path = tmp_path / "r.json"
    sizes = ("--batch-size", "2", "--input-len", "8", "--output-len", "4")
    runs = ("--num-iters", "3", "--num-iters-warmup", "1")
    assert bench("latency", *sizes, *runs, "--output-json", path) == 0
    assert capsys.readouterr().out.startswith("Avg latency: ")
    result = json.loads(path.read_text())
    assert len(result["latencies"]) == 3
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 3)
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert result["percentiles"]["50"] == sorted(result["latencies"])[1]


def test_latency_needs_a_batch(llm, capsys):
    assert bench("latency", "--num-iters", "0") == 2
    assert capsys.readouterr().err == "error: --num-iters is 0, but must be at least 1\n"
