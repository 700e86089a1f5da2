"""The Python interface: a model by name, prompts in, text out."""

import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.prompts import (
    Conversation,
    Prompt,
    Prompts,
    conversation_list,
    prompt_list,
    prompt_text_and_ids,
)
from tokenmill.engine.request import Request
from tokenmill.engine.sequence import make_sequence
from tokenmill.engine.text_stream import TextStream
from tokenmill.errors import UsageError
from tokenmill.sampling.params import SamplingParams, sequence_seed

if TYPE_CHECKING:
    from tokenmill.models.loader import LoadedModel
    from tokenmill.models.progress import Progress


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
        offline: bool = False,
        progress: "Progress | None" = None,
        loaded: "LoadedModel | None" = None,
    ) -> None:
        config = EngineConfig(
            model=model,
            quantization=quantization,
            activations=activations,
            kv_cache=kv_cache,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            offline=offline,
        )
        self.loaded = loaded or _load(config, progress)
        self._limits = self.loaded.compiled.limits
        self.max_model_len = min(
            max_model_len or self.loaded.config.context_length,
            self.loaded.config.context_length,
            self._limits.blocks_per_sequence * BLOCK_SIZE,
        )
        self._engine = Engine(self.loaded.compiled)
        self._close = weakref.finalize(self, self._engine.close)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all at the same time; the outputs come in the order of the prompts.

        A prompt is a text, a list of token ids, or {"prompt": text} or {"prompt_token_ids": ids}.
        `sampling_params` is one for all or one each. `progress(finished, total)` is called as
        prompts finish. Interrupted (Ctrl-C), it aborts its own requests and leaves the LLM usable.
        Raises UsageError or CapacityError that names the prompt, before anything runs.
        """
        listed = prompt_list(prompts)
        params = _params_list(sampling_params, len(listed))
        events: SimpleQueue[tuple[int, OutputDelta | Exception]] = SimpleQueue()
        requests = [
            self._request(
                prompt, params[index], name=f"prompt {index}", deliver=partial(_put, events, index)
            )
            for index, prompt in enumerate(listed)
        ]
        outputs: dict[int, RequestOutput] = {}
        try:
            self._engine.submit(requests)
            while len(outputs) < len(requests):
                index, event = events.get()
                if isinstance(event, Exception):
                    raise event
                assert event.output is not None
                outputs[index] = event.output
                if progress:
                    progress(len(outputs), len(requests))
        finally:
            self._engine.abort(requests)
        return [outputs[index] for index in range(len(requests))]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; a message is {"role": ..., "content": ...}."""
        prompts = [self.apply_chat_template(each) for each in conversation_list(messages)]
        return self.generate(prompts, sampling_params, progress=progress)

    def apply_chat_template(self, messages: Conversation) -> list[int]:
        """The prompt, as token ids, that asks the model for the next message."""
        template = self.loaded.chat_template
        if template is None:
            raise UsageError("this model has no chat template: use generate with a plain prompt")
        return self.loaded.tokenizer.encode(template.render(messages), add_special_tokens=False)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[OutputDelta, None, None]:
        """Complete one prompt, piece by piece; closing the iterator ends the request.

        Errors in the arguments are raised here; the request starts with the first `next`.
        """
        events: SimpleQueue[OutputDelta | Exception] = SimpleQueue()
        request = self._request(
            prompt,
            params or SamplingParams(),
            name="the prompt",
            deliver=events.put,
            is_streaming=True,
        )
        return self._follow(request, events)

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

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        name: str,
        deliver: Callable[[OutputDelta | Exception], None],
        is_streaming: bool = False,
    ) -> Request:
        from tokenmill.models.detokenizer import Detokenizer

        tokenizer = self.loaded.tokenizer
        text, ids = prompt_text_and_ids(name, prompt, tokenizer.encode)
        sequence = make_sequence(
            name,
            ids,
            params,
            seed=sequence_seed(params.seed, 0),
            eos_ids=tokenizer.eos_ids,
            limits=self._limits,
            max_model_len=self.max_model_len,
        )
        decoder = Detokenizer(tokenizer, params.skip_special_tokens, is_continuation=True)
        return Request(
            prompt=text,
            sequence=sequence,
            text=TextStream(decoder, vocab_size=tokenizer.vocab_size, stop=params.stop),
            deliver=deliver,
            is_streaming=is_streaming,
        )

    def _follow(
        self, request: Request, events: "SimpleQueue[OutputDelta | Exception]"
    ) -> Generator[OutputDelta, None, None]:
        try:
            self._engine.submit([request])
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._engine.abort([request])


def _load(config: EngineConfig, progress: "Progress | None") -> "LoadedModel":
    from tokenmill.models.loader import load_model

    return load_model(config, progress=progress)


def _put(
    events: SimpleQueue[tuple[int, OutputDelta | Exception]],
    index: int,
    event: OutputDelta | Exception,
) -> None:
    events.put((index, event))


def _params_list(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if not all(isinstance(params, SamplingParams) for params in sampling_params):
        raise UsageError("sampling_params must be a SamplingParams or a list of them")
    if len(sampling_params) != count:
        raise UsageError(f"{len(sampling_params)} sampling_params for {count} prompts: one each")
    return sampling_params
