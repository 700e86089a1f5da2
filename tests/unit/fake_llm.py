"""An LLM without a model, for tests of the commands; run as a program, it is `tokenmill` with it.

A token is a character. It answers with "<" + the prompt + ">"; the word "endless" in the prompt
makes it go on, with a pause after each token, until it is stopped.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Self

from tokenmill.config import EngineConfig
from tokenmill.engine.adapters import LoRARequest
from tokenmill.engine.outputs import (
    CompletionOutput,
    FinishReason,
    OutputDelta,
    RequestOutput,
    Timings,
)
from tokenmill.sampling.params import SamplingParams

PAUSE_S = 0.02


class FakeLLM:
    def __init__(self, *, has_template: bool = True, max_model_len: int = 10_000) -> None:
        self.loaded = SimpleNamespace(chat_template="template" if has_template else None)
        self.max_model_len = max_model_len
        self.generation_config: dict[str, object] = {}
        self.configs: list[EngineConfig] = []
        self.params: list[SamplingParams] = []
        self.lora_requests: list[LoRARequest | None] = []
        self.num_aborted = 0
        self.is_closed = False

    def open(self, config: EngineConfig) -> Self:
        self.configs.append(config)
        return self

    def default_params(
        self, fallback: Mapping[str, object] | None = None, /, **given: object
    ) -> SamplingParams:
        return SamplingParams.with_defaults(self.generation_config, fallback, **given)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        text = "|".join(f"{message['role'][0]}:{message['content']}" for message in messages)
        return [ord(char) for char in text]

    def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Iterator[OutputDelta]:
        self.lora_requests.append(lora_request)
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        self.params.append(params)
        return self._answer(text, params)

    def _answer(self, prompt: str, params: SamplingParams) -> Iterator[OutputDelta]:
        said = ""
        try:
            for char in self._characters(prompt):
                said += char
                if len(said) == params.max_tokens:
                    break
                yield OutputDelta(text=char, token_ids=[ord(char)])
            reason: FinishReason = "length" if len(said) == params.max_tokens else "stop"
            last = said[-1:] if reason == "length" else ""
            output = RequestOutput(
                request_id="request-0",
                prompt=None,
                prompt_token_ids=[ord(char) for char in prompt],
                outputs=[
                    CompletionOutput(
                        index=0,
                        text=said,
                        token_ids=[ord(char) for char in said],
                        logprobs=None,
                        finish_reason=reason,
                        stop_reason=None,
                    )
                ],
                timings=Timings(first_token_s=0.5, total_s=1.5),
            )
            yield OutputDelta(
                text=last, token_ids=[ord(c) for c in last], finish_reason=reason, output=output
            )
        except GeneratorExit:
            self.num_aborted += 1
            raise

    def _characters(self, prompt: str) -> Iterator[str]:
        yield from f"<{prompt}>"
        while "endless" in prompt:
            time.sleep(PAUSE_S)
            yield "."

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.is_closed = True


def main() -> None:
    from tokenmill.cli import chat, run
    from tokenmill.cli.main import main as tokenmill

    llm = FakeLLM()
    run.open_llm = chat.open_llm = llm.open  # type: ignore[assignment]
    try:
        tokenmill(sys.argv[1:])
    finally:
        print(f"[aborted {llm.num_aborted}, closed {llm.is_closed}]", file=sys.stderr)


if __name__ == "__main__":
    main()
