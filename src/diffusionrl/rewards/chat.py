"""Questions about images for an OpenAI-compatible server: retries, time limits, a cache on disk, a count of what was asked."""

import base64
import hashlib
import io
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import urllib3
from torch import Tensor

from diffusionrl.config import VLMConfig
from diffusionrl.errors import UserError
from diffusionrl.images import to_pil

MAX_REPLY_BYTES = 1_000_000
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # the server is busy or broken, not the question
_ID_PREFIX = "diffusionrl-"


class BadAnswer(Exception):
    """A question was not answered, or not properly. The message is for the user."""


class _TryAgain(BadAnswer):
    """... and the next try may be luckier."""


class ChatClient:
    """Asks one server about images.

    Every request carries an id of its image and question (X-Request-Id); a reply that carries the id of another one is refused.

    Raises:
        UserError: no model is named, or the cache cannot be opened.
    """

    def __init__(self, config: VLMConfig) -> None:
        if not config.model:
            raise UserError(f"rewards.vlm.model is needed: the name of the model that {config.url} serves")
        self.config = config
        self.counts = {"asked": 0, "cached": 0, "failed": 0}
        self._lock = threading.Lock()
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, block=True, retries=False)
        self._cache = AnswerCache(config.cache.expanduser()) if config.cache else None

    def ask(self, image: Tensor, question: str, options: dict[str, Any], read: Callable[[dict[str, Any]], float]) -> float:
        """What ``read`` finds in the answer about one image, (3, H, W) in [0, 1]. An answer that it refuses is not kept.

        Raises:
            BadAnswer: no proper answer after all tries.
        """
        png = io.BytesIO()
        to_pil(image).save(png, format="PNG")
        request = {"model": self.config.model, "question": question, **options}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode() + png.getvalue()).hexdigest()
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            self._count("cached")
            return read(kept)
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.config.model, "messages": [{"role": "user", "content": content}], **options}
        try:
            answer = self._ask_until_answered(json.dumps(body).encode(), key)
            value = read(answer)
        except BadAnswer:
            self._count("failed")
            raise
        if self._cache:
            self._cache.put(key, answer)
        return value

    def _ask_until_answered(self, body: bytes, key: str) -> dict[str, Any]:
        for attempt in range(self.config.retries + 1):
            try:
                self._count("asked")
                return self._ask_once(body, key)
            except _TryAgain as error:
                if attempt == self.config.retries:
                    raise BadAnswer(f"{error}, at the last of {attempt + 1} tries") from error
                time.sleep(self.config.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _ask_once(self, body: bytes, key: str) -> dict[str, Any]:
        url, timeout = f"{self.config.url.rstrip('/')}/chat/completions", self.config.timeout
        headers = {"Content-Type": "application/json", "X-Request-Id": _ID_PREFIX + key}
        api_key = os.environ.get(self.config.api_key_variable)
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        deadline = time.monotonic() + timeout
        response = None
        try:
            response = self._pool.request(
                "POST", url, body=body, headers=headers, timeout=timeout, redirect=False, preload_content=False
            )
            text = _read_until(response, deadline)
            response.release_conn()
        except _TryAgain:
            _drop(response)
            raise
        except (urllib3.exceptions.HTTPError, OSError) as error:
            _drop(response)
            raise _TryAgain(f"{url}: {_in_short(error, timeout)}") from error
        if response.status != 200:
            kind = _TryAgain if response.status in _AGAIN else BadAnswer
            raise kind(f"{url} answered {response.status}: {text[:200].decode(errors='replace').strip()}")
        echoed = response.headers.get("X-Request-Id", "")
        if echoed.startswith(_ID_PREFIX) and echoed != _ID_PREFIX + key:
            raise BadAnswer(f"{url} answered for another image")
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise _TryAgain(f"{url} answered with something else than JSON: {text[:100].decode(errors='replace')!r}") from error
        if not isinstance(answer, dict):
            raise BadAnswer(f"{url} answered with a JSON {type(answer).__name__}, not a chat completion")
        return answer

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


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
    """Close the connection: what is still to come on it would be taken for the next answer."""
    if response is not None:
        response.close()


def _in_short(error: Exception, timeout: float) -> str:
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # which urllib3 counts among the time-outs
    if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
        return f"no answer within {timeout:g} s"
    return f"{type(error).__name__}: {error}"


class AnswerCache:
    """Answers by key, in one SQLite file that several processes may share.

    Raises:
        UserError: the file cannot be made, or is no such database.
    """

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60, check_same_thread=False)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._database.commit()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the cache of answers {file} cannot be opened: {error}") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        with self._lock, suppress(sqlite3.Error):  # a cache that fails costs a question, not an answer
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return json.loads(row[0]) if row else None
        return None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        with self._lock, suppress(sqlite3.Error), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
