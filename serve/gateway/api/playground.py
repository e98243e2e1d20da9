"""The pages at `/` and `/docs`: files from `page/`, with headers that forbid content from other origins."""

from functools import partial
from pathlib import Path

from fastapi import APIRouter, Response

_DIRECTORY = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _file(name: str) -> Response:
    content = (_DIRECTORY / name).read_text(encoding="utf-8")
    return Response(content, media_type=f"{_TYPES[Path(name).suffix]}; charset=utf-8", headers=_HEADERS)


@router.get("/")
async def index() -> Response:
    """The playground."""
    return _file("index.html")


@router.get("/docs")
async def docs() -> Response:
    """The API's documentation, drawn from the OpenAPI document."""
    return _file("docs.html")


for _name in ("page.css", "page.js", "docs.js"):
    router.add_api_route(f"/page/{_name}", partial(_file, _name))
