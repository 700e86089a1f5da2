"""The flags that concern adapters."""

import io
from pathlib import Path

import pytest
from fake_llm import FakeLLM

from tests.e2e.adapter_files import write_adapter
from tokenmill.cli.main import main
from tokenmill.config import EngineConfig
from tokenmill.engine.adapters import LoRARequest
from tokenmill.errors import UsageError
from tokenmill.server.config import ServerConfig, read_lora_modules

MODULES = {"model.layers.0.self_attn.q_proj": (8, 8)}


@pytest.mark.parametrize(
    "given", ["sql=/a/b=c", '{"name": "sql", "path": "/a/b=c", "base_model_name": "m"}']
)
def test_modules_are_given_in_either_form(given: str) -> None:
    assert read_lora_modules([given]) == (("sql", "/a/b=c"),)


@pytest.mark.parametrize(
    "given",
    ["sql", "=/a", "sql=", "{", "{}", '{"name": "sql"}', '{"name": "a", "path": "b", "x": 1}'],
)
def test_anything_else_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--lora-modules is given"):
        read_lora_modules([given])


def test_names_must_differ() -> None:
    for modules in ((("a", "/1"), ("a", "/2")), (("m", "/1"),)):
        with pytest.raises(UsageError, match="is the name of two"):
            ServerConfig(model_names=("m",), lora_modules=modules)
    ServerConfig(model_names=("m",), lora_modules=(("a", "/1"), ("b", "/1")))


@pytest.mark.parametrize("name", ["max_loras", "max_lora_rank"])
@pytest.mark.parametrize("value", [0, -1, 1025, True, 1.5])
def test_counts_are_bounded(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_memory_holds_at_least_what_one_step_may_use() -> None:
    with pytest.raises(UsageError, match=r"max_cpu_loras is 3, but must be .* at least 4"):
        EngineConfig(max_loras=4, max_cpu_loras=3)
    assert EngineConfig(max_loras=4, max_cpu_loras=4).adapters_in_memory == 4
    assert EngineConfig(max_loras=64).adapters_in_memory == 64
    assert EngineConfig().adapters_in_memory == 16


def test_modules_need_the_switch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["serve", "--lora-modules", "a=/1"])
    assert exited.value.code == 2
    assert capsys.readouterr().err.strip().endswith("--lora-modules needs --enable-lora")


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_command_asks_with_its_adapter(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = FakeLLM()
    monkeypatch.setattr(f"tokenmill.cli.{command}.open_llm", llm.open)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    folder = write_adapter(tmp_path / "sql", MODULES, rank=24)
    arguments = [command, *(["hello"] if command == "run" else []), "--lora", str(folder)]
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0
    assert llm.lora_requests == [LoRARequest("sql", 1, str(folder))]
    [config] = llm.configs
    assert (config.enable_lora, config.max_loras, config.max_lora_rank) == (True, 1, 24)
