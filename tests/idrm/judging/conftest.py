"""A chat completions endpoint of our own, whose judge and whose failures a test writes; response files."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

READ = re.compile(r"<response_1>\n(.*?)\n</response_1>.*<response_2>\n(.*?)\n</response_2>", flags=re.DOTALL)


def completion(text: Any, **choice: Any) -> dict[str, Any]:
    """A chat completion's body."""
    return {"model": "stub-2026", "choices": [{"message": {"role": "assistant", "content": text}, **choice}]}


@dataclass
class Reply:
    """What the server answers a request with: a body that is no text goes out as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Endpoint:
    """A running server, every request that it got, and the function that answers: a text, or a Reply."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[dict[str, Any]], str | Reply] = self.longer
        self._lock = threading.Lock()

    def reply(self, request: dict[str, Any], key: str | None) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
        answer = self.answer(request)
        return answer if isinstance(answer, Reply) else Reply(completion(answer))

    @staticmethod
    def responses(request: dict[str, Any]) -> tuple[str, str]:
        """The two responses in a question."""
        return READ.search(request["messages"][0]["content"]).groups()

    def longer(self, request: dict[str, Any]) -> str:
        """A judge that prefers the longer response and says what it compared."""
        first, second = map(len, self.responses(request))
        return f"{first} and {second} characters.\nVerdict: {1 if first > second else 2 if second > first else 'tie'}"


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    """A stub endpoint that prefers the longer response, until a test gives it another `answer`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = stub.reply(request, self.headers["Authorization"])
            body = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Endpoint(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def reply() -> type[Reply]:
    """Reply(body, status, headers): an answer that is no plain chat completion."""
    return Reply


@pytest.fixture
def chat_completion() -> Callable[..., dict[str, Any]]:
    """chat_completion(text): a body."""
    return completion


@pytest.fixture
def write_lines(tmp_path) -> Callable[..., Path]:
    """write_lines(name, records): a JSON Lines file; a record that is a string is a line as it is."""

    def write(name: str, records: list[dict[str, Any] | str]) -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
