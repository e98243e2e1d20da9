"""Exception handlers: every failure becomes an error in the format of the route's API."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chorus.serve.gateway.api.unserved import unserved_reason
from chorus.serve.gateway.request.errors import CLIENT_CLOSED_REQUEST, ApiError, reason_phrase, respond


def add_handlers(app: FastAPI) -> None:
    """Answer our errors, the router's, the framework's and unexpected exceptions in the format of the route's API."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_client_disconnect)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return respond(error, request.scope["path"])


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404 and (why := unserved_reason(path)):
        return respond(ApiError(404, f"{path} is not supported: {why}", code="route_not_served"), path)
    what = {404: "no such route", 405: "method not allowed"}.get(error.status_code)
    message = f"{request.method} {path}: {what or error.detail}. See /docs for the routes."
    code = reason_phrase(error.status_code).lower().replace(" ", "_")
    return respond(ApiError(error.status_code, message, code=code, headers=error.headers), path)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return respond(
        ApiError(422, f"{where}: {first['msg']}", code="invalid_request", param=where), request.scope["path"]
    )


async def _on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    record = getattr(request.state, "record", None)
    headers = {"x-request-id": record.request_id} if record else {}
    message = "the gateway failed on this request; search its log for the request id."
    return respond(ApiError(500, message, code="gateway_error", headers=headers), request.scope["path"])
