"""The explorer's web server: on this machine only, for whoever has the token, and read-only but for decisions.

It answers on 127.0.0.1. Every request needs the token, in the address, a header or a cookie; the name that it is sent
to must be this machine's (a page elsewhere may point a name of its own at 127.0.0.1), and one that changes something
must come from this page. Images are asked for by number, never by path. Bodies are bounded.
"""

import json
import re
import secrets
import selectors
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from troodon.run import say

MAX_BODY = 64 * 2**20  # bytes of an image to search by, or of a list of images
MAX_JSON = 16 * 2**20
IDLE_SECONDS = 60  # after which a silent connection ends
HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is not followed: its HTTP status, and why in words."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Request:
    """What a route is given: the values of the address, and the body with its type."""

    values: Mapping[str, str]
    body: bytes = b""
    content_type: str = ""
    is_gone: Callable[[], bool] = lambda: False  # whether whoever asked has hung up, and waits for no answer

    def number(self, name: str, low: int, high: int, otherwise: int | None = None) -> int:
        """An integer from `low` to `high`. Refused with 400 for anything else."""
        text = self.values.get(name)
        if text is None and otherwise is not None:
            return otherwise
        if text is None or not re.fullmatch(r"-?\d{1,12}", text, re.ASCII) or not low <= int(text) <= high:
            raise Refused(400, f"{name}: a number from {low:,} to {high:,}")
        return int(text)

    @cached_property
    def json(self) -> dict:
        if len(self.body) > MAX_JSON:
            raise Refused(413, "too much at once")
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(value, dict):
            raise Refused(400, "the body is no object of JSON")
        return value


@dataclass(frozen=True)
class Answer:
    """What a route gives back."""

    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: Any) -> "Answer":
        return Answer(json.dumps(value, allow_nan=False).encode())


Routes = Mapping[tuple[str, str], Callable[[Request], Answer]]  # by method and path


class Server(ThreadingHTTPServer):
    """Serves a page and its routes until `shutdown`. `address` has the token."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, routes: Routes, port: int = 0):
        self.routes, self.token = routes, secrets.token_urlsafe(24)
        self.pages = {f"/{name}": page for name, page in page_files().items()}
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Its name: cookies of one machine are shared by all ports."""
        return f"troodon-{self.server_address[1]}"

    def server_bind(self) -> None:
        """Without looking up the name of this machine, which may take seconds."""
        if sys.platform != "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            say(f"explore: {type(error).__name__}: {error}")


def page_files() -> dict[str, Answer]:
    """The files of the page by name; "" is the page itself."""
    files = {}
    for file in resources.files("troodon.explore").joinpath("page").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind:
            files["" if file.name == "index.html" else file.name] = Answer(
                file.read_bytes(), f"{kind}; charset=utf-8", {"Cache-Control": "no-cache"}
            )
    return files


class Handler(BaseHTTPRequestHandler):
    """Checks a request, and answers it by a route or a file of the page."""

    server: Server  # pyrefly: ignore[bad-override-mutable-attribute]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "troodon", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses have the token."""

    def _respond(self, method: str) -> None:
        try:
            answer, status = self._answer(method), 200
        except Refused as refused:
            answer, status = Answer.of({"error": refused.reason}), refused.status
        except ConnectionError:
            raise
        except Exception as error:
            say(f"explore: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}")
            answer, status = Answer.of({"error": "the server failed at this; its terminal says why"}), 500
        if status != 200 and method == "POST":
            self.close_connection = True  # some of the body may not have been read
        self.send_response(status)
        headers = {"Cache-Control": "no-store"} | HEADERS | dict(answer.headers)
        headers |= {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body))}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _answer(self, method: str) -> Answer:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HERE.fullmatch(hosts[0].strip()):
            raise Refused(403, "asked for under another name than 127.0.0.1 or localhost")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].strip()}".lower():
            raise Refused(403, "asked by a page of another place")
        try:
            url = urlsplit(self.path)
            values = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True, max_num_fields=20).items()}
        except ValueError:
            raise Refused(400, "no address") from None
        self._check_token(values.pop("token", ""))
        body = self._body() if method == "POST" else b""
        if method == "GET" and url.path in self.server.pages:
            page = self.server.pages[url.path]
            cookie = f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
            return Answer(page.body, page.content_type, {**page.headers, "Set-Cookie": cookie})
        route = self.server.routes.get((method, url.path))
        if route is None:
            raise Refused(404, "there is nothing here")
        return route(Request(values, body, self.headers.get("Content-Type", ""), self._is_gone))

    def _is_gone(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            return bool(selector.select(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _check_token(self, in_address: str) -> None:
        given = [in_address, self.headers.get("X-Troodon-Token", "")]
        for cookie in self.headers.get("Cookie", "").split(";"):
            name, _, value = cookie.strip().partition("=")
            if name == self.server.cookie:
                given.append(value)
        token = self.server.token.encode()
        if not any(secrets.compare_digest(text.encode("utf-8", "replace"), token) for text in given):
            raise Refused(403, "no token, or a wrong one: open the address that `troodon explore` has printed")

    def _body(self) -> bytes:
        """The whole body of a request, of known length."""
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "the length of the body must be said")
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
            raise Refused(411, "the length of the body must be said")
        if int(text) > MAX_BODY:
            raise Refused(413, f"more than {MAX_BODY // 2**20} MB")
        data = self.rfile.read(int(text))
        if len(data) < int(text):
            raise Refused(400, "the body is shorter than it says")
        return data
