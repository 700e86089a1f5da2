"""A real server on a real port, whose engine runs a fake model with a small real tokenizer."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_model import STATE_SIZE, FakeModel, make_adapter, make_limits
from tiny_tokenizers import gguf_metadata

from tokenmill import LLM
from tokenmill.backends.base import StepOutput
from tokenmill.errors import ModelNotFoundError
from tokenmill.models.adapters import Adapter
from tokenmill.models.sentence_transformers import Pooling
from tokenmill.models.text.chat import ChatTemplate
from tokenmill.models.text.load import load_tokenizer
from tokenmill.server import serving
from tokenmill.server.config import ServerConfig
from tokenmill.server.service import Service

MODEL = "fake"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra }}"
)
TOKENIZER = load_tokenizer(gguf_metadata(chat_template=None))


@dataclass(eq=False)
class PacedModel(FakeModel):
    """Takes a while for each step; a test can hold one back."""

    step_s: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate.set()

    def wait(self) -> StepOutput:
        self.gate.wait(timeout=20)
        time.sleep(self.step_s)
        return super().wait()


@dataclass(kw_only=True)
class Running:
    """The server, and a client of it."""

    url: str
    model: PacedModel
    service: Service
    server: serving.Server
    client: httpx.Client
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.client.post(path, json=fields)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", **{"messages": messages, **fields})

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", prompt=prompt, **fields)

    def refuse(self, response: httpx.Response, status: int = 400) -> dict[str, Any]:
        """The error of an answer that must be one."""
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def tell(self) -> None:
        """What a SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def wait_until_idle(self) -> None:
        """Until nothing is running, with all blocks free."""
        engine = self.service.llm.engine
        wait_for(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)
        wait_for(lambda: engine.stats().num_used_blocks == 0 and not self.service.bridge.num_live)


def wait_for(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < give_up_s, "it never came true"
        time.sleep(0.005)


class FakeReader:
    """Reads an adapter from any file, which stands for its content."""

    def read(self, name: str, path: Path) -> Adapter:
        if not os.path.isfile(path):
            raise ModelNotFoundError(f"{path}: no such folder")
        return replace(make_adapter(name, path.read_text()), path=str(path))


def make_llm(model: PacedModel, **options: Any) -> LLM:
    loaded = SimpleNamespace(
        compiled=model,
        tokenizer=TOKENIZER,
        chat_template=ChatTemplate(TEMPLATE),
        generation_defaults={},
        adapter_reader=FakeReader() if model.limits.adapter_slots else None,
        pooling=Pooling(kind="last"),
        config=SimpleNamespace(
            context_length=10_000, longest_context=10_000, encoder=None, hidden_size=STATE_SIZE
        ),
    )
    return LLM(MODEL, loaded=loaded, **options)


@contextlib.contextmanager
def running_server(
    *,
    step_s: float = 0.0,
    fail_at_step: int | None = None,
    max_waiting: int | None = None,
    adapter_slots: int = 0,
    max_cpu_loras: int | None = None,
    headers: dict[str, str] | None = None,
    **config: Any,
) -> Iterator[Running]:
    limits = make_limits(
        blocks=64,
        blocks_per_sequence=32,
        vocab_size=TOKENIZER.vocab_size,
        adapter_slots=adapter_slots,
    )
    model = PacedModel(limits, step_s=step_s, fail_at_step=fail_at_step)
    llm = make_llm(model, max_waiting=max_waiting, max_cpu_loras=max_cpu_loras)
    settings = ServerConfig(**{"model_names": (MODEL, "alias"), **config})
    bound = serving.bind("127.0.0.1", 0)
    is_ready, kept = threading.Event(), SimpleNamespace()

    async def main() -> None:
        kept.loop = asyncio.get_running_loop()
        kept.service = serving.make_service(llm, settings)
        kept.server = serving.Server(kept.service)
        await kept.server.serve_until_told(bound, is_ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert is_ready.wait(20)
    url = serving.address_of(bound)
    with httpx.Client(base_url=url, timeout=20, headers=headers) as client:
        running = Running(
            url=url,
            model=model,
            service=kept.service,
            server=kept.server,
            client=client,
            loop=kept.loop,
        )
        try:
            yield running
        finally:
            model.gate.set()
            client.close()
            running.tell()
            running.tell()
            thread.join(20)
            llm.close()
    assert not thread.is_alive()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must have ended well."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
