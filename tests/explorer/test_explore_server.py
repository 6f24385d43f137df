"""The explorer's server as a stranger meets it: requests by hand; and the files of the page."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")

from support.explored import make_opened

from nrm.explore.bundle import modules
from nrm.explore.server import PAGE
from nrm.explore.serving import running


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(make_opened()) as found:
        yield found


# -- requests by hand ------------------------------------------------------------------------------


def ask(
    address: str, path: str, body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, str]:
    """The status and the text that the server answers."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.netloc, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in named)
    if body is not None and "Transfer-Encoding" not in named:
        named.setdefault("Content-Length", str(len(body)))
    for name, value in named.items():
        connection.putheader(name, value)
    connection.endheaders(body, encode_chunked="Transfer-Encoding" in named)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def session_of(address: str) -> str:
    status, text = ask(address, urlsplit(address).path + "api/open", b"{}")
    assert status == 200
    found = re.search(r'"session":"([^"]+)"', text)
    assert found is not None
    return found[1]


def test_strangers_are_refused(address: str) -> None:
    """Without the token, under another host's name, or from another page."""
    where = urlsplit(address)
    root = where.path
    for path in ("/", "/api/open", "/wrong/", "/wrong/api/open", root[:-2] + "/"):
        assert ask(address, path, b"{}")[0] == 403
    assert ask(address, root, method="GET", Host=where.netloc)[0] == 200
    for host in ("evil.example", f"evil.example:{where.port}", "127.0.0.1", "127.0.0.1:1", ""):
        status, text = ask(address, root, method="GET", Host=host)
        assert (status, "Host" in text) == (403, True)
    for origin in ("http://evil.example", "null", f"http://localhost:{where.port}"):
        assert ask(address, root + "api/open", b"{}", Origin=origin)[0] == 403
    assert ask(address, root + "api/open", b"{}", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(address, root + "api/open", b"{}", Origin=f"http://{where.netloc}")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "....//server.py", "/etc/passwd",
     "vendor/../../server.py", "vendor", "vendor/SHA256SUMS", "__init__.py", "api/nothing"],
)  # fmt: skip
def test_nothing_outside_of_the_page_is_read(address: str, path: str) -> None:
    status, text = ask(address, urlsplit(address).path + path, method="GET")
    assert status in (403, 404)
    assert "import" not in text
    assert "root:" not in text


def test_large_bodies_are_refused_however_they_are_sent(address: str) -> None:
    """100 MB, with their length told and without; and a request of too much JSON."""
    root, session = urlsplit(address).path, session_of(address)
    send = f"{root}api/send?session={session}&name=large.png"
    status, text = ask(address, send, bytes(100_000_000))
    assert (status, "at most 16 MB" in text) == (413, True)
    chunks = (bytes(2**20) for _ in range(20))
    status, text = ask(address, send, chunks, Transfer_Encoding="chunked")
    assert (status, "at most 16 MB" in text) == (413, True)
    status, text = ask(address, root + "api/view", b" " * 200_000)
    assert (status, "at most 0.125 MB" in text) == (413, True)


def test_what_is_no_request_is_refused_with_a_sentence(address: str) -> None:
    root = urlsplit(address).path
    assert ask(address, root + "api/view", b"[")[0] == 422
    assert ask(address, root + "api/view", b"[]")[0] == 422
    assert "has ended" in ask(address, root + "api/view", b'{"session": "no"}')[1]
    assert ask(address, root + "api/view", b"[" * 100_000)[0] == 422
    body = f'{{"session": "{session_of(address)}", "input": 99, "request": {{}}}}'
    assert "there is no input 99" in ask(address, root + "api/view", body.encode())[1]


def test_the_page_says_what_it_may_load(address: str) -> None:
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.netloc, timeout=60)
    connection.request("GET", where.path)
    answer = connection.getresponse()
    answer.read()
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert answer.headers["Referrer-Policy"] == "no-referrer"  # the address holds the token
    connection.close()


def test_vendored_files_are_what_they_were() -> None:
    """As listed in SHA256SUMS, with a licence each; nothing else lies there."""
    folder = PAGE / "vendor"
    rows = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    listed = {name: digest for digest, name in rows}
    assert {file.name for file in folder.iterdir()} == {*listed, "SHA256SUMS"}
    for name, digest in listed.items():
        assert sha256((folder / name).read_bytes()).hexdigest() == digest
    scripts = [name for name in listed if name.endswith(".js")]
    assert {f"{name.removesuffix('.min.js')}.LICENSE" for name in scripts} == {
        name for name in listed if name.endswith(".LICENSE")
    }


def test_the_page_makes_no_markup_of_texts() -> None:
    for file in PAGE.glob("*.js"):
        text = file.read_text()
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in text, file.name
        assert not re.search(r"https?://(?!www\.w3\.org)", text), file.name


def test_the_modules_of_the_page_declare_no_name_twice() -> None:
    """So that they can be joined; and nothing else is imported than by a line of its own."""
    page = modules("page.js")
    others = [modules(name).replace(page, "") for name in ("main.js", "kept.js", "widget.js")]
    text = "\n".join([page, *others]).replace("export default { render };", "")
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    assert "import(" not in text
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
