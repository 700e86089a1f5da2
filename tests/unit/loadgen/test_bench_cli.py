import json
import xml.etree.ElementTree as ElementTree

import pytest
from fake_openai import FakeServer, running

from tokenmill.cli.main import main
from tokenmill.loadgen.plot import draw_run
from tokenmill.loadgen.records import RequestRecord

FEW = ("--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4")


def bench(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(["bench", *map(str, arguments)])
    return exited.value.code


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_result_file_table_and_plot(tmp_path, capsys):
    result, plot = tmp_path / "deep" / "r.json", tmp_path / "r.svg"
    with running(FakeServer()) as server:
        code = bench(
            *("serve", "--base-url", server.url + "/v1", *FEW, "--request-rate", "200"),
            *("--goodput", "ttft:5000", "--metric-percentiles", "50,99", "--save-detailed"),
            *("--save-result", result, "--plot", plot),
        )
    assert code == 0
    out, err = capsys.readouterr()
    assert "Successful requests" in out
    assert "TTFT" in out
    assert f"saved {result}" in err
    document = json.loads(result.read_text())
    assert document["completed"] == 6
    assert document["total_input_tokens"] == 48
    assert document["total_output_tokens"] == 24
    assert document["request_goodput"] == document["request_throughput"]
    assert document["model_id"] == "fake-model"
    assert document["request_rate"] == 200
    assert document["output_lens"] == [4] * 6
    assert len(server.bodies) == 7  # the warm-up
    assert all(body["ignore_eos"] for body in server.bodies)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_the_file_name_is_made_where_none_is_given(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with running(FakeServer()) as server:
        assert bench("serve", "--base-url", server.url, *FEW, "--save-result") == 0
    [path] = tmp_path.glob("openai-infqps-fake-model-*.json")
    assert "ttfts" not in json.loads(path.read_text())


def test_the_words_of_vllm_bench_are_understood(tmp_path, capsys):
    with running(FakeServer()) as server:
        code = bench(
            *("serve", "--backend", "vllm", "--host", "127.0.0.1", *FEW),
            *("--port", server.url.rpartition(":")[2], "--metadata", "version=1.2", "kind=small"),
            *("--save-result", "--result-dir", tmp_path / "new", "--result-filename", "r.json"),
        )
    assert code == 0
    document = json.loads((tmp_path / "new" / "r.json").read_text())
    assert (document["version"], document["kind"], document["backend"]) == ("1.2", "small", "vllm")


def test_failures_are_shown_and_do_not_end_the_run(tmp_path, capsys):
    file = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 4, "output_length": 3, "hash_ids": []}
    file.write_text(json.dumps(line) + "\n")
    with running(FakeServer()) as server:
        code = bench(
            *("serve", "--base-url", server.url, "--dataset-name", "mooncake"),
            *("--dataset-path", file, "--extra-body", '{"prompt": "busy"}', "--num-warmups", "0"),
        )
    assert code == 1
    out, err = capsys.readouterr()
    assert "failed 1 x HTTP 429: too many requests" in out
    assert err.startswith("error: all 1 requests failed")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--base-url", "http://127.0.0.1:1"), "cannot connect: connection refused"),
        (("--base-url", "nowhere"), "--base-url is 'nowhere'"),
        (("--endpoint", "/v1/chat/completions"), "name a --tokenizer"),
        (("--dataset-name", "azure", "--dataset-path", "/nowhere"), "cannot read /nowhere"),
        (("--goodput", "ttft"), "--goodput has 'ttft'"),
        (("--goodput", "ttft:x"), "--goodput has 'x'"),
        (("--extra-body", "[]"), "--extra-body"),
        (("--request-rate", "0"), "--request-rate is 0"),
        (("--max-concurrency", "0"), "--max-concurrency is 0"),
        (("--num-warmups", "-1"), "--num-warmups is -1"),
        (("--trace-speed", "0"), "--trace-speed is 0"),
        (("--trace-speed", "2", "--request-rate", "3"), "which --request-rate replaces"),
        (("--metadata", "x"), "--metadata has 'x'"),
        (("--save-result", "a.json", "--result-filename", "b.json"), "both name the file"),
        (("--backend", "openai-chat"), "takes text: name a --tokenizer"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_in_one_line(capsys, arguments, fragment):
    with running(FakeServer()) as server:
        assert bench("serve", "--base-url", server.url, *FEW, *arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert fragment in line


def test_a_benchmark_must_be_named(capsys):
    assert bench() == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("error", [None, "HTTP 500"])
def test_a_plot_of_whatever_there_is(error):
    record = RequestRecord(
        started_s=0, ended_s=0, prompt_len=1, output_len=1, token_times_s=[0.0], error=error
    )
    for records in ([], [record], [record] * 3):
        assert ElementTree.fromstring(draw_run(records, "a < b")) is not None
