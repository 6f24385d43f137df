"""The server behind the page: a token in the address, a check of hosts, bounded bodies, JSON.

Everything lies below `/TOKEN/`, a random word that is made at every start: who does not know it is
refused, whatever is asked for. Requests name the host that they think they speak to (`Host`), and
browsers the page that they come from (`Origin`): both have to be this server, so that no other
page can make a browser ask it anything. Bodies are counted while they come in. Nothing is read but
what was opened, what is sent, and the files of the page, which are listed when the server starts.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from nrm.errors import NrmError, one_line
from nrm.explore import answers
from nrm.explore.described import described, sample
from nrm.explore.opened import Opened
from nrm.explore.session import Session, Sessions, Turn, told

PAGE = Path(__file__).with_name("page")
MOST_JSON, MOST_FILE = 2**17, 2**24
"""Bytes of a request, and of a file that is sent."""
_DISCARDED = 2**28  # of what is too large so much is taken before the connection is cut
_KINDS = {
    ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml",
}  # fmt: skip
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Asked = Callable[[Session, Any, answers.Request, Turn], Iterator[answers.Part]]


class TooLargeError(Exception):
    """A body of more bytes than are taken."""


def new_token() -> str:
    """A random word that nobody guesses."""
    return secrets.token_urlsafe(24)


def make_app(opened: Opened, token: str, hosts: frozenset[str]) -> FastAPI:
    """The application.

    Arguments:
        token: the first part of every address.
        hosts: what requests may call this server, with its port.
    """
    app = FastAPI(title="nrm explore", docs_url=None, redoc_url=None, openapi_url=None)
    sessions = Sessions(opened)
    files = {
        str(file.relative_to(PAGE)): file
        for file in PAGE.rglob("*")
        if file.is_file() and file.suffix in _KINDS
    }

    @app.middleware("http")
    async def guarded(request: Request, proceed: Any) -> Response:
        refusal = _refusal(request, token, hosts)
        if refusal is not None:
            return _refuse(*refusal)
        try:
            found: Response = await proceed(request)
        except NrmError as error:
            return _refuse(422, one_line(error))
        found.headers.update(_HEADERS)
        return found

    @app.exception_handler(NrmError)
    async def refused(request: Request, error: NrmError) -> Response:
        return _refuse(422, one_line(error))

    @app.exception_handler(TooLargeError)
    async def too_large(request: Request, error: TooLargeError) -> Response:
        return _refuse(413, str(error))

    @app.get(f"/{token}/")
    async def page() -> Response:
        return _file(files["index.html"])

    @app.post(f"/{token}/api/open")
    def open_session() -> Any:
        session = sessions.new()
        return {"session": session.id, **described(opened, session)}

    async def streamed(request: Request, asked: Asked) -> Response:
        body = await _json(request)
        session = sessions[body.get("session")]
        wanted = answers.Request.read(body.get("request"))
        parts = asked(session, body.get("input", 0), wanted, session.turn())
        return StreamingResponse(_lines(parts), media_type="application/x-ndjson")

    @app.post(f"/{token}/api/view")
    async def look(request: Request) -> Response:
        return await streamed(request, Session.answer)

    @app.post(f"/{token}/api/search")
    async def search(request: Request) -> Response:
        return await streamed(request, Session.search)

    @app.post(f"/{token}/api/script")
    async def export(request: Request) -> Any:
        body = await _json(request)
        session, wanted = sessions[body.get("session")], answers.Request.read(body.get("request"))
        return {"script": await run_in_threadpool(session.script, body.get("input", 0), wanted)}

    @app.post(f"/{token}/api/references")
    async def references(request: Request) -> Any:
        body = await _json(request)
        session = sessions[body.get("session")]
        layer, channel = body.get("layer"), body.get("channel")
        found = await run_in_threadpool(session.references, layer, channel)
        return {"samples": [sample(one) for one in found]}

    @app.post(f"/{token}/api/send")
    async def send(request: Request) -> Any:
        session = sessions[request.query_params.get("session")]
        name = request.query_params.get("name", "")[:80]
        data = await _body(request, MOST_FILE)
        number = await run_in_threadpool(session.add, data, name)
        return {"input": number, **await run_in_threadpool(described, opened, session)}

    @app.get(f"/{token}/{{path:path}}")
    async def static(path: str) -> Response:
        if path not in files:
            return _refuse(404, "there is no such file.")
        return _file(files[path])

    return app


def _refusal(request: Request, token: str, hosts: frozenset[str]) -> tuple[int, str] | None:
    """Why a request is not answered, if it is not."""
    host = request.headers.get("host", "").lower()
    if host not in hosts:
        return 403, "this server is not known by that name (Host)."
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host:
        return 403, "the request comes from another page (Origin)."
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return 403, "the request comes from another page (Sec-Fetch-Site)."
    first = request.url.path.removeprefix("/").partition("/")[0]
    if not hmac.compare_digest(first.encode(), token.encode()):
        return 403, "the address lacks the token: take the one that `nrm explore` printed."
    return None


def _refuse(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status, headers=_HEADERS)


def _file(file: Path) -> Response:
    return Response(file.read_bytes(), media_type=_KINDS[file.suffix])


def _lines(parts: Iterator[answers.Part]) -> Iterator[bytes]:
    """The parts of an answer, each a line of JSON; what went wrong in a line of its own."""
    for part in told(parts):
        yield json.dumps(part).encode() + b"\n"


async def _json(request: Request) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        NrmError: it is none.
    """
    data = await _body(request, MOST_JSON)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise NrmError("the request is no JSON.") from None
    if not isinstance(found, dict):
        raise NrmError("the request is no object.")
    return found


async def _body(request: Request, most: int) -> bytes:
    """A body of at most so many bytes: what is more is thrown away as it comes.

    Raises:
        TooLargeError: it has more.
    """
    told = request.headers.get("content-length", "0")
    size, held = 0, bytearray()
    too_large = told.isdecimal() and int(told) > most
    stream: AsyncIterator[bytes] = request.stream()
    async for chunk in stream:
        size += len(chunk)
        too_large = too_large or size > most
        if too_large:
            held.clear()
        else:
            held += chunk
        if size > _DISCARDED:
            break
    if too_large:
        raise TooLargeError(f"at most {most / 2**20:g} MB are taken: send a smaller file.")
    return bytes(held)
