"""A small OpenAI-compatible server without a model, for answers that a real one rarely gives.

In: what it answers to each request. Out: its URL, and the requests that it got, until the `with` block ends. The same
client is tried on vLLM in `test_vllm_asked.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]
CARDS = [{"id": "base", "parent": None}, {"id": "mine", "parent": "base", "root": "/adapters/mine"}]


@dataclass
class Asked:
    """One server. `requests` are the path, the body and the headers of each request."""

    url: str
    requests: list[tuple[str, Any, Mapping[str, str]]] = field(default_factory=list)


def completion(tokens: list[str], logprobs: list[float | None], text: str = "answer") -> dict[str, Any]:
    return {"choices": [{"text": text, "logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}


def answers(body: Mapping[str, Any], shift: float) -> dict[str, Any]:
    """What a model answers: three tokens that it generates, or the log-probability of each letter of a prompt."""
    if not body.get("echo"):
        return completion(list("abc"), [-1.0 + shift, -2.0, -3.0], "abc")
    prompt = [str(token) for token in body["prompt"]]
    return completion([*prompt, "x"], [None, *(-1.0 - number % 3 + shift for number in range(len(prompt) - 1)), -1.0])


def server(body: Mapping[str, Any] | None, path: str, shift: float = 0.5) -> Reply:
    """A healthy server: the adapter changes every log-probability by `shift`."""
    if path == "/v1/models":
        return 200, {"data": CARDS}
    assert body is not None
    return 200, answers(body, shift if body["model"] == "mine" else 0.0)


@contextmanager
def answering(reply: Callable[[Mapping[str, Any] | None, str], Reply]) -> Iterator[Asked]:
    """Answer with `reply(body, path)`: a status, a body (bytes are sent as they are), and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            asked.requests.append((self.path, body, dict(self.headers)))
            status, content, *headers = reply(body, self.path)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        asked = Asked(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            http.shutdown()
            thread.join()
