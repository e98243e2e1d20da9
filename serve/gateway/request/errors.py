"""All errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, or in Anthropic's for its API."""

import http
import json
import logging
import re
from collections.abc import Mapping

from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)

MESSAGES = "/v1/messages"
"""Path of Anthropic's API; it and all paths below it have errors in Anthropic's shape."""
_CONTEXT = re.compile(r"maximum context length is (\d+) tokens\. However, your prompt")
_NO_ROOM = "max_tokens must be at least 1, got 0"
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left: never sent, but shown in logs and metrics."""


class ApiError(Exception):
    """An error to answer with. Its message gives what to change, or when to try again."""

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


_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_body(error: ApiError) -> dict[str, object]:
    """The error in Anthropic's shape."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def respond(error: ApiError, path: str) -> JSONResponse:
    """The error as a whole response, in the shape of the API that `path` belongs to."""
    if path.startswith(MESSAGES):
        return JSONResponse(anthropic_body(error), status_code=error.status, headers=error.headers)
    return error.response()


def bad_request(message: str, *, code: str, param: str | None = None) -> ApiError:
    """A 400: the request is understood but cannot be served as it stands."""
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str, *, retry_after_s: int) -> ApiError:
    """A 503: the same request can be served once the engine answers again."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": str(retry_after_s)})


def engine_error(status: int, body: bytes) -> ApiError:
    """An engine's answer other than 200, as the gateway's error.

    A refusal (4xx) keeps its message and parameter. A failure's message is only logged, as it may reveal internals.
    """
    if not 400 <= status < 500:
        logger.warning("an engine returned status %d: %r", status, body[:500])
        if status == 503:
            return unavailable("the engine cannot accept requests right now; send the request again.", retry_after_s=1)
        return bad_gateway("the engine failed on this request.", status=500 if status == 500 else 502)
    try:
        error = json.loads(body)["error"]
        message, param = _as_text(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message, param = reason_phrase(status), None
    param = _as_text(param).removeprefix("body.") if isinstance(param, str) else None
    return ApiError(status, message, code="rejected_by_engine", param=param)


def bad_gateway(message: str, *, status: int = 502) -> ApiError:
    """A 502: the engine's answer cannot be passed on; or a 500: the engine reported a failure."""
    return ApiError(status, message, code="engine_error")


def explain_length(error: ApiError, *, max_tokens: int | None, context_length: int) -> ApiError:
    """Rewrite an engine's refusal of a prompt that leaves no room for an answer to say what must fit; return others unchanged.

    The engine reads such a prompt only up to its limit, and reports that limit as the prompt's length, or `max_tokens` as 0, which
    the client did not send.
    """
    known = _CONTEXT.search(error.message)
    is_full = max_tokens != 0 and _NO_ROOM in error.message
    if error.status != 400 or not (known or is_full):
        return error
    context_length = int(known[1]) if known else context_length
    requested = 1 if max_tokens is None else max_tokens
    if max_tokens is None:
        reserved, alternative = "1 token of answer", ""
    else:
        reserved, alternative = f"max_tokens ({requested})", " or lower max_tokens"
    return bad_request(
        f"the prompt is too long: the context of {context_length} tokens minus {reserved} leaves "
        f"{max(0, context_length - requested)} tokens for it. Shorten the prompt{alternative}; POST /tokenize counts its tokens.",
        code="context_length_exceeded",
        param=error.param,
    )


def error_status(body: bytes) -> int:
    """The HTTP status in the `code` of an engine's error body; 500 if there is none."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 500
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _as_text(value: object) -> str:
    """An engine's text with unpaired surrogates replaced, as no answer can hold them."""
    return str(value).encode(errors="replace").decode()


def reason_phrase(status: int) -> str:
    """The reason phrase of an HTTP status."""
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"
