"""From what a user asks for to a request that the engine can run."""

import itertools
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from tokenmill.backends.base import StepLimits
from tokenmill.engine.pooling import why_no_text
from tokenmill.engine.prompts import Prompt, prompt_text_and_ids
from tokenmill.engine.request import Request, Sample, Sink
from tokenmill.engine.sequence import longest_prompt, make_pooled_sequence, make_sequence
from tokenmill.engine.text_stream import TextStream
from tokenmill.errors import UsageError
from tokenmill.sampling.logit_rules import bad_word_ids
from tokenmill.sampling.params import SamplingParams, sequence_seed
from tokenmill.sampling.pooling import PoolingParams

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter
    from tokenmill.models.text.tokenizer import Tokenizer


class Intake:
    """Makes requests for one model."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        limits: StepLimits,
        max_model_len: int,
        longest_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_model_len = max_model_len
        self._longest_model_len = longest_model_len
        self._numbers = itertools.count()

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        sink: Sink,
        name: str,
        request_id: str | None = None,
        is_streaming: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        adapter: "Adapter | None" = None,
    ) -> Request:
        """A request with `params.n` samples; see LLM.make_request."""
        if reason := why_no_text(self._limits):
            raise UsageError(f"{reason}: ask for embeddings or scores")
        text, ids = prompt_text_and_ids(name, prompt, self._tokenizer.encode)
        ids = self._truncated(ids, params)
        first = make_sequence(
            name,
            ids,
            params,
            seed=sequence_seed(params.seed, 0),
            eos_ids=self._tokenizer.eos_ids,
            limits=self._limits,
            max_model_len=self._max_model_len,
            longest_model_len=self._longest_model_len,
            bad_words=bad_word_ids(params.bad_words, self._encode_plain),
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        seeds = [sequence_seed(params.seed, index) for index in range(1, params.n)]
        sequences = [first, *map(first.sibling, seeds)]
        return Request(
            request_id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=list(ids),
            params=params,
            samples=[
                Sample(index=index, sequence=sequence, text=self._text_stream(params))
                for index, sequence in enumerate(sequences)
            ],
            sink=sink,
            is_streaming=is_streaming,
        )

    def make_pooled_request(
        self,
        prompt: Prompt,
        params: PoolingParams,
        *,
        sink: Sink,
        name: str,
        second: str | None = None,
        longest: int | None = None,
        prefix: str = "",
        add_special_tokens: bool = True,
        request_id: str | None = None,
        priority: int = 0,
        adapter: "Adapter | None" = None,
    ) -> Request:
        """A request for `engine.submit`: for the embedding of a prompt, or of two texts together.

        A `prefix` stands before a text, and what is beyond `longest` tokens is cut from the end.
        Raises UsageError or CapacityError,
        which begin with `name`, where it could never run.
        """
        second_start = None

        def encode(text: str) -> list[int]:
            nonlocal second_start
            ids, second_start = self._tokenizer.encode_pair(
                prefix + text, second, longest=longest, add_special_tokens=add_special_tokens
            )
            return ids

        text, ids = prompt_text_and_ids(name, prompt, encode)
        ids = ids[:longest]
        sequence = make_pooled_sequence(
            name,
            ids,
            params,
            limits=self._limits,
            max_model_len=self._max_model_len,
            second_start=second_start,
            priority=priority,
            adapter=adapter,
        )
        silent = self._text_stream(sequence.params)
        return Request(
            request_id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=list(ids),
            params=sequence.params,
            samples=[Sample(index=0, sequence=sequence, text=silent)],
            sink=sink,
        )

    def _truncated(self, ids: SequenceOf[int], params: SamplingParams) -> SequenceOf[int]:
        """The end of a prompt that is longer than it may be."""
        longest = params.truncate_prompt_tokens
        if longest is None:
            return ids
        if longest == -1:
            longest = longest_prompt(self._limits, self._max_model_len)
        return ids[-longest:]

    def _encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text_stream(self, params: SamplingParams) -> TextStream:
        from tokenmill.models.text.detokenizer import Detokenizer

        return TextStream(
            Detokenizer(self._tokenizer, params.skip_special_tokens, is_continuation=True),
            vocab_size=self._tokenizer.vocab_size,
            stop=params.stop,
            includes_stop=params.include_stop_str_in_output,
        )
