"""What a client is told when something cannot be done: OpenAI's error object."""

import json
import re
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import Response

from tokenmill.engine.adapters import AdaptersBusyError
from tokenmill.engine.engine import ClosedError, DrainingError, QueueFullError
from tokenmill.engine.request import EngineDeadError
from tokenmill.errors import TokenmillError

RETRY_AFTER = {"Retry-After": "1"}
_FIELD = re.compile(r"([a-z][a-z_0-9]*)(?:\[\d+\])* (?:is|holds|has) ")


class ApiError(HTTPException):
    """An answer other than success; `param` names the request's field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, object]:
        error = {
            "message": self.detail,
            "type": _error_type(self.status_code),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        content = json.dumps(self.body()).encode()
        return Response(content, self.status_code, self.headers, "application/json")


class ClientGoneError(Exception):
    """The client hung up before its answer was complete."""


def api_error_of(error: TokenmillError | EngineDeadError) -> ApiError:
    """What the engine or the model refuses, as an answer."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=RETRY_AFTER)
    if isinstance(error, AdaptersBusyError):
        return ApiError(429, str(error), code="adapters_busy", headers=RETRY_AFTER)
    if isinstance(error, DrainingError | ClosedError):
        return draining()
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has stopped: restart the server", code="engine_dead")
    message = str(error)
    field = _FIELD.match(message)
    return ApiError(400, message, param=field.group(1) if field else None, code="invalid_value")


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="draining", headers=RETRY_AFTER)


def refused(param: str, message: str) -> ApiError:
    """A field that has a value which we do not support."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def _error_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
