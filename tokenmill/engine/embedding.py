"""Embeddings and scores in Python: what `LLM.embed` and `LLM.score` give back."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.backends.base import F32Array
from tokenmill.engine.outputs import RequestOutput
from tokenmill.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingOutput:
    """One vector of float32."""

    embedding: F32Array


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringOutput:
    """How well two texts fit: their cosine, or what a cross-encoder says, from 0 to 1."""

    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRequestOutput:
    """The score of one pair; `num_prompt_tokens` are those of both texts."""

    outputs: ScoringOutput
    num_prompt_tokens: int


def embedding_output(output: RequestOutput, vector: F32Array) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        prompt=output.prompt,
        prompt_token_ids=output.prompt_token_ids,
        outputs=EmbeddingOutput(embedding=vector),
        num_cached_tokens=output.num_cached_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Texts that are scored together: `indices` of the first and of the second."""

    first: Sequence[str]
    second: Sequence[str]
    names: tuple[str, str] = ("text_1", "text_2")

    @staticmethod
    def of(text_1: str | Sequence[str], text_2: str | Sequence[str]) -> "Pairs":
        """One text with each of many, or those of two lists in turn.

        Raises UsageError where the lists are empty or of lengths that do not fit.
        """
        first, second = ([t] if isinstance(t, str) else list(t) for t in (text_1, text_2))
        if not first or not second:
            raise UsageError(f"text_{1 if not first else 2} is empty: give at least one text")
        if len(first) not in (1, len(second)):
            raise UsageError(
                f"text_1 has {len(first)} texts and text_2 has {len(second)}: give one text_1, or "
                "as many as text_2"
            )
        return Pairs(first=first, second=second)

    def name(self, which: int, index: int) -> str:
        """What a text of the first (0) or second list is called in messages."""
        is_alone = len((self.first, self.second)[which]) == 1
        return self.names[which] if is_alone else f"{self.names[which]}[{index}]"

    @property
    def indices(self) -> list[tuple[int, int]]:
        return [(0 if len(self.first) == 1 else i, i) for i in range(len(self.second))]
