"""A model behind an OpenAI-compatible server (vLLM and others), asked over plain HTTP.

A request that fails for a reason that may pass is repeated, later and later; what cannot pass (no
such address, key or model) is an error of one sentence.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import urlsplit

from coma_ds.data.chat import Fitted, Reply, Request
from coma_ds.data.records import Picture

log = logging.getLogger("coma_ds")

TRIES = 8
LONGEST_WAIT = 60.0  # seconds between two tries; the first is 1, then twice as long each time
LONGEST_ASKED = 300.0  # seconds that a server may ask for
TIMEOUTS = 2  # of one request
SILENCE = 30.0  # seconds between two lines about trouble
CONNECT = 30.0  # seconds to reach the server
PASSING = (408, 425, 429)  # and all from 500
OF_THE_REQUEST = (400, 413, 422)


class _Failed(Exception):
    """A try that may succeed later: why, and after how many seconds the server says."""

    def __init__(self, why: str, wait: float | None = None, timeout: bool = False) -> None:
        super().__init__(why)
        self.why, self.wait, self.timeout = why, wait, timeout


@dataclass
class ChatServer:
    """The model ``model`` of the server at ``url`` (``http://host:8000/v1``); safe in threads.

    ``timeout`` is in seconds for one reply.  ``pause`` waits for so many seconds; it ends early
    when ``close`` is called.  Raises ``ValueError`` for no address.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.7
    max_tokens: int = 1024
    max_pixels: int = 1024 * 28 * 28
    timeout: float = 600.0
    pause: Callable[[float], Any] | None = None
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)
    _live: set[HTTPConnection] = field(default_factory=set, repr=False)
    _answered: bool = False
    _served: bool = False  # a chat completion
    _said: float = -math.inf

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:  # a port that is none
            fits = False
        if not fits:
            raise ValueError(f"--server {self.url!r}: expected an address as http://host:8000/v1")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = f"{parts.path.rstrip('/')}/chat/completions"
        self.pause = self.pause or self._closed.wait

    def see(self, picture: Picture) -> str:
        """The picture as a data URL: a JPEG of at most ``max_pixels`` pixels."""
        stored = io.BytesIO()
        Fitted(picture, self.max_pixels).open().save(stored, "JPEG", quality=95, subsampling=0)
        return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply each, one after the other.

        Raises ``ValueError`` where no later request could fare better: nothing at the address,
        a key or a model that the server does not take, a server of another kind.
        """
        return [self._reply(request) for request in requests]

    def close(self) -> None:
        """End every request and wait of other threads; no further one is sent."""
        self._closed.set()
        for connection in list(self._live):
            sock = connection.sock
            if sock is not None:
                with suppress(OSError):  # gone already
                    sock.shutdown(SHUT_RDWR)

    def _reply(self, request: Request) -> Reply:
        body = json.dumps(self._body(request)).encode()
        timeouts = 0
        for number in range(1, TRIES + 1):
            try:
                return self._try(body)
            except _Failed as failed:
                timeouts += failed.timeout
                if number == TRIES or timeouts == TIMEOUTS:
                    return Reply(trouble=f"{self.url}: {failed.why}")
                wait = min(LONGEST_WAIT, 2.0 ** (number - 1))
                if failed.wait is not None:
                    wait = min(LONGEST_ASKED, max(0.0, failed.wait))
                if number > 2 and time.monotonic() - self._said > SILENCE:
                    self._said = time.monotonic()
                    log.warning("%s: %s; trying on", self.url, failed.why)
                self.pause(wait)  # type: ignore[misc]
        raise AssertionError

    def _body(self, request: Request) -> dict[str, Any]:
        first, *later = request.texts
        image = {"type": "image_url", "image_url": {"url": request.image}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [image, {"type": "text", "text": first}]}
        ]
        for place, text in enumerate(later):
            messages.append({"role": ("assistant", "user")[place % 2], "content": text})
        return {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_tokens,
            "seed": request.seed,
        }

    def _try(self, body: bytes) -> Reply:
        status, headers, data = self._post(body)
        if status == 200:
            return self._read(data)
        said = _message(data)
        if status in OF_THE_REQUEST:
            return Reply(refused=f"{self.url}: {status}, {said}")
        if status in PASSING or status >= 500:
            raise _Failed(f"the server answers {status}, {said}", _retry_after(headers))
        if status in (401, 403):
            how = "the key is not taken" if self.key else "it wants a key"
            raise ValueError(
                f"{self.url}: {status}, {how} ({said}); name the environment variable that holds "
                "the key with --api-key-env"
            )
        if status == 404:
            raise ValueError(
                f"{self.url}: 404 ({said}): either there is no model {self.model!r} (--model), or "
                "the address is not that of the API, which usually ends in /v1"
            )
        if 300 <= status < 400:
            place = headers.get("location", "nowhere")
            raise ValueError(f"{self.url}: {status}, it has moved to {place}; mend --server")
        raise ValueError(f"{self.url}: the server answers {status}, {said}")

    def _post(self, body: bytes) -> tuple[int, Any, bytes]:
        place = (self._host, self._port)
        if self._tls:
            connection = HTTPSConnection(*place, timeout=CONNECT, context=self._tls)
        else:
            connection = HTTPConnection(*place, timeout=CONNECT)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        self._live.add(connection)
        try:
            self._check_open()
            self._connect(connection)
            self._check_open()  # from here on close() finds the socket
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            self._answered = True
            return response.status, response.headers, response.read()
        except TimeoutError:
            raise _Failed(f"no answer within {self.timeout:g} seconds", timeout=True) from None
        except (OSError, HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise _Failed(f"the connection broke ({why})") from None
        finally:
            self._live.discard(connection)
            connection.close()
            self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ValueError(f"{self.url}: the run has ended")

    def _connect(self, connection: HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            why = error.strerror or str(error)
            if self._answered and not isinstance(error, ssl.SSLError):
                raise _Failed(f"nothing answers ({why})") from None
            raise ValueError(
                f"{self.url}: nothing answers there ({why}); start the server or mend --server"
            ) from None
        connection.sock.settimeout(self.timeout)

    def _read(self, data: bytes) -> Reply:
        try:
            choice = json.loads(data)["choices"][0]
            text, end = choice["message"]["content"] or "", choice.get("finish_reason")
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError):
            if self._served:  # a proxy's page, while the server behind it starts again
                raise _Failed(f"the answer is no chat completion ({_message(data)})") from None
            raise ValueError(
                f"{self.url}: the answer is no chat completion ({_message(data)}); is this an "
                "OpenAI-compatible server?"
            ) from None
        self._served = True
        return Reply(text, cut=end in ("length", "content_filter"))


def _message(data: bytes) -> str:
    """What a server says about an error, on one line."""
    text = data.decode(errors="replace")
    try:
        tree = json.loads(text)
        inner = tree.get("error", tree)
        inner = inner if isinstance(inner, dict) else {"message": inner}
        text = str(inner.get("message") or inner.get("detail") or text)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:200].rstrip(".") or "without a word"


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        return float(value)
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
        return (date - datetime.now(date.tzinfo or UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
