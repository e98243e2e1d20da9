"""The page at `/`: three files beside this module, sent with headers that let nothing else in."""

from pathlib import Path

from fastapi import APIRouter, Response

_DIRECTORY = Path(__file__).parent / "page"
_FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _file(name: str) -> Response:
    content = (_DIRECTORY / name).read_text(encoding="utf-8")
    return Response(content, media_type=f"{_FILES[name]}; charset=utf-8", headers=_HEADERS)


@router.get("/")
async def index() -> Response:
    """The playground."""
    return _file("index.html")


@router.get("/page/page.css")
async def style() -> Response:
    """Its style."""
    return _file("page.css")


@router.get("/page/page.js")
async def script() -> Response:
    """Its script."""
    return _file("page.js")
