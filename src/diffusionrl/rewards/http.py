"""JSON over HTTP for rewards that live on a server: retries, time limits, and no reply taken for another one's."""

import json
import os
import threading
import time
from typing import Any

import urllib3

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

    def _post_once(self, body: bytes, request_id: str) -> dict[str, Any]:
        self.count("asked")
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        key = os.environ.get(self.key_variable, "").strip()  # a file of secrets ends with a line's end
        if not (key.isascii() and key.isprintable()):
            raise BadAnswer(f"the environment variable {self.key_variable} holds what no header can: look at it")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        deadline = time.monotonic() + self.timeout
        response = None
        try:
            response = self._pool.request(
                "POST", self.url, body=body, headers=headers, timeout=self.timeout, redirect=False, preload_content=False
            )
            text = _read_until(response, deadline)
            response.release_conn()
        except _TryAgain:
            _drop(response)
            raise
        except (urllib3.exceptions.HTTPError, OSError) as error:
            _drop(response)
            raise _TryAgain(f"{self.url}: {_in_short(error, self.timeout)}") from error
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


def _read_until(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The whole body, however slowly it drips, but not beyond the deadline or ``MAX_REPLY_BYTES``."""
    text = b""
    while part := response.read1(65536):
        text += part
        if len(text) > MAX_REPLY_BYTES:
            raise _TryAgain(f"the server's reply is longer than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _TryAgain("the server's reply was not complete in time")
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
