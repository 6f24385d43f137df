"""Serve the explorer until somebody ends it: on this computer alone, unless told otherwise."""

from __future__ import annotations

import contextlib
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from typing import Any

from nrm.errors import InputError
from nrm.explore.opened import Opened

LOCAL = "127.0.0.1"


def serve(
    opened: Opened,
    host: str = LOCAL,
    port: int = 0,
    browse: bool = True,
    told: Callable[[str], None] = lambda address: None,
) -> None:
    """Show what is open in a browser, until Ctrl-C.

    Arguments:
        host: where to listen. Other computers reach what listens elsewhere than at 127.0.0.1; they
            need the address with its token.
        port: 0 for any that is free.
        browse: open the page in a browser.
        told: is given the address, once there is something to see.

    Raises:
        InputError: the port cannot be had, or a package is missing.
    """
    with _listening(host, port) as (listening, hosts, port):
        server, token = _server(opened, hosts)
        address = f"http://{_bracketed(host)}:{port}/{token}/"
        told(address)
        if browse:
            webbrowser.open(address)
        server.run([listening])


@contextlib.contextmanager
def running(opened: Opened) -> Iterator[str]:
    """The same in the background, as long as the context is open; its address."""
    with _listening(LOCAL, 0) as (listening, hosts, port):
        server, token = _server(opened, hosts)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://{LOCAL}:{port}/{token}/"
        finally:
            server.should_exit = True
            thread.join(10)


def _server(opened: Opened, hosts: frozenset[str]) -> tuple[Any, str]:
    """A server, and the token of its address."""
    try:
        import uvicorn

        from nrm.explore.server import make_app, new_token
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'nrm[explore]'") from error
    token = new_token()
    config = uvicorn.Config(make_app(opened, token, hosts), log_level="warning", access_log=False)
    return uvicorn.Server(config), token


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[tuple[socket.socket, frozenset[str], int]]:
    """A socket, by what names it may be called, and its port."""
    with contextlib.closing(_listen(host, port)) as listening:
        port = listening.getsockname()[1]
        hosts = frozenset(f"{_bracketed(name)}:{port}".lower() for name in _names(host))
        yield listening, hosts, port


def _names(host: str) -> set[str]:
    """What a server that listens at a host may be called."""
    if host in (LOCAL, "localhost", "::1"):
        return {host, "localhost", LOCAL}
    if host not in ("0.0.0.0", "::"):
        return {host}
    own = socket.gethostname()
    names = {own, socket.getfqdn(), "localhost", LOCAL, host}
    with contextlib.suppress(OSError):
        names |= {str(found[4][0]) for found in socket.getaddrinfo(own, None)}
    return names


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio does not switch off waiting for more to send, of 40 ms each time.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()
    except OSError as error:
        found.close()
        raise InputError(
            f"--port {port}: {host} cannot be listened at: {error.strerror}; leave --port out for "
            "any that is free"
        ) from error
    return found


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
