"""What besa itself asks a server: its models, its answers, and what is wrong with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from besa.bench.client import BrokenError, Client, NoAnswerError, StatusError, Target
from besa.bench.probe import PROMPTS, Probe
from tests.helpers import PATIENCE

Answer = tuple[int, bytes]


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, Answer]
    asked: list[dict[str, object]]

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append({**json.loads(body), "key": self.headers["Authorization"]})
        self._answer()

    def _answer(self) -> None:
        status, body = self.answers[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Served:
    """A server whose answers a test sets by path, and a client that asks it."""

    def __init__(self, url: str) -> None:
        self.answers = _Handler.answers = {}
        self.asked = _Handler.asked = []
        self.client = Client(Target(url, "tiny", "secret"), timeout=PATIENCE)


@pytest.fixture
def served() -> Iterator[Served]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Served(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_models(served: Served) -> None:
    served.answers["/v1/models"] = 200, b'{"data": [{"id": "a"}, {"id": "b"}]}'
    assert served.client.models() == ["a", "b"]


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"data": []}', b'{"data": [{}]}'])
def test_no_models(served: Served, body: bytes) -> None:
    served.answers["/v1/models"] = 200, body
    with pytest.raises(BrokenError, match="lists no model"):
        served.client.models()


def test_an_answer_is_greedy_and_the_key_is_shown(served: Served) -> None:
    served.answers["/v1/completions"] = 200, b'{"choices": [{"text": " upon"}]}'
    assert served.client.complete("Once", 12) == " upon"
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
    assert served.asked == [{**asked, "key": "Bearer secret"}]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b'{"choices": []}'), "has no text"),
        ((200, b"<html>"), "answers /v1/completions with what is no JSON"),
        ((404, b""), "answers /v1/completions with status 404"),
    ],
)
def test_a_bad_answer(served: Served, answer: Answer, message: str) -> None:
    served.answers["/v1/completions"] = answer
    with pytest.raises(BrokenError, match=message):
        served.client.complete("Once", 12)


def test_whether_a_server_ignores_eos(served: Served) -> None:
    """An error of the client's says no; an error of the server's is one."""
    served.answers["/v1/completions"] = 200, b"{}"
    assert served.client.ignores_eos()
    served.answers["/v1/completions"] = 422, b"{}"
    assert not served.client.ignores_eos()
    served.answers["/v1/completions"] = 500, b'{"status 4": 4}'
    with pytest.raises(StatusError) as caught:
        served.client.ignores_eos()
    assert caught.value.status == 500


def test_nobody_answers() -> None:
    with pytest.raises(NoAnswerError, match=r"cannot be reached: .*refused"):
        Client(Target("http://127.0.0.1:9", "tiny"), timeout=PATIENCE).models()


def test_an_answer_that_is_computed_otherwise_the_second_time_is_sound() -> None:
    answers = iter(["a"] * len(PROMPTS) + ["b"] * len(PROMPTS) + ["a", "b", "c"])
    probe = Probe(lambda _: next(answers))
    probe.check(0)
    probe.check(1)
    with pytest.raises(BrokenError, match="otherwise than before: 'It is said that' by 'c'"):
        probe.check(2)
