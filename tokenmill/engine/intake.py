"""From what a user asks for to a request that the engine can run."""

import itertools
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from tokenmill.backends.base import StepLimits
from tokenmill.engine.prompts import Prompt, prompt_text_and_ids
from tokenmill.engine.request import Request, Sample, Sink
from tokenmill.engine.sequence import longest_prompt, make_sequence
from tokenmill.engine.text_stream import TextStream
from tokenmill.sampling.logit_rules import bad_word_ids
from tokenmill.sampling.params import SamplingParams, sequence_seed

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter
    from tokenmill.models.tokenizer import Tokenizer


class Intake:
    """Makes requests for one model."""

    def __init__(self, tokenizer: "Tokenizer", limits: StepLimits, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_model_len = max_model_len
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
        from tokenmill.models.detokenizer import Detokenizer

        return TextStream(
            Detokenizer(self._tokenizer, params.skip_special_tokens, is_continuation=True),
            vocab_size=self._tokenizer.vocab_size,
            stop=params.stop,
            includes_stop=params.include_stop_str_in_output,
        )
