"""The routes of embeddings and scores."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.embeddings import embed, rerank, score
from tokenmill.server.large_bodies import route_class
from tokenmill.server.pooling_requests import EmbeddingBody, RerankBody, ScoreBody
from tokenmill.server.responses import Embeddings, Reranking, Scores, answers
from tokenmill.server.service import Service


def pooling_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["embeddings"], route_class=route_class(service.encoder))

    @router.post("/v1/embeddings", responses=answers(Embeddings))
    async def embeddings(http: Request, body: Annotated[EmbeddingBody, Body()]) -> Response:
        """A vector for a text, or for each of several."""
        return await embed(service, http, body)

    @router.post("/rerank", responses=answers(Reranking))
    @router.post("/v1/rerank", responses=answers(Reranking))
    @router.post("/v2/rerank", responses=answers(Reranking))
    async def reranking(http: Request, body: Annotated[RerankBody, Body()]) -> Response:
        """Documents by how well they fit a query, as Jina's and Cohere's APIs have it."""
        return await rerank(service, http, body)

    @router.post("/score", responses=answers(Scores))
    @router.post("/v1/score", responses=answers(Scores))
    async def scores(http: Request, body: Annotated[ScoreBody, Body()]) -> Response:
        """How well two texts fit, or each of several pairs."""
        return await score(service, http, body)

    return router
