"""Pages for the person at this machine alone: a server on 127.0.0.1, whose address holds a token that nobody can guess.

Other machines cannot reach it; other users and other pages of the browser do not know the token; and a name that is
made to lead here is refused by its Host header, so that no page of others reads the answers.
"""

import hmac
import json
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from troodon.config import UsageError

HOME = "127.0.0.1"
HOSTS = {HOME, "localhost", "[::1]"}  # of any port: a tunnel has another at its end
LARGEST = 1_000_000  # bytes of what a page may send
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Request:
    """What a page asks for: `path` is what follows the token, "" for the page itself; `body` is what it sends."""

    method: str  # GET or POST
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What it gets; a dict or a list becomes JSON. `policy` is the Content-Security-Policy of a page."""

    body: bytes | str | dict | list = b""
    kind: str = "text/html; charset=utf-8"
    status: int = 200
    policy: str = "default-src 'none'"


class Server(ThreadingHTTPServer):
    """Answers requests by `answer`, each in a thread of its own, once `serve_forever` runs.

    `port` 0 is any free one. UsageError for a port that is taken or is none.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Callable[[Request], Answer], port: int = 0):
        self.answer, self.token = answer, secrets.token_urlsafe(18)
        try:
            super().__init__((HOME, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"port {port}: {why.lower()}; 0 takes any that is free") from None

    @property
    def address(self) -> str:
        """The page's address, with the token; addresses in the page are relative to it."""
        return f"http://{HOME}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyrefly: ignore
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._reply(b"")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            return self._send(Answer(f"at most {LARGEST:,} bytes\n", "text/plain; charset=utf-8", 413))
        self._reply(self.rfile.read(int(length)))

    def _reply(self, body: bytes) -> None:
        address = urlsplit(self.path)
        token, slash, path = address.path.removeprefix("/").partition("/")
        if not (slash and self._allowed(token)):
            return self._send(Answer("the address is not the one that was printed\n", "text/plain; charset=utf-8", 403))
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        try:
            answer = self.server.answer(Request(self.command, unquote(path), query, body))
        except Exception as error:  # the next request may have a better answer
            answer = Answer(f"{type(error).__name__}: {error}\n", "text/plain; charset=utf-8", 500)
        self._send(answer)

    def _allowed(self, token: str) -> bool:
        """Whether the request has the token, names this machine, and comes from this page, if from any."""
        hosts = [self.headers.get("Host", "")]
        if (origin := self.headers.get("Origin")) is not None:
            hosts.append(urlsplit(origin).netloc)
        known = all(host.rpartition(":")[0] in HOSTS or host in HOSTS for host in hosts)
        return known and hmac.compare_digest(token.encode(), self.server.token.encode())

    def _send(self, answer: Answer) -> None:
        body, kind = answer.body, answer.kind
        if isinstance(body, dict | list):
            body, kind = json.dumps(body), "application/json"
        body = body.encode() if isinstance(body, str) else body
        self.send_response(answer.status)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Security-Policy": answer.policy}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a page asks every few seconds."""


def open_browser(address: str) -> bool:
    """Show the page in the browser of this desktop; False where there is none, as on a machine far away."""
    has_desktop = sys.platform in ("win32", "darwin") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    return has_desktop and "SSH_CONNECTION" not in os.environ and webbrowser.open(address)


def way_there(port: int) -> str:
    """The command by which one who is logged in from another machine sees the page there; "" for others."""
    if "SSH_CONNECTION" not in os.environ:
        return ""
    machine = os.environ["SSH_CONNECTION"].split()[2]
    return f"from the other machine: ssh -L {port}:{HOME}:{port} {machine}, then open the address there"
