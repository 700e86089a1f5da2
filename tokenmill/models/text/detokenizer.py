"""Token ids to text as they arrive, never half a character at a time."""

import codecs
from collections.abc import Iterable

from tokenmill.models.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of token ids into pieces of text.

    A character whose bytes are spread over several tokens is held back until the last of them
    arrives. All pieces together are `tokenizer.decode` of all ids. With `is_continuation` the
    ids go on from a text before them, so that a space which begins them is always kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        is_continuation: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.drops_first_space and not is_continuation

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete, perhaps none yet.

        Raises UsageError for an id outside the vocabulary; nothing is then consumed.
        """
        data = b"".join(self._tokenizer.pieces(ids, self._skip_special_tokens))
        if data and self._drops_space:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD where the last character never became complete."""
        return self._utf8.decode(b"", final=True)
