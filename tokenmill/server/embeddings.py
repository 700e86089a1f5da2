"""`POST /v1/embeddings`, `/v1/rerank` and `/v1/score`."""

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tokenmill.backends.base import F32Array
from tokenmill.engine.embedding import Pairs
from tokenmill.engine.outputs import RequestOutput
from tokenmill.engine.request import Request
from tokenmill.server.answering import answer_whole, name_call
from tokenmill.server.pooling_requests import (
    EmbeddingBody,
    PooledBody,
    RerankBody,
    ScoreBody,
)
from tokenmill.server.service import Service, usage_of

_TEXT_SIZE = 64
"""Making a request takes as long as looking at so many characters."""


async def embed(service: Service, http: HttpRequest, body: EmbeddingBody) -> Response:
    """The embeddings of one prompt or of several. Raises ApiError or UsageError."""
    head = _head(service, http, body, "embd", "list")
    embedder = service.llm.embedder
    params = embedder.params(normalize=body.normalize, dimensions=body.dimensions)
    embedder.check(params)
    longest = embedder.longest(body.truncate_prompt_tokens)
    prefix = embedder.prefix(body.prompt_name)
    adapter = await service.adapter(body.model)
    given = body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    prompts = cast(Sequence[str | list[int]], [given] if is_one else given)

    def make() -> list[Request]:
        return [
            embedder.request(
                prompt,
                params,
                sink=service.bridge.sink,
                name="input" if is_one else f"input[{index}]",
                longest=longest,
                prefix=prefix,
                add_special_tokens=body.add_special_tokens is not False,
                request_id=body.request_id,
                priority=body.priority,
                adapter=adapter,
            )
            for index, prompt in enumerate(prompts)
        ]

    requests = await _requests(service, body, prompts, make)

    def whole(outputs: list[RequestOutput]) -> dict[str, Any]:
        encode = _as_base64 if body.encoding_format == "base64" else _as_list
        data = [
            {"object": "embedding", "index": i, "embedding": encode(embedder.vector(o, params))}
            for i, o in enumerate(outputs)
        ]
        return {**head, "data": data, "usage": usage_of(outputs, discard_output=True)}

    return await answer_whole(http, service.bridge, requests, service.encoder, whole)


def _as_list(vector: F32Array) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _as_base64(vector: F32Array) -> str:
    """Of the bytes of float32, the lowest first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def score(service: Service, http: HttpRequest, body: ScoreBody) -> Response:
    """How well texts fit. Raises ApiError or UsageError."""
    head = _head(service, http, body, "score", "list")
    pairs = Pairs.of(body.text_1, body.text_2)
    requests = await _score_requests(service, body, pairs)

    def whole(outputs: list[RequestOutput]) -> dict[str, Any]:
        scores = enumerate(service.llm.embedder.scores(pairs, outputs))
        data = [{"object": "score", "index": i, "score": s.outputs.score} for i, s in scores]
        return {**head, "data": data, "usage": usage_of(outputs, discard_output=True)}

    return await answer_whole(http, service.bridge, requests, service.encoder, whole)


async def rerank(service: Service, http: HttpRequest, body: RerankBody) -> Response:
    """Documents by how well they fit a query, best first. Raises ApiError or UsageError."""
    head = _head(service, http, body, "rerank")
    texts = [d if isinstance(d, str) else d.text for d in body.documents]
    pairs = Pairs(first=[body.query], second=texts, names=("query", "documents"))
    requests = await _score_requests(service, body, pairs)

    def whole(outputs: list[RequestOutput]) -> dict[str, Any]:
        scores = [s.outputs.score for s in service.llm.embedder.scores(pairs, outputs)]
        best = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": scores[index]} for index in best
        ]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": texts[result["index"]]}
        usage = usage_of(outputs, discard_output=True)
        return {**head, "results": results[: body.top_n or None], "usage": usage}

    return await answer_whole(http, service.bridge, requests, service.encoder, whole)


def _head(
    service: Service, http: HttpRequest, body: PooledBody, prefix: str, kind: str | None = None
) -> dict[str, Any]:
    """What begins the answer."""
    model = service.model_name(body.model)
    head: dict[str, Any] = {"id": f"{prefix}-{name_call(http, body)}", "model": model}
    return head if kind is None else {**head, "object": kind, "created": int(time.time())}


async def _score_requests(service: Service, body: PooledBody, pairs: Pairs) -> list[Request]:
    embedder = service.llm.embedder
    longest = embedder.longest(body.truncate_prompt_tokens)
    adapter = await service.adapter(body.model)

    def make() -> list[Request]:
        return embedder.score_requests(
            pairs,
            sink=service.bridge.sink,
            longest=longest,
            request_id=body.request_id,
            priority=body.priority,
            adapter=adapter,
        )

    # A cross-encoder reads the one text again with each of the others.
    times = len(pairs.second) if embedder.is_cross_encoder and len(pairs.first) == 1 else 1
    texts = [*pairs.first, *pairs.second]
    work = sum(map(len, pairs.first)) * (times - 1)
    return await _requests(service, body, texts, make, work)


async def _requests(
    service: Service,
    body: PooledBody,
    texts: Sequence[str | list[int]],
    make: Callable[[], list[Request]],
    work: int = 0,
) -> list[Request]:
    """Make requests, beside the event loop if long; `work` is what `texts` do not show."""
    if body.truncate_prompt_tokens is None:
        for text in texts:
            if isinstance(text, str):
                service.encoder.check_size(text)
    await service.prepare_pooling()
    return await service.encoder.apart(make, sum(_TEXT_SIZE + len(t) for t in texts) + work)
