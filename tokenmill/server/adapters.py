"""Loading and unloading LoRA adapters while the server runs, as in vLLM."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import PlainTextResponse

from tokenmill.engine.adapters import UnknownAdapterError
from tokenmill.errors import ModelNotFoundError
from tokenmill.server.errors import ApiError
from tokenmill.server.prompting import LONG
from tokenmill.server.requests import LoadAdapterBody, UnloadAdapterBody
from tokenmill.server.responses import texts
from tokenmill.server.service import Service

_LOOK_AGAIN_S = 0.02
"""Between two looks at whether an adapter is still in use."""


def adapter_routes(service: Service) -> APIRouter:
    """The routes of a server whose model takes adapters."""
    router = APIRouter(tags=["adapters"])

    @router.post(
        "/v1/load_lora_adapter", response_class=PlainTextResponse, responses=texts("text/plain")
    )
    async def load(body: Annotated[LoadAdapterBody, Body()]) -> PlainTextResponse:
        """Load an adapter from a folder on the server; requests choose it by `model`."""
        await _load(service, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=texts("text/plain")
    )
    async def unload(body: Annotated[UnloadAdapterBody, Body()]) -> PlainTextResponse:
        """Unload an adapter: new requests no longer find it; waits for those that have it."""
        await _unload(service, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


async def _load(service: Service, body: LoadAdapterBody) -> None:
    """Read it beside the event loop. Raises ApiError or the TokenmillError of what is wrong."""
    if body.lora_name in service.config.model_names:
        text = f"lora_name is {body.lora_name!r}, which is the model's own: take another"
        raise ApiError(400, text, param="lora_name", code="invalid_value")
    load = service.llm.adapters.load
    try:
        await service.encoder.apart(
            lambda: load(body.lora_name, body.lora_path, replaces=body.load_inplace), LONG + 1
        )
    except ModelNotFoundError as error:
        raise ApiError(404, str(error), param="lora_path", code="adapter_not_found") from error


async def _unload(service: Service, body: UnloadAdapterBody) -> None:
    try:
        adapter = service.llm.adapters.unload(body.lora_name)
    except UnknownAdapterError as error:
        raise ApiError(404, str(error), param="lora_name", code="adapter_not_found") from error
    while adapter and service.llm.engine.uses(adapter):
        await asyncio.sleep(_LOOK_AGAIN_S)
