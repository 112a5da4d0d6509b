"""``diffusionrl serve-reward``: any reward over HTTP, for training processes that cannot hold it in their own.

    POST /score   {"images": [base64 PNG, ...], "prompts": [...], "metadata": [{...}, ...]}
                  -> {"scores": [number or null, ...], "error": why the last null is one, or null}
    GET  /health  -> {"reward": name}

Requests that wait are scored together. It listens on loopback; anywhere else only with a token (Authorization: Bearer). A body
must say that it is JSON, which a foreign web page cannot send without asking first.
"""

import base64
import hmac
import io
import ipaddress
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusionrl.config.rewards import ServeConfig
from diffusionrl.data.media import to_rgb
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward
from diffusionrl.rewards.base import Reward, Scores, looks_at_groups, score_groups

MAX_PIXELS = 4 * 4096 * 4096
"""Of the images of one request together."""


@dataclass
class _Job:
    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    given_up: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    scores: Scores | None = None


class _Refused(Exception):
    """A request that gets no scores: HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves one reward; ``serve_forever`` and ``shutdown`` as in the standard library.

    Raises:
        UserError: a reward that looks at whole groups, an open address without a token, or an address that cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reward: Reward, config: ServeConfig) -> None:
        if looks_at_groups(reward):
            raise UserError(
                f"{config.name} looks at all the samples of a prompt together, and a request may hold a part of them: "
                f"name it in the run itself (--reward {config.name})"
            )
        self.reward, self.config = reward, config
        self.token = os.environ.get(config.token_variable, "")
        if not self.token and not _is_loopback(config.host):
            raise UserError(
                f"{config.host} can be reached from other machines: set {config.token_variable} to a secret that its clients "
                "know too, or listen on 127.0.0.1"
            )
        self.places = threading.BoundedSemaphore(config.max_requests)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {config.host}:{config.port}: {error}") from error
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def score(self, job: _Job, deadline: float) -> Scores:
        """Of one request, when its turn has come.

        Raises:
            _Refused: that is too late.
        """
        self._jobs.put(job)
        if not job.over.wait(max(0.0, deadline - time.monotonic())):
            job.given_up = True
            raise _Refused(503, f"no scores within {self.config.timeout:g} s")
        assert job.scores is not None
        return job.scores

    def _work(self) -> None:
        """Score batch after batch, in the one thread that calls the reward."""
        waiting: _Job | None = None
        while True:
            batch, waiting = self._next_batch(waiting or self._jobs.get())
            batch = [job for job in batch if not job.given_up]
            found = self._score(batch)
            if len(batch) > 1 and not any(scores.valid.any() for scores in found):  # one may have spoiled it for all
                found = [self._score([job])[0] for job in batch]
            for job, scores in zip(batch, found, strict=True):
                job.scores = scores
                job.over.set()

    def _score(self, batch: list[_Job]) -> list[Scores]:
        """Of requests that are asked about together, each on its own; at most ``config.batch_size`` images at a time."""
        if not batch:
            return []
        prompts = [prompt for job in batch for prompt in job.prompts]
        metadata = [each for job in batch for each in job.metadata]
        try:
            images = torch.cat([job.images for job in batch])
            found = score_groups(self.reward, images, prompts, metadata, self.config.batch_size)
        except BaseException as error:  # no memory; or a reward that tries to end its thread, which is the server's
            nothing = torch.zeros(len(prompts))
            found = Scores(nothing, nothing.bool(), f"{type(error).__name__}: {error}")
        ends = list(accumulate(len(job.prompts) for job in batch))
        parts = [slice(end - len(job.prompts), end) for job, end in zip(batch, ends, strict=True)]
        errors = [None if found.valid[part].all() else found.error for part in parts]
        return [Scores(found.values[part], found.valid[part], error) for part, error in zip(parts, errors, strict=True)]

    def _next_batch(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """Requests for images of one size that come within ``config.wait``, and the one that did not fit in any more."""
        batch, end = [first], time.monotonic() + self.config.wait
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return batch, None
            images = sum(len(each.prompts) for each in [*batch, job])
            if images > self.config.batch_size or job.images.shape[1:] != first.images.shape[1:]:
                return batch, job
            batch.append(job)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffusionrl", ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.config.timeout)  # so that a silent client frees its thread

    def handle_one_request(self) -> None:
        """Or hang up: a client has the time-out to begin, and once more for the request and its answer, however it drips."""
        timer = threading.Timer(2 * self.server.config.timeout, self._hang_up)
        timer.daemon = True
        timer.start()
        try:
            super().handle_one_request()
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._send(404, {"error": "there are GET /health and POST /score"})
        self._send(200, {"reward": self.server.config.name})

    def do_POST(self) -> None:
        if not self.server.places.acquire(blocking=False):
            return self._send(503, {"error": f"{self.server.config.max_requests} requests are being answered already"})
        try:
            scores = self._scores()
        except _Refused as refused:
            self._send(refused.status, {"error": str(refused)})
        else:
            pairs = zip(scores.values.tolist(), scores.valid.tolist(), strict=True)
            self._send(200, {"scores": [value if valid else None for value, valid in pairs], "error": scores.error})
        finally:
            self.server.places.release()

    def _scores(self) -> Scores:
        config, deadline = self.server.config, time.monotonic() + self.server.config.timeout
        if self.path != "/score":
            raise _Refused(404, "there are GET /health and POST /score")
        said = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(said, f"Bearer {self.server.token}".encode()):
            raise _Refused(401, "the token is missing or wrong")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(411, "Content-Length is needed")
        if int(length) > config.max_bytes:
            raise _Refused(413, f"the body has {length} bytes, more than {config.max_bytes}")
        return self.server.score(_parse(self._read(int(length), deadline)), deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        body = bytearray()
        while len(body) < length:
            if time.monotonic() > deadline:
                raise _Refused(408, "the body did not come in time")
            try:
                part = self.rfile.read1(length - len(body))
            except TimeoutError as error:
                raise _Refused(408, "the body did not come in time") from error
            if not part:
                raise _Refused(400, "the body ended early")
            body += part
        return bytes(body)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        request_id = self.headers.get("X-Request-Id", "")
        if request_id.isascii() and request_id.isprintable():
            self.send_header("X-Request-Id", request_id[:200])
        if status != 200:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if status != 200:
            self._drain()

    def _drain(self) -> None:
        """End the connection, but let a client that still sends come to reading why, for a second."""
        self.close_connection = True
        end = time.monotonic() + 1
        self.connection.settimeout(0.1)
        with suppress(OSError):
            while time.monotonic() < end and self.rfile.read1(65536):
                pass

    def log_message(self, *arguments: Any) -> None:
        pass


def _parse(body: bytes) -> _Job:
    """Raises _Refused where the body is not what ``/score`` takes."""
    try:
        request = json.loads(body)
        images, prompts, metadata = request["images"], request["prompts"], request["metadata"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Refused(400, 'the body must be {"images": [...], "prompts": [...], "metadata": [...]}') from error
    columns = {"images": (images, str), "prompts": (prompts, str), "metadata": (metadata, dict)}
    for name, (column, kind) in columns.items():
        if not isinstance(column, list) or not column or not all(isinstance(entry, kind) for entry in column):
            raise _Refused(400, f"{name} must be a list of JSON {'objects' if kind is dict else 'strings'}")
        if len(column) != len(images):
            raise _Refused(400, f"there are {len(images)} images and {len(column)} {name}")
    opened: list[Image.Image] = []
    for index, encoded in enumerate(images):
        with _decoding(index):
            opened.append(Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"]))
    if len({image.size for image in opened}) > 1:
        raise _Refused(400, "the images of one request must have one size")
    pixels = sum(image.width * image.height for image in opened)
    if pixels > MAX_PIXELS:  # before any is decoded: a small file may hold a large image
        raise _Refused(413, f"the images have {pixels} pixels together, more than {MAX_PIXELS}")
    tensors: list[Tensor] = []
    for index, image in enumerate(opened):
        with _decoding(index):
            tensors.append(torch.from_numpy(np.array(to_rgb(image), dtype=np.float32) / 255))
    return _Job(torch.stack(tensors).permute(0, 3, 1, 2).contiguous(), prompts, metadata)


@contextmanager
def _decoding(index: int) -> Iterator[None]:
    """Raises _Refused where an image is no PNG."""
    try:
        yield
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Refused(400, f"image {index} does not decode as PNG: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(config: ServeConfig) -> None:
    """Until the process is ended.

    Raises:
        UserError: no such reward, or see ``RewardServer``.
    """
    server = RewardServer(load_reward(config.name, config.rewards), config)
    print(f"serving {config.name} on {server.url}: train with --reward {server.url}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
