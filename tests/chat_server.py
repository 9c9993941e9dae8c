"""An OpenAI-compatible server in a thread that says what a test tells it to."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

# A text is a completion, (text, finish reason) one that ended otherwise, else status, body, headers
Answer = str | tuple[str, str] | tuple[int, Any, dict[str, str]]
Behaviour = Callable[[dict, int], Answer]


def texts_of(body: dict) -> list[str]:
    """The texts of a request's messages, the image left out."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        found += [part["text"] for part in parts if part["type"] == "text"]
    return found


def image_of(body: dict) -> Image.Image:
    """The picture of a request, which stands first in it."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def asked_for(body: dict) -> int:
    """How many questions a request wants; 0 for one that asks a question."""
    found = re.search(r"exactly (\d+) questions", texts_of(body)[-1])
    return int(found[1]) if found else 0


def mark_of(body: dict) -> str:
    """Eight letters that stand for the whole request: image, messages, seed and all."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=4).hexdigest()


def well(body: dict, _: int = 0) -> str:
    """A good reply, which depends on everything in the request."""
    mark = mark_of(body)
    if count := asked_for(body):
        return json.dumps([f"What is part {number} of {mark}?" for number in range(count)])
    return f"It is {mark}."


class ChatStandIn:
    """``bodies`` and ``headers`` of all requests; ``url`` is what a user gives."""

    def __init__(self, behave: Behaviour) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers) | {"path": self.path})
                status, content, headers = as_http(behave(body, number))
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that is gone
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def as_http(answer: Answer) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of an answer."""
    if isinstance(answer, tuple) and len(answer) == 3:
        return answer
    text, end = answer if isinstance(answer, tuple) else (answer, "stop")
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end}
    return 200, {"choices": [choice]}, {}


@contextmanager
def chat_server(behave: Behaviour = well) -> Iterator[ChatStandIn]:
    """A server that is there inside."""
    server = ChatStandIn(behave)
    server.start()
    try:
        yield server
    finally:
        server.stop()
