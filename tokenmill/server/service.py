"""What the routes share: the model, the way to its engine, and how bodies become requests."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenmill.engine.adapters import KnownAdapter, UnknownAdapterError
from tokenmill.engine.llm import LLM
from tokenmill.engine.outputs import RequestOutput
from tokenmill.engine.pooling import why_no_text
from tokenmill.engine.request import Request
from tokenmill.errors import ModelNotFoundError
from tokenmill.sampling.params import SamplingParams
from tokenmill.server.bridge import Bridge
from tokenmill.server.config import ServerConfig
from tokenmill.server.errors import ApiError, refused
from tokenmill.server.life import Life
from tokenmill.server.meters import Meters
from tokenmill.server.prompting import LONG, Encoder
from tokenmill.server.requests import GenerationBody

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter

_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("allowed_token_ids", "bad_words", "prompt_logprobs", "truncate_prompt_tokens"),
)


_REQUEST_SIZE = 64
"""Making a request takes as long as looking at so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One model, served."""

    llm: LLM
    config: ServerConfig
    life: Life
    bridge: Bridge
    encoder: Encoder
    meters: Meters
    started: int = field(default_factory=lambda: int(time.time()))
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _can_pool: asyncio.Event = field(default_factory=asyncio.Event)

    def model_name(self, asked: str | None) -> str:
        """The name by which a request knows the model; ApiError where it means another."""
        if asked is None:
            return self.config.model_names[0]
        self.known_adapter(asked)
        return asked

    def known_adapter(self, asked: str | None) -> KnownAdapter | None:
        """The adapter that a request asks for as its model; ApiError for a name of nothing."""
        if asked is None or asked in self.config.model_names:
            return None
        found = self.llm.adapters.find(asked)
        if found is None:
            adapters = (adapter.name for adapter in self.llm.adapters.known())
            known = ", ".join((*self.config.model_names, *adapters))
            text = f"model is {asked!r}, but this server has only {known}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return found

    async def adapter(self, asked: str | None) -> "Adapter | None":
        """The same, in memory: one that had to make way is read beside the event loop.

        Raises ApiError, or the TokenmillError that says why it cannot be read.
        """
        known = self.known_adapter(asked)
        if known is None:
            return None
        adapters = self.llm.adapters
        if adapter := adapters.in_memory(known.name):
            return adapter
        try:
            return await self.encoder.apart(lambda: adapters.get(known.name), LONG + 1)
        except (ModelNotFoundError, UnknownAdapterError) as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error

    def params(
        self, body: GenerationBody, *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Sampling parameters of a body, over those of the model's generation_config.json."""
        if reason := why_no_text(self.llm.loaded.compiled.limits):
            text = f"{reason}: use /v1/embeddings or /v1/score"
            raise ApiError(400, text, param="model", code="unsupported_operation")
        given: dict[str, Any] = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        if body.logit_bias is not None:
            given["logit_bias"] = {int(key): bias for key, bias in body.logit_bias.items()}
        most = self.llm.loaded.generation_defaults.get("max_new_tokens")
        if isinstance(most, int):  # requests may only lower it, as in vLLM
            max_tokens = most if max_tokens is None else min(max_tokens, most)
        return self.llm.default_params(**given, max_tokens=max_tokens, logprobs=logprobs)

    async def prepare_pooling(self) -> None:
        """Have ready what embeddings need; who asks for the first may wait, and nobody else."""
        async with self._preparing:
            if not self._can_pool.is_set():
                await asyncio.to_thread(self.llm.loaded.compiled.warm_up, pools=True)
                self._can_pool.set()

    def check_count(self, body: GenerationBody, num_prompts: int) -> None:
        """UsageError, before anything is made of them, for more than could ever wait together."""
        self.llm.engine.check_count(num_prompts, body.n or 1)

    async def requests(
        self, body: GenerationBody, prompts: Sequence[list[int]], params: SamplingParams, name: str
    ) -> list[Request]:
        """Requests for the engine, one a prompt; UsageError where one cannot be served."""
        check_together(body)
        adapter = await self.adapter(body.model)
        size = sum(map(len, prompts)) * params.n + _REQUEST_SIZE * len(prompts) * params.n
        return await self.encoder.apart(
            lambda: self._made(body, prompts, params, name, adapter), size
        )

    def _made(
        self,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        name: str,
        adapter: "Adapter | None",
    ) -> list[Request]:
        return [
            self.llm.make_request(
                ids,
                params,
                sink=self.bridge.sink,
                name=name if len(prompts) == 1 else f"{name}[{index}]",
                request_id=body.request_id,
                is_streaming=bool(body.stream),
                priority=body.priority,
                cache_salt=body.cache_salt or "",
                adapter=adapter,
            )
            for index, ids in enumerate(prompts)
        ]


def check_together(body: GenerationBody) -> None:
    """Refuse fields that do not go together; ApiError."""
    if body.best_of not in (None, 1, body.n):
        raise refused("best_of", "best_of is supported only as 1 or equal to n")
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "stream_options needs stream: true")
    if body.prompt_logprobs is not None and body.stream:
        raise refused("prompt_logprobs", "prompt_logprobs is not supported with stream: true")


@dataclass(kw_only=True)
class UsageCount:
    """Tokens of one HTTP call, as they come."""

    requests: Sequence[Request]
    num_output_tokens: int = 0

    def body(self) -> dict[str, Any]:
        num_prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        num_cached = sum(request.num_cached_tokens for request in self.requests)
        return usage_body(num_prompt, num_cached, self.num_output_tokens)


def usage_of(outputs: Sequence[RequestOutput], *, discard_output: bool = False) -> dict[str, Any]:
    """The `usage` of a whole answer."""
    return usage_body(
        sum(output.num_prompt_tokens for output in outputs),
        sum(output.num_cached_tokens for output in outputs),
        0 if discard_output else sum(output.num_output_tokens for output in outputs),
    )


def usage_body(num_prompt: int, num_cached: int, num_output: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
