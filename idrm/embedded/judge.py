"""A judge of the embedded demonstration's responses, behind a chat completions endpoint on this machine.

It knows the grammar that prompts and responses are drawn from (`idrm.embedded.generator`), and nothing else: a response
is right if it claims facts and all of them stand in the prompt, wrong if one of them does not, and says nothing if it
claims none. Right is better than nothing, and nothing better than wrong; manners and length do not count. It stands in
for a large model where none is at hand, and asks of `idrm judge` all that such a model would.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from idrm.embedded.generator import VALUES_OF_KEY
from idrm.judging.template import load_template

MODEL = "embedded-judge"
_CLAIM = re.compile("|".join(rf"{key.capitalize()}: [^.]*\." for key in VALUES_OF_KEY))


def standing(prompt: str, response: str) -> int:
    """1 for a response that claims facts of the prompt alone, 0 for one without claims, -1 for one with another."""
    claims = set(_CLAIM.findall(response))
    return 0 if not claims else 1 if claims <= set(_CLAIM.findall(prompt)) else -1


def answer(question: str) -> str:
    """What it replies to a question that the built-in template asks."""
    match = _question().fullmatch(question)
    if match is None:
        return "This is not the question that I was made for."
    first, second = (standing(match["prompt"], match[name]) for name in ("first", "second"))
    verdict = "tie" if first == second else "1" if first > second else "2"
    return f"The first response stands at {first}, the second at {second}.\n\nVerdict: {verdict}"


def _question() -> re.Pattern[str]:
    """The built-in template as a pattern that finds what it was filled with."""
    pattern = re.escape(load_template())
    for name in ("prompt", "first", "second"):
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>.*?)")
    return re.compile(pattern, flags=re.DOTALL)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": answer(request["messages"][0]["content"])}
        body = json.dumps({"model": MODEL, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing: `idrm judge` says what it asks."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Nothing: an asker that goes away has been told why, or was ended."""


@contextmanager
def serve() -> Iterator[str]:
    """Answers on a free port of this machine alone, until it is left; yields the address for `--endpoint`."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
