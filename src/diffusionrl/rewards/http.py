"""JSON over HTTP for rewards that live on a server: retries, time limits, and no reply taken for another one's."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import urllib3

from diffusionrl.errors import UserError

MAX_REPLY_BYTES = 1_000_000
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # the server is busy or broken, not the question
_ID_PREFIX = "diffusionrl-"


class BadAnswer(Exception):
    """A question was not answered, or not properly. The message is for the user."""


class _TryAgain(BadAnswer):
    """... and the next try may be luckier."""


class JSONClient:
    """Posts JSON to one address, from several threads at once.

    Every request carries an id (X-Request-Id); a reply that carries the id of another one is refused.

    Args:
        concurrency: connections kept.
        timeout: seconds for one reply.
        retries: tries after the first one, when the server is busy, broken or not there.
        backoff: seconds before the first retry; each later one waits twice as long.
        key_variable: the environment variable that holds the key or token, if the server wants one.
        what: a proper reply, in words, for errors.

    Attributes:
        counts: how many requests were made, tries included ("asked"), and how many got no proper answer ("failed").
    """

    def __init__(
        self, url: str, concurrency: int, timeout: float, retries: int, backoff: float, key_variable: str, what: str
    ) -> None:
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.key_variable, self.what = key_variable, what
        self.counts = {"asked": 0, "failed": 0}
        self._lock = threading.Lock()
        self._pool = urllib3.PoolManager(maxsize=concurrency, block=True, retries=False)
        self._pool.pool_classes_by_scheme = {"http": _Plain, "https": _Encrypted}
        self._key()

    def post(self, body: bytes, request_id: str) -> dict[str, Any]:
        """The JSON object that the server answers with.

        Raises:
            BadAnswer: no proper answer after all tries.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._post_once(body, _ID_PREFIX + request_id)
            except _TryAgain as error:
                if attempt == self.retries:
                    raise BadAnswer(f"{error}, at the last of {attempt + 1} tries") from error
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _key(self) -> str:
        """Raises UserError where what the variable holds cannot be sent; it is not shown."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"the environment variable {self.key_variable} holds what is no token: characters that cannot be sent"
            )
        return key

    def _post_once(self, body: bytes, request_id: str) -> dict[str, Any]:
        self.count("asked")
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        response, exchange = None, _Exchange()
        watch = threading.Timer(self.timeout, exchange.hang_up)
        watch.daemon = True
        watch.start()
        _ongoing.exchange = exchange
        try:
            response = self._pool.request(
                "POST", self.url, body=body, headers=headers, timeout=self.timeout, redirect=False, preload_content=False
            )
            text = _read(response)
            response.release_conn()
        except _TryAgain:
            _drop(response)
            raise
        except (urllib3.exceptions.HTTPError, OSError) as error:
            _drop(response)
            said = f"no answer within {self.timeout:g} s" if exchange.late else _in_short(error, self.timeout)
            raise _TryAgain(f"{self.url}: {said}") from error
        finally:
            watch.cancel()
        if exchange.late:
            raise _TryAgain(f"{self.url}: no answer within {self.timeout:g} s")
        if response.status != 200:
            kind = _TryAgain if response.status in _AGAIN else BadAnswer
            raise kind(f"{self.url} answered {response.status}: {text[:200].decode(errors='replace').strip()}")
        echoed = response.headers.get("X-Request-Id", "")
        if echoed.startswith(_ID_PREFIX) and echoed != request_id:
            raise BadAnswer(f"{self.url} answered for another image")
        try:
            answer = json.loads(text)
        except ValueError as error:
            start = text[:100].decode(errors="replace")
            raise _TryAgain(f"{self.url} answered with something else than JSON: {start!r}") from error
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url} answered with a JSON {type(answer).__name__}, not {self.what}")
        return answer


_ongoing = threading.local()
"""``exchange``: the one that a thread is in."""


class _Exchange:
    """A request and its reply, which end together, however slowly a server drips its status, headers or body."""

    def __init__(self) -> None:
        self.connection: urllib3.connection.HTTPConnection | None = None
        self.late = False

    def hang_up(self) -> None:
        self.late = True
        sock = self.connection.sock if self.connection is not None else None
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _PlainConnection(urllib3.connection.HTTPConnection):
    def request(self, *arguments: Any, **named: Any) -> None:
        _ongoing.exchange.connection = self
        super().request(*arguments, **named)


class _EncryptedConnection(urllib3.connection.HTTPSConnection):
    def request(self, *arguments: Any, **named: Any) -> None:
        _ongoing.exchange.connection = self
        super().request(*arguments, **named)


class _Plain(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _Encrypted(urllib3.HTTPSConnectionPool):
    ConnectionCls = _EncryptedConnection


def _read(response: urllib3.BaseHTTPResponse) -> bytes:
    """The whole body, but not beyond ``MAX_REPLY_BYTES``."""
    text = b""
    while part := response.read1(65536):
        text += part
        if len(text) > MAX_REPLY_BYTES:
            raise _TryAgain(f"the server's reply is longer than {MAX_REPLY_BYTES} bytes")
    return text


def _drop(response: urllib3.BaseHTTPResponse | None) -> None:
    """Close the connection, as what is still to come on it would be taken for the next answer, and give its place back."""
    if response is not None:
        response.close()
        response.release_conn()


def _in_short(error: Exception, timeout: float) -> str:
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # which urllib3 counts among the time-outs
    if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
        return f"no answer within {timeout:g} s"
    return f"{type(error).__name__}: {error}"
