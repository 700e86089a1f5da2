"""The Python interface: a model by name, prompts in, text out."""

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from tokenmill.backends.base import BLOCK_SIZE, StepLimits
from tokenmill.config import EngineConfig
from tokenmill.engine.adapters import Adapters, LoRARequest
from tokenmill.engine.draft_model import DraftModel
from tokenmill.engine.embedder import Embedder
from tokenmill.engine.embedding import (
    EmbeddingRequestOutput,
    Pairs,
    ScoringRequestOutput,
    embedding_output,
)
from tokenmill.engine.engine import Engine
from tokenmill.engine.intake import Intake
from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.pooling import why_no_text
from tokenmill.engine.prompt_budget import PromptBudget
from tokenmill.engine.prompts import (
    Conversation,
    Prompt,
    Prompts,
    conversation_list,
    prompt_list,
)
from tokenmill.engine.request import Delivery, EngineDeadError, Event, Request, Sink
from tokenmill.engine.speculation import NgramDrafter, Speculator
from tokenmill.errors import UsageError
from tokenmill.sampling.params import SamplingParams
from tokenmill.sampling.pooling import PoolingParams

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter
    from tokenmill.models.loader import LoadedModel
    from tokenmill.models.progress import Progress

LoRARequests: TypeAlias = LoRARequest | Sequence[LoRARequest | None] | None
"""An adapter for all prompts, or one or none for each."""

_LEAST_PROMPT_SHARE = 16
"""Of the tokens of a step, one in so many may be a prompt's, however long that takes."""


class LLM:
    """A loaded model with its engine. Any thread may use it; `close` it, or use `with`.

    The arguments are those of EngineConfig. `progress` hears how loading goes. `loaded` is a
    model that is loaded already, which the LLM takes over.
    Raises the TokenmillError that says why the model cannot be found, read or held.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        quantization: str = "auto",
        activations: str = "bf16",
        kv_cache: str = "auto",
        threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        target_itl_ms: float | None = None,
        speculative: str = "off",
        num_speculative_tokens: int = 4,
        max_waiting: int | None = None,
        pooling: str = "auto",
        normalize: bool | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_cpu_loras: int | None = None,
        max_lora_rank: int = 16,
        offline: bool = False,
        progress: "Progress | None" = None,
        loaded: "LoadedModel | None" = None,
    ) -> None:
        self.config = EngineConfig(
            model=model,
            quantization=quantization,
            activations=activations,
            kv_cache=kv_cache,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            target_itl_ms=target_itl_ms,
            speculative=speculative,
            num_speculative_tokens=num_speculative_tokens,
            max_waiting=max_waiting,
            pooling=pooling,
            normalize=normalize,
            enable_lora=enable_lora,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
            max_lora_rank=max_lora_rank,
            offline=offline,
        )
        self.loaded = loaded or _load(self.config, progress)
        limits = self.loaded.compiled.limits
        self.draft: LoadedModel | None = None  # the model that guesses for it
        try:
            self.default_params()  # what the model recommends may be nonsense
            speculator = self._speculator(limits, progress)
        except BaseException:
            self.loaded.compiled.close()
            raise
        self.max_model_len = min(
            max_model_len or self.loaded.config.context_length,
            self.loaded.config.context_length,
            limits.blocks_per_sequence * BLOCK_SIZE,
        )
        self._intake = Intake(
            self.loaded.tokenizer,
            limits,
            max_model_len=min(
                max_model_len or self.loaded.config.context_length,
                self.loaded.config.context_length,
            ),
            longest_model_len=self.loaded.config.longest_context,
        )
        self.embedder = Embedder(self.loaded, self.config, self._intake, self.max_model_len)
        self.engine = Engine(
            self.loaded.compiled,
            has_prefix_cache=enable_prefix_caching,
            speculator=speculator,
            prompt_budget=_prompt_budget(target_itl_ms, limits),
            max_waiting=max_waiting,
        )
        self.adapters = Adapters(
            self.loaded.adapter_reader,
            most_in_memory=self.config.adapters_in_memory,
            is_used=self.engine.uses,
        )
        self._close = weakref.finalize(self, self.engine.close)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        progress: "Progress | None" = None,
        loaded: "LoadedModel | None" = None,
    ) -> Self:
        """The same, from a configuration."""
        return cls(**asdict(config), progress=progress, loaded=loaded)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        lora_request: LoRARequests = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all at the same time; the outputs come in the order of the prompts.

        A prompt is a text, a list of token ids, or {"prompt": text} or {"prompt_token_ids": ids}.
        `sampling_params` is one for all or one each, and so is `lora_request`, the adapters.
        `progress(finished, total)` is called as prompts finish. Interrupted (Ctrl-C), it aborts its
        own requests and leaves the LLM usable.
        Raises UsageError or CapacityError that names the prompt, before anything runs.
        """
        listed = prompt_list(prompts)
        params = self._params_list(sampling_params, len(listed))
        adapters = self._adapter_list(lora_request, len(listed))
        events: SimpleQueue[list[Delivery]] = SimpleQueue()
        requests = [
            self.make_request(
                prompt,
                params[index],
                name=f"prompt {index}",
                sink=events.put,
                adapter=adapters[index],
            )
            for index, prompt in enumerate(listed)
        ]
        return self._outputs(requests, events, progress)

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequests = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of prompts, in their order; a prompt may have the forms of `generate`.

        By default pooled as the model's files or `pooling` and `normalize` say. `prompt_name` asks
        for one of the model's own prompts before each text ("": for none). Of a longer prompt the
        first `truncate_prompt_tokens` are taken; -1: as many as the model takes.
        Raises UsageError or CapacityError that names the prompt, before anything runs.
        """
        params = self.embedder.params() if pooling_params is None else pooling_params
        self.embedder.check(params)
        longest = self.embedder.longest(truncate_prompt_tokens)
        prefix = self.embedder.prefix(prompt_name)
        listed = prompt_list(prompts)
        adapters = self._adapter_list(lora_request, len(listed))
        events: SimpleQueue[list[Delivery]] = SimpleQueue()
        requests = [
            self.embedder.request(
                prompt,
                params,
                name=f"prompt {index}",
                sink=events.put,
                longest=longest,
                prefix=prefix,
                adapter=adapters[index],
            )
            for index, prompt in enumerate(listed)
        ]
        outputs = self._pooled_outputs(requests, events, progress)
        return [embedding_output(o, self.embedder.vector(o, params)) for o in outputs]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: one with each of many, or those of two lists of one length in turn.

        A cross-encoder reads both together and its scores lie between 0 and 1; of any other model
        it is the cosine of two embeddings. Raises UsageError or CapacityError.
        """
        pairs = Pairs.of(text_1, text_2)
        longest = self.embedder.longest(truncate_prompt_tokens)
        events: SimpleQueue[list[Delivery]] = SimpleQueue()
        adapter = self.adapters.resolve(lora_request)
        requests = self.embedder.score_requests(
            pairs, sink=events.put, longest=longest, adapter=adapter
        )
        return self.embedder.scores(pairs, self._pooled_outputs(requests, events, None))

    def _pooled_outputs(
        self,
        requests: list[Request],
        events: "SimpleQueue[list[Delivery]]",
        progress: Callable[[int, int], None] | None,
    ) -> list[RequestOutput]:
        """Run requests whose states are wanted."""
        # In the caller's thread, so that what fails here fails for this caller alone.
        self.loaded.compiled.prepare_pooling()
        return self._outputs(requests, events, progress, in_turn=True)

    def _outputs(
        self,
        requests: list[Request],
        events: "SimpleQueue[list[Delivery]]",
        progress: Callable[[int, int], None] | None,
        *,
        in_turn: bool = False,
    ) -> list[RequestOutput]:
        """Run requests that tell `events` of them, to their ends."""
        outputs: dict[Request, RequestOutput] = {}
        try:
            self.engine.submit(requests, in_turn=in_turn)
            while len(outputs) < len(requests):
                for request, event in events.get():
                    outputs[request] = _finished(event)
                    if progress:
                        progress(len(outputs), len(requests))
        finally:
            self.engine.abort(requests)
        return [outputs[request] for request in requests]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        lora_request: LoRARequests = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; a message is {"role": ..., "content": ...}."""
        prompts = [self.apply_chat_template(each) for each in conversation_list(messages)]
        return self.generate(prompts, sampling_params, progress=progress, lora_request=lora_request)

    def apply_chat_template(self, messages: Conversation) -> list[int]:
        """The prompt, as token ids, that asks the model for the next message."""
        template = self.loaded.chat_template
        if template is None:
            raise UsageError("this model has no chat template: use generate with a plain prompt")
        return self.loaded.tokenizer.encode(template.render(messages), add_special_tokens=False)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Generator[OutputDelta, None, None]:
        """Complete one prompt, piece by piece; closing the iterator ends the request.

        Errors in the arguments are raised here; the request starts with the first `next`.
        """
        events: SimpleQueue[list[Delivery]] = SimpleQueue()
        adapter = self.adapters.resolve(lora_request)
        request = self.make_request(
            prompt, params, sink=events.put, is_streaming=True, adapter=adapter
        )
        return self._follow(request, events)

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sink: Sink,
        name: str = "the prompt",
        request_id: str | None = None,
        is_streaming: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        adapter: "Adapter | None" = None,
    ) -> Request:
        """A request for `engine.submit`, which tells `sink` of it.

        The lower its `priority`, the sooner it runs. It finds the beginning of its prompt only in
        the cache of requests with the same `cache_salt`. `name` begins the messages of errors:
        UsageError or CapacityError where the request could never run.
        """
        return self._intake.make_request(
            prompt,
            self.default_params() if params is None else params,
            sink=sink,
            name=name,
            request_id=request_id,
            is_streaming=is_streaming,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )

    def load_adapter(self, name: str, path: str) -> "Adapter":
        """Load a LoRA adapter from a folder that PEFT has saved, while requests run or not.

        Raises the TokenmillError that says why it cannot be; AdapterExistsError for a name that
        is taken.
        """
        return self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter at once, and wait until the requests that have it have ended."""
        if adapter := self.adapters.unload(name):
            self.engine.wait_unused(adapter)

    def default_params(
        self, fallback: Mapping[str, object] | None = None, /, **given: object
    ) -> SamplingParams:
        """Parameters from what is given, and for the rest what the model's makers recommend.

        Where they recommend nothing, `fallback` holds.
        """
        return SamplingParams.with_defaults(self.loaded.generation_defaults, fallback, **given)

    def warm_up(self) -> None:
        """Compile what steps of all sizes need, so that no request waits for it."""
        self.loaded.compiled.warm_up(pools=self.embedder.is_expected)
        if self.draft is not None:
            self.draft.compiled.warm_up()

    def close(self) -> None:
        """Abort what runs and free the model; a second call does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _speculator(self, limits: StepLimits, progress: "Progress | None") -> Speculator | None:
        """Who guesses ahead, if anybody."""
        num_tokens = self.config.num_speculative_tokens
        if self.config.speculative != "off" and (reason := why_no_text(limits)):
            raise UsageError(f"speculative is {self.config.speculative!r}, but {reason}")
        if self.config.speculative == "off":
            return None
        if self.config.speculative == "ngram":
            return Speculator(NgramDrafter(), num_tokens)
        config = replace(
            self.config,
            model=self.config.speculative,
            speculative="off",
            max_model_len=None,
            kv_cache_memory_bytes=None,
            enable_lora=False,  # guesses need not be the adapter's to be taken or left rightly
        )
        self.draft = _load(config, progress, target=limits)
        try:
            if reason := why_no_text(self.draft.compiled.limits):
                raise UsageError(f"speculative is {config.model!r}, but {reason}")
            return Speculator(DraftModel(self.draft.compiled, limits), num_tokens)
        except BaseException:
            self.draft.compiled.close()
            raise

    def _follow(
        self, request: Request, events: "SimpleQueue[list[Delivery]]"
    ) -> Generator[OutputDelta, None, None]:
        try:
            self.engine.submit([request])
            while True:
                for _, event in events.get():
                    if isinstance(event, EngineDeadError):
                        raise event
                    yield event
                    if event.output is not None:
                        return
        finally:
            self.engine.abort([request])

    def _adapter_list(self, lora_request: LoRARequests, count: int) -> "list[Adapter | None]":
        if lora_request is None or isinstance(lora_request, LoRARequest):
            return [self.adapters.resolve(lora_request)] * count
        if len(lora_request) != count:
            raise UsageError(f"{len(lora_request)} lora_requests for {count} prompts: one each")
        found = {each: self.adapters.resolve(each) for each in dict.fromkeys(lora_request)}
        return [found[each] for each in lora_request]

    def _params_list(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:
            return [self.default_params()] * count
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise UsageError("sampling_params must be a SamplingParams or a list of them")
        if len(sampling_params) != count:
            raise UsageError(
                f"{len(sampling_params)} sampling_params for {count} prompts: one each"
            )
        return sampling_params


def _finished(event: Event) -> RequestOutput:
    """The output of a request of which nothing but its end is delivered."""
    if isinstance(event, EngineDeadError):
        raise event
    assert event.output is not None
    return event.output


def _load(
    config: EngineConfig, progress: "Progress | None", target: StepLimits | None = None
) -> "LoadedModel":
    from tokenmill.models.loader import load_model

    return load_model(config, progress=progress, target=target)


def _prompt_budget(target_itl_ms: float | None, limits: StepLimits) -> PromptBudget | None:
    if target_itl_ms is None:
        return None
    return PromptBudget(target_itl_ms / 1e3, max(1, limits.tokens // _LEAST_PROMPT_SHARE))
