"""Requests for embeddings and scores: what one model can make, and how texts become requests."""

from typing import TYPE_CHECKING

from tokenmill.backends.base import F32Array
from tokenmill.config import EngineConfig
from tokenmill.engine.embedding import (
    Pairs,
    ScoringOutput,
    ScoringRequestOutput,
)
from tokenmill.engine.intake import Intake
from tokenmill.engine.outputs import RequestOutput
from tokenmill.engine.pooling import cosine, shaped, sigmoid
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
    def capabilities(self) -> list[str]:
        """What the model can be asked for: completion, embedding, score."""
        if self.is_cross_encoder:
            return ["score"]
        text = ["completion"] if self._loaded.compiled.limits.has_logits else []
        return [*text, "embedding", "score"]

    @property
    def is_expected(self) -> bool:
        """Do the model's files or the user say how embeddings are made?"""
        files, limits = self._loaded.pooling, self._loaded.compiled.limits
        return files.is_declared or self._config.pooling != "auto" or not limits.has_logits

    @property
    def size(self) -> int:
        """Features of a whole embedding."""
        dense = self._loaded.pooling.dense
        return dense[-1].size if dense else self._loaded.config.hidden_size

    def vector(self, output: RequestOutput, params: PoolingParams) -> F32Array:
        """The embedding that a request with these parameters was for."""
        assert output.pooled is not None
        vector = output.pooled
        for dense in self._loaded.pooling.dense:
            vector = dense(vector)
        return shaped(vector, params)

    def prefix(self, prompt_name: str | None) -> str:
        """What stands before a text: the model's prompt of a name, "" none, None its default.

        Raises UsageError for a name that the model's files do not have.
        """
        files = self._loaded.pooling
        if prompt_name is None:
            return files.default_prompt
        if prompt_name and prompt_name not in files.prompts:
            known = ", ".join(map(repr, files.prompts)) or "none"
            raise UsageError(f"prompt_name is {prompt_name!r}, but the model's prompts are {known}")
        return files.prompts.get(prompt_name, "")

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
        size, whole = params.dimensions, self.size
        if size is None or size == whole:
            return
        sizes = self._loaded.pooling.sizes
        if sizes is None:
            raise UsageError(
                f"dimensions is {size}, but the model was not made for less than its {whole}: its "
                "config.json has neither is_matryoshka nor matryoshka_dimensions"
            )
        if size > whole or (sizes and size not in sizes):
            known = ", ".join(map(str, sizes)) or f"at most {whole}"
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
        return [
            self.request(
                text,
                self._scoring_params,
                second=second,
                name=name,
                sink=sink,
                longest=longest,
                prefix=self.prefix(None),
                request_id=request_id,
                priority=priority,
                adapter=adapter,
            )
            for text, second, name in made
        ]

    def scores(self, pairs: Pairs, outputs: list[RequestOutput]) -> list[ScoringRequestOutput]:
        """The score of each pair, from the outputs of `score_requests`."""
        vectors = [self.vector(output, self._scoring_params) for output in outputs]
        if self.is_cross_encoder:
            logits = (float(vector[0]) for vector in vectors)
            return [_scored(sigmoid(x), o) for x, o in zip(logits, outputs, strict=True)]
        both = [(a, len(pairs.first) + b) for a, b in pairs.indices]
        return [_scored(cosine(vectors[a], vectors[b]), outputs[a], outputs[b]) for a, b in both]

    @property
    def _scoring_params(self) -> PoolingParams:
        return self.params(normalize=not self.is_cross_encoder)


def _scored(score: float, *outputs: RequestOutput) -> ScoringRequestOutput:
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    return ScoringRequestOutput(outputs=ScoringOutput(score=score), num_prompt_tokens=num_tokens)
