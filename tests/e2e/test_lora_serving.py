"""Adapters through the engine, the server and the command line, on a small random model."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest
from openai import OpenAI

from tests.e2e.adapter_files import ALL_MODULES, write_adapter
from tests.e2e.command import PROGRAM, environment
from tests.e2e.server_process import ServerProcess, serving, strict_client
from tokenmill import LLM, LoRARequest, SamplingParams
from tokenmill.config import ACTIVATIONS
from tokenmill.errors import CapacityError, UsageError
from tokenmill.models.checkpoint import open_checkpoint

TEXT = "The mill turns grain into flour while water runs under its wheel"
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, seed=5)


@pytest.fixture(scope="session")
def adapters(small_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name; `first` and `twin` have the same content."""
    config = open_checkpoint(small_qwen).config
    hidden, inner = config.hidden_size, config.intermediate_size
    rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    rows |= {"o_proj": hidden, "gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    columns = {"o_proj": config.q_size, "down_proj": inner}
    sizes = {
        f"model.layers.{layer}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}": (
            rows[name],
            columns.get(name, hidden),
        )
        for layer in range(config.num_layers)
        for name in ALL_MODULES
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / name, sizes, rank=rank, seed=seed)
        for name, rank, seed in (
            ("first", 5, 1),
            ("second", 16, 2),
            ("twin", 5, 1),
            ("third", 1, 3),
        )
    }


def request(adapters: dict[str, Path], name: str | None) -> LoRARequest | None:
    return None if name is None else LoRARequest(name, 1, str(adapters[name]))


def words(count: int) -> list[str]:
    parts = TEXT.split()
    return [" ".join(parts[i % 5 : i % 5 + 1 + i % 9]) for i in range(count)]


def generate(
    llm: LLM, prompts: Sequence[str], adapters: dict[str, Path], names: Sequence[str | None]
) -> list[list[int]]:
    params = [GREEDY if i % 2 else DRAWN for i in range(len(prompts))]
    requests = [request(adapters, name) for name in names]
    outputs = llm.generate(prompts, params, lora_request=requests)
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_each_says_in_company_what_it_says_alone(
    small_qwen: Path, caches: Path, adapters: dict[str, Path], activations: str
) -> None:
    """More adapters than slots, small steps, a pool that preempts; guesses change nothing."""
    prompts = words(12)
    names = [(None, "first", "second", "third")[i % 4] for i in range(12)]
    options = {"activations": activations, "max_model_len": 256}
    room = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16}
    with LLM(str(small_qwen), threads=1, **options) as plain:
        bare = generate(plain, prompts, adapters, [None] * 12)
    with LLM(str(small_qwen), threads=1, **options, **room) as llm:
        alone = [
            generate(llm, [prompt], adapters, [name])[0]
            if index % 2 == 0
            else llm.generate(prompt, GREEDY, lora_request=request(adapters, name))[0].token_ids
            for index, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
    for index, name in enumerate(names):
        assert (alone[index] == bare[index]) == (name is None), (index, name)
    for more in (
        {"threads": 2, "max_loras": 2, "max_num_batched_tokens": 9},
        {"threads": 2, "max_loras": 1, "speculative": "ngram"},
        {"threads": 3, "max_lora_rank": 40, "kv_cache_memory_bytes": 2**18, "max_num_seqs": 7},
    ):
        with LLM(str(small_qwen), **{**options, **room, **more}) as llm:
            assert generate(llm, prompts, adapters, names) == alone, more


def test_adapters_come_and_go_while_requests_run(
    small_qwen: Path, caches: Path, adapters: dict[str, Path]
) -> None:
    options = {"max_model_len": 512, "enable_lora": True, "max_loras": 1}
    with LLM(str(small_qwen), **options) as llm:
        llm.load_adapter("own", str(adapters["first"]))
        long = replace(GREEDY, max_tokens=300)
        expected = llm.generate(TEXT, long, lora_request=LoRARequest("own"))[0].token_ids
        stream = llm.stream(TEXT, long, lora_request=LoRARequest("own"))
        said = list(next(stream).token_ids)
        unloading = threading.Thread(target=llm.unload_adapter, args=("own",))
        unloading.start()
        while llm.adapters.find("own") is not None:
            pass
        llm.load_adapter("own", str(adapters["second"]))
        other = llm.generate(TEXT, GREEDY, lora_request=LoRARequest("own"))[0].token_ids
        for delta in stream:
            said += delta.token_ids
        unloading.join(20)
        assert said == expected
        assert other == llm.generate(TEXT, GREEDY, lora_request=LoRARequest("own"))[0].token_ids
        assert other != expected[: len(other)]


def test_beginnings_are_shared_by_equal_adapters_only(
    small_qwen: Path, caches: Path, adapters: dict[str, Path]
) -> None:
    with LLM(str(small_qwen), max_model_len=256, enable_lora=True, max_loras=2) as llm:

        def cached(name: str | None) -> int:
            [output] = llm.generate(TEXT, GREEDY, lora_request=request(adapters, name))
            return output.num_cached_tokens

        assert [cached(n) for n in (None, "first", "second")] == [0, 0, 0]
        again = LoRARequest(
            "first", 1, f"{adapters['first']}/"
        )  # the same folder, spelled otherwise
        llm.generate([TEXT, TEXT], GREEDY, lora_request=[again, again])
        assert all(cached(n) >= 16 for n in (None, "first", "second", "twin"))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_the_adapter(
    small_qwen: Path, caches: Path, adapters: dict[str, Path], pooling: str
) -> None:
    """Beside each other, and after the same text without it has filled the prefix cache."""
    names = (None, "first", "second")
    options = {"max_model_len": 256, "enable_lora": True, "max_loras": 2, "pooling": pooling}
    with LLM(str(small_qwen), **options) as llm:
        outputs = llm.embed([TEXT] * 3, lora_request=[request(adapters, n) for n in names])
        vectors = [output.outputs.embedding for output in outputs]
        assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
        assert not np.allclose(vectors[1], vectors[2], atol=1e-3)
        for name, vector in zip(names, vectors, strict=True):
            [alone] = llm.embed(TEXT, lora_request=request(adapters, name))
            assert np.array_equal(alone.outputs.embedding, vector), name
        [score] = llm.score(TEXT, TEXT, lora_request=request(adapters, "first"))
        assert score.outputs.score == pytest.approx(1)


def test_what_cannot_be_asked_is_refused(
    small_qwen: Path, caches: Path, adapters: dict[str, Path]
) -> None:
    asked = request(adapters, "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenmill.models.loader.memory_available_bytes", lambda: 2**20)
        with pytest.raises(CapacityError, match="lower max_loras or max_lora_rank"):
            LLM(str(small_qwen), enable_lora=True, max_loras=8)
    with (
        LLM(str(small_qwen), max_model_len=256) as llm,
        pytest.raises(UsageError, match="enable_lora"),
    ):
        llm.generate(TEXT, GREEDY, lora_request=asked)
    with LLM(str(small_qwen), max_model_len=256, enable_lora=True, max_lora_rank=8) as llm:
        with pytest.raises(UsageError, match="max_lora_rank is 8"):
            llm.load_adapter("second", str(adapters["second"]))
        with pytest.raises(UsageError, match="no adapter 'nobody'"):
            llm.generate(TEXT, GREEDY, lora_request=LoRARequest("nobody"))
        with pytest.raises(UsageError, match="2 lora_requests for 1 prompts"):
            llm.generate(TEXT, GREEDY, lora_request=[None, None])
        llm.load_adapter("first", str(adapters["first"]))
        with pytest.raises(UsageError, match="is loaded from"):
            llm.generate(TEXT, GREEDY, lora_request=LoRARequest("first", 2, "/elsewhere"))


# -- the server


@pytest.fixture(scope="module")
def server(small_qwen: Path, caches: Path, adapters: dict[str, Path]) -> Iterator[ServerProcess]:
    flags = ("--served-model-name", "small", "--max-model-len", "256", "--api-key", "sesame")
    lora = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"first={adapters['first']}")
    with serving(small_qwen, caches, *flags, *lora) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with strict_client(server.url, "sesame") as made:
        yield made


def complete(client: OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt=TEXT, temperature=0, max_tokens=12)
    assert answer.model == model
    return answer.choices[0].text


def load(client: OpenAI, name: str, path: Path) -> None:
    body = {"lora_name": name, "lora_path": str(path)}
    said = client.post("/load_lora_adapter", body=body, cast_to=str)
    assert said == f"Success: LoRA adapter '{name}' added successfully."


def test_the_client_chooses_an_adapter_by_the_name_of_the_model(
    client: OpenAI, server: ServerProcess, adapters: dict[str, Path]
) -> None:
    assert any("2 adapters of rank 16 at a time" in line for line in server.lines)
    load(client, "other", adapters["second"])
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["small", "first", "other"]
    assert [card.parent for card in cards.values()] == [None, "small", "small"]
    texts = [complete(client, name) for name in cards]
    assert len(set(texts)) == 3
    body = {"lora_name": "other"}
    client.post("/unload_lora_adapter", body=body, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        complete(client, "other")
    with pytest.raises(openai.NotFoundError):
        client.post("/unload_lora_adapter", body=body, cast_to=str)
    load(client, "twin", adapters["twin"])
    assert complete(client, "twin") == texts[1]


def test_an_adapter_that_cannot_be_read_is_refused_in_one_line(
    client: OpenAI, adapters: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((adapters["first"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    body = {"lora_name": "dora", "lora_path": str(tmp_path)}
    with pytest.raises(openai.BadRequestError, match="use_dora is True, supported is False"):
        client.post("/load_lora_adapter", body=body, cast_to=str)
    with pytest.raises(openai.NotFoundError, match="no such folder"):
        client.post("/load_lora_adapter", body=body | {"lora_path": "/nowhere"}, cast_to=str)


# -- the command line


def test_run_takes_an_adapter(small_qwen: Path, caches: Path, adapters: dict[str, Path]) -> None:
    import subprocess

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, "run", "hello", "--model", str(small_qwen), "--json", "--raw", *flags],
            env=environment(caches),
            capture_output=True,
            text=True,
            check=False,
        )

    fixed = ("--temperature", "0", "--max-tokens", "8", "--max-model-len", "256")
    plain, adapted = run(*fixed), run(*fixed, "--lora", str(adapters["second"]))
    assert plain.returncode == adapted.returncode == 0, adapted.stderr
    assert json.loads(plain.stdout)["token_ids"] != json.loads(adapted.stdout)["token_ids"]
    missing = run(*fixed, "--lora", "/nowhere")
    assert missing.returncode == 2
    assert "no such folder" in missing.stderr
    assert "Traceback" not in missing.stderr
