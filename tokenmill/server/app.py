"""The application: its routes, and what a client hears when something goes wrong."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

import tokenmill
from tokenmill.errors import TokenmillError
from tokenmill.server import docs_page, page
from tokenmill.server.access import Gate
from tokenmill.server.adapters import adapter_routes
from tokenmill.server.chat import complete_chat
from tokenmill.server.completions import complete
from tokenmill.server.errors import ApiError, api_error_of
from tokenmill.server.feed import Feed
from tokenmill.server.large_bodies import route_class
from tokenmill.server.meters import CONTENT_TYPE
from tokenmill.server.pooling_routes import pooling_routes
from tokenmill.server.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tokenmill.server.responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    LiveStats,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
    answers,
    texts,
)
from tokenmill.server.service import Service
from tokenmill.server.tokens import detokenize, tokenize

_WRONG_TYPE = re.compile("_(type|parsing)$")
_DESCRIPTION = "A language model, served as OpenAI's API has it, with the extra fields of vLLM's."


def make_app(service: Service) -> ASGIApp:
    """The ASGI application that serves one model."""
    app = FastAPI(
        title="tokenmill",
        version=tokenmill.__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(_generation_routes(service))
    app.include_router(pooling_routes(service))
    app.include_router(_model_routes(service))
    if service.llm.adapters.is_enabled:
        app.include_router(adapter_routes(service))
    app.include_router(_engine_routes(service))
    app.include_router(_probe_routes(service))
    page.add_page(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        headers = {"Content-Security-Policy": docs_page.CONTENT_SECURITY_POLICY}
        return HTMLResponse(docs_page.docs_page(app.openapi()), headers=headers)

    _add_error_handlers(app)
    guarded: ASGIApp = Gate(
        app,
        life=service.life,
        api_keys=service.config.api_keys,
        open_paths=frozenset(page.static_paths()),
        max_body_bytes=service.config.max_body_bytes,
        body_timeout_s=service.config.body_timeout_s,
    )
    if service.config.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return guarded


def _generation_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=route_class(service.encoder))

    @router.post("/v1/chat/completions", responses=answers(ChatCompletion, streams=True))
    async def chat_completions(http: Request, body: Annotated[ChatBody, Body()]) -> Response:
        """The model's next message in a conversation, whole or as a stream."""
        return await complete_chat(service, http, body)

    @router.post("/v1/completions", responses=answers(Completion, streams=True))
    async def completions(http: Request, body: Annotated[CompletionBody, Body()]) -> Response:
        """What follows a prompt, or each of several, whole or as a stream."""
        return await complete(service, http, body)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["model"], route_class=route_class(service.encoder))

    def card(name: str) -> dict[str, Any]:
        adapter = service.known_adapter(name)
        main_name = service.config.model_names[0]
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "tokenmill",
            "root": adapter.path if adapter else main_name,
            "parent": main_name if adapter else None,
            "max_model_len": service.llm.max_model_len,
            "capabilities": service.llm.embedder.capabilities,
        }

    @router.get("/v1/models", responses=answers(ModelList))
    async def models() -> JSONResponse:
        """The names of the model, and the adapters that it can be asked with."""
        adapters = (adapter.name for adapter in service.llm.adapters.known())
        data = [card(name) for name in (*service.config.model_names, *adapters)]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{model:path}", responses=answers(ModelCard))
    async def model(model: str) -> JSONResponse:
        """One model by its name."""
        return JSONResponse(card(service.model_name(model)))

    @router.post("/tokenize", responses=answers(Tokenized))
    async def tokenize_text(body: Annotated[TokenizeBody, Body()]) -> JSONResponse:
        """The token ids of a prompt, or of a conversation in the model's chat template."""
        return JSONResponse(await tokenize(service, body))

    @router.post("/detokenize", responses=answers(Detokenized))
    async def detokenize_ids(body: Annotated[DetokenizeBody, Body()]) -> JSONResponse:
        """The text of token ids."""
        return JSONResponse(await detokenize(service, body))

    return router


def _engine_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["engine"])
    feed = Feed(service.llm.engine, service.life)

    @router.get("/metrics", response_class=Response, responses=texts("text/plain"))
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.meters.text(), headers={"Content-Type": CONTENT_TYPE})

    @router.get("/engine/stats", responses=answers(LiveStats))
    async def stats() -> Response:
        """The engine at this moment."""
        return Response(feed.snapshot(), media_type="application/json")

    @router.get("/engine/events", response_class=Response, responses=texts("text/event-stream"))
    async def engine_events() -> Response:
        """The same as /engine/stats, five times a second, without end."""
        return feed.events()

    @router.get("/version", responses=answers(Version))
    async def version() -> JSONResponse:
        """The version of the server."""
        return JSONResponse({"version": tokenmill.__version__})

    return router


def _probe_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["probes"])
    ok = JSONResponse({"status": "ok"})

    def check_engine() -> None:
        beat = service.llm.engine.heartbeat()
        if not beat.is_alive:
            raise ApiError(503, "the engine has stopped: restart the server", code="engine_dead")
        is_stuck = beat.idle_s > service.config.stall_timeout_s
        if beat.has_work and not beat.is_paused and is_stuck:
            text = f"the engine has not finished a step for {beat.idle_s:.1f} s, though work waits"
            raise ApiError(503, text, code="engine_stuck")

    @router.get("/live", responses=answers(Health))
    async def live() -> Response:
        """Does the process answer?"""
        return ok

    @router.get("/health", responses=answers(Health))
    async def health() -> Response:
        """Does the engine make progress?"""
        check_engine()
        return ok

    @router.get("/ready", responses=answers(Health))
    async def ready() -> Response:
        """Should requests be sent here?"""
        check_engine()
        if service.life.is_draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        return ok

    return router


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            error = ApiError(error.status_code, error.detail, headers=error.headers)
        request.state.record.note_error(error)
        return error.response()

    @app.exception_handler(TokenmillError)
    async def tokenmill_error(request: Request, error: TokenmillError) -> Response:
        return await http_error(request, api_error_of(error))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return await http_error(request, _invalid(error, request.headers.get("content-type")))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error: the server's log has the details").response()


def _invalid(error: RequestValidationError, content_type: str | None) -> ApiError:
    """What is wrong with a body, by the name of its field.

    Of the alternatives of a union, the one whose type fits is what was meant, or the one that
    was followed furthest.
    """
    first = max(error.errors(), key=lambda e: (not _WRONG_TYPE.search(e["type"]), len(e["loc"])))
    if first["loc"] == ("body",) and "json" not in (content_type or ""):
        text = "the body is not taken for JSON: send Content-Type: application/json"
        return ApiError(400, text, code="invalid_content_type")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it does not parse")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    param = _field_name(first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"{param} is not supported"
        return ApiError(400, text, param=param, code="unsupported_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param or 'the body'}: {message}", param=param, code="invalid_value")


def _field_name(location: tuple[int | str, ...]) -> str | None:
    """`messages[0].content`; the parts that name the alternatives of a union are left out."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "list"):
            name += f".{part}"
    return name.removeprefix(".")[:256] or None
