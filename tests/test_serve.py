"""The server of local pages: who gets an answer, and what everybody else gets."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator

import pytest

from troodon.config import UsageError
from troodon.serve import Answer, Request, Server


def answer(request: Request) -> Answer:
    if request.path == "broken":
        raise RuntimeError("no such thing")
    return Answer(
        {"method": request.method, "path": request.path, "query": request.query, "body": request.body.decode()}
    )


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request(method, path, body, headers)
    with contextlib.closing(connection):
        response = connection.getresponse()
        assert response.headers["Cache-Control"] == "no-store"
        return response.status, response.read().decode()


def test_who_has_the_address_gets_the_page_and_nobody_else() -> None:
    with serving() as server:
        page = f"/{server.token}/"
        status, text = ask(server, f"{page}a%20b?since=3")
        assert status == 200
        assert json.loads(text) == {"method": "GET", "path": "a b", "query": {"since": "3"}, "body": ""}
        assert json.loads(ask(server, page, "POST", b"{}")[1])["body"] == "{}"
        assert ask(server, page, Host="localhost:9000")[0] == 200, "the end of a tunnel"
        for path in ("/", "/x/", f"/{server.token[:-1]}/", f"/{server.token}x/", "//" + server.token):
            assert ask(server, path)[0] == 403, path
        assert ask(server, page, Host="evil.example")[0] == 403
        assert ask(server, page, Host="127.0.0.1.evil.example:80")[0] == 403
        assert ask(server, page, "POST", b"{}", Origin="http://evil.example")[0] == 403
        assert ask(server, page, "POST", b"", **{"Content-Length": "99999999"})[0] == 413


def test_an_error_is_an_answer_and_the_server_goes_on() -> None:
    with serving() as server:
        assert ask(server, f"/{server.token}/broken") == (500, "RuntimeError: no such thing\n")
        assert ask(server, f"/{server.token}/")[0] == 200


def test_a_port_that_is_taken_is_named() -> None:
    with Server(answer) as server, pytest.raises(UsageError, match=f"port {server.server_port}: .*in use"):
        Server(answer, server.server_port)
    with pytest.raises(UsageError, match="port 70000"):
        Server(answer, 70000)
