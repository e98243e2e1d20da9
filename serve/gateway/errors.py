"""Errors as an OpenAI client expects them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

import http
import json
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody receives it, but logs and metrics show it."""


class ApiError(Exception):
    """An answer other than the one asked for. The message says what to change, or when to come back."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a whole HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)

    def event(self) -> bytes:
        """The error as a server-sent event, for a stream that has begun."""
        return b"data: " + json.dumps(self.body(), separators=(",", ":")).encode() + b"\n\n"


def bad_request(message: str, *, code: str, param: str | None = None) -> ApiError:
    """A 400: the request is understood and cannot be served as it stands."""
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str, *, retry_after_s: int) -> ApiError:
    """A 503: the same request will be served once the engine answers again."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": str(retry_after_s)})


def engine_error(status: int, body: bytes) -> ApiError:
    """The engine's own refusal, its message and parameter kept, in the gateway's shape."""
    try:
        error = json.loads(body)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = body[:500].decode(errors="replace").strip() or _phrase(status), None
    code = "engine_error" if status >= 500 else "rejected_by_engine"
    return ApiError(status, message, code=code, param=param.removeprefix("body.") if isinstance(param, str) else None)


def error_status(body: bytes) -> int:
    """The HTTP status that an engine gave as `code` in an error's body; 500 if it gave none."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def add_handlers(app: FastAPI) -> None:
    """Answer every failure of `app` in OpenAI's shape: ours, the router's, the framework's and the unforeseen."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_client_disconnect)
    app.add_exception_handler(Exception, _on_unforeseen)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such route", 405: "this route has other methods"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {what or error.detail}. The routes are listed at /docs."
    code = _phrase(error.status_code).lower().replace(" ", "_")
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return ApiError(422, f"{where}: {first['msg']}", code="invalid_request", param=where).response()


async def _on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    record = getattr(request.state, "record", None)
    headers = {"x-request-id": record.request_id} if record else {}
    message = "the gateway failed on this request; its log has the cause under the request's id"
    return ApiError(500, message, code="gateway_error", headers=headers).response()


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"
