"""Requests for embeddings and scores: what one model can make, and how texts become requests."""

from typing import TYPE_CHECKING

from tokenmill.config import EngineConfig
from tokenmill.engine.embedding import (
    Pairs,
    ScoringOutput,
    ScoringRequestOutput,
    label_score,
    pair_score,
)
from tokenmill.engine.intake import Intake
from tokenmill.engine.outputs import RequestOutput
from tokenmill.engine.request import Request, Sink
from tokenmill.errors import UsageError
from tokenmill.sampling.pooling import PoolingParams

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter
    from tokenmill.models.loader import LoadedModel


class Embedder:
    """Makes pooled requests for one model."""

    def __init__(
        self, loaded: "LoadedModel", config: EngineConfig, intake: Intake, max_model_len: int
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._max_model_len = max_model_len
        self.request = intake.make_pooled_request

    @property
    def is_cross_encoder(self) -> bool:
        """Does the model score pairs of texts, and nothing else?"""
        encoder = self._loaded.config.encoder
        return encoder is not None and encoder.num_labels > 0

    @property
    def is_expected(self) -> bool:
        """Do the model's files or the user say how embeddings are made?"""
        files, limits = self._loaded.pooling, self._loaded.compiled.limits
        return files.is_declared or self._config.pooling != "auto" or not limits.has_logits

    def params(
        self, *, normalize: bool | None = None, dimensions: int | None = None
    ) -> PoolingParams:
        """What is given, and for the rest what the configuration or the model's files say."""
        files, config = self._loaded.pooling, self._config
        for default in (config.normalize, files.normalize):
            normalize = default if normalize is None else normalize
        return PoolingParams(
            pooling=files.kind if config.pooling == "auto" else config.pooling,
            normalize=bool(normalize),
            dimensions=dimensions,
        )

    def check(self, params: PoolingParams) -> None:
        """UsageError where the model does not make such embeddings."""
        if self.is_cross_encoder:
            raise UsageError("the model is a cross-encoder, which scores pairs: ask for scores")
        size, hidden = params.dimensions, self._loaded.config.hidden_size
        if size is None or size == hidden:
            return
        sizes = self._loaded.pooling.sizes
        if sizes is None:
            raise UsageError(
                f"dimensions is {size}, but the model was not made for less than its {hidden}: its "
                "config.json has neither is_matryoshka nor matryoshka_dimensions"
            )
        if size > hidden or (sizes and size not in sizes):
            known = ", ".join(map(str, sizes)) or f"at most {hidden}"
            raise UsageError(f"dimensions is {size}, but the model's embeddings have {known}")

    def longest(self, truncate_prompt_tokens: int | None) -> int | None:
        """To how many tokens a text is cut; None: not at all. UsageError for nonsense."""
        if truncate_prompt_tokens is None:
            return None
        if truncate_prompt_tokens == -1:
            limits = self._loaded.compiled.limits
            room = limits.tokens if limits.is_encoder else self._max_model_len
            return min(self._max_model_len, room)
        if truncate_prompt_tokens < 1:
            raise UsageError(
                f"truncate_prompt_tokens is {truncate_prompt_tokens}, but must be -1 or at least 1"
            )
        return truncate_prompt_tokens

    def score_requests(
        self,
        pairs: Pairs,
        *,
        sink: Sink,
        longest: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        adapter: "Adapter | None" = None,
    ) -> list[Request]:
        """What must be computed for scores: each pair, or each text once. Raises as `request`."""
        made: list[tuple[str, str | None, str]]
        if self.is_cross_encoder:
            made = [(pairs.first[a], pairs.second[b], pairs.name(1, b)) for a, b in pairs.indices]
        else:
            lists = enumerate((pairs.first, pairs.second))
            made = [(t, None, pairs.name(n, i)) for n, texts in lists for i, t in enumerate(texts)]
        params = self.params(normalize=not self.is_cross_encoder)
        return [
            self.request(
                text,
                params,
                second=second,
                name=name,
                sink=sink,
                longest=longest,
                request_id=request_id,
                priority=priority,
                adapter=adapter,
            )
            for text, second, name in made
        ]

    def scores(self, pairs: Pairs, outputs: list[RequestOutput]) -> list[ScoringRequestOutput]:
        """The score of each pair, from the outputs of `score_requests`."""
        if self.is_cross_encoder:
            return [_scored(label_score(output), output) for output in outputs]
        first, second = outputs[: len(pairs.first)], outputs[len(pairs.first) :]
        both = ((first[a], second[b]) for a, b in pairs.indices)
        return [_scored(pair_score(a, b), a, b) for a, b in both]


def _scored(score: float, *outputs: RequestOutput) -> ScoringRequestOutput:
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    return ScoringRequestOutput(outputs=ScoringOutput(score=score), num_prompt_tokens=num_tokens)
