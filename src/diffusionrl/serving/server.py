"""``diffusionrl serve-reward``: any reward over HTTP, for training processes that cannot hold it in their own.

    POST /score   {"images": [base64 PNG, ...], "prompts": [...], "metadata": [{...}, ...]}
                  -> {"scores": [number or null, ...], "error": why the last null is one, or null}
    GET  /health  -> {"reward": name}

Requests that wait are scored together. It listens on loopback; anywhere else only with a token (Authorization: Bearer). A body
must say that it is JSON, which a foreign web page cannot send without asking first.
"""

import hmac
import ipaddress
import json
import os
import queue
import socket
import sys
import threading
import time
import urllib.parse
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any

import torch

from diffusionrl.config.rewards import ServeConfig
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward
from diffusionrl.rewards.base import Reward, Scores, looks_at_groups, score
from diffusionrl.serving.requests import MAX_PIXELS, Budget, Refused, Request, parse

_PIXELS_AT_ONCE = 4096 * 4096  # in float32, before the reward: 200 MB
_BODIES_AT_ONCE = 256_000_000  # bytes
_MAX_DIGITS = 12  # of a length
_LOOK = 0.1  # seconds between two looks at who is late


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
        self.token = os.environ.get(config.token_variable, "").strip()
        if not self.token and not _is_loopback(config.host):
            raise UserError(
                f"{config.host} can be reached from other machines: set {config.token_variable} to a secret that its clients "
                "know too, or listen on 127.0.0.1"
            )
        self.places = threading.BoundedSemaphore(config.max_requests)
        self.bytes = Budget(max(config.max_bytes, _BODIES_AT_ONCE), "bytes")
        self.pixels, self.decoding = Budget(MAX_PIXELS, "pixels"), threading.Lock()
        self._connections = threading.BoundedSemaphore(4 * config.max_requests)
        self._deadlines: dict[socket.socket, float] = {}
        self._jobs: queue.SimpleQueue[Request] = queue.SimpleQueue()
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {config.host}:{config.port}: {error}") from error
        for work in (self._work, self._hang_up_on_the_late):
            threading.Thread(target=work, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Or hang up at once, where too many are connected: idle ones must not use up what the process may open."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def give_until(self, connection: socket.socket, deadline: float | None) -> None:
        """Hang up on a connection then, whatever it is doing; None: not any more."""
        if deadline is None:
            self._deadlines.pop(connection, None)
        else:
            self._deadlines[connection] = deadline

    def _hang_up_on_the_late(self) -> None:
        while True:
            time.sleep(_LOOK)
            now = time.monotonic()
            for connection in [each for each, deadline in list(self._deadlines.items()) if deadline < now]:
                self._deadlines.pop(connection, None)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def score(self, job: Request, deadline: float) -> Scores:
        """Of one request, when its turn has come.

        Raises:
            Refused: that is too late.
        """
        self._jobs.put(job)
        if not job.over.wait(max(0.0, deadline - time.monotonic())):
            job.given_up = True
            raise Refused(503, f"no scores within {self.config.timeout:g} s")
        assert job.scores is not None
        return job.scores

    def _work(self) -> None:
        """Score batch after batch, in the one thread that calls the reward."""
        waiting: Request | None = None
        while True:
            batch, waiting = self._next_batch(waiting or self._jobs.get())
            found = self._score(batch)
            if len(batch) > 1 and not any(scores.valid.any() for scores in found):  # one may have spoiled it for all
                found = [self._score([job])[0] for job in batch]
            for job, scores in zip(batch, found, strict=True):
                job.scores = scores
                job.over.set()

    def _score(self, batch: list[Request]) -> list[Scores]:
        """Of requests that are asked about together, each on its own; at most ``config.batch_size`` images at a time, and no
        more once nobody waits for them."""
        prompts = [prompt for job in batch for prompt in job.prompts]
        metadata = [each for job in batch for each in job.metadata]
        size = max(1, min(self.config.batch_size, _PIXELS_AT_ONCE // (batch[0].size[0] * batch[0].size[1])))
        parts: list[Scores] = []
        try:
            for part in (slice(first, first + size) for first in range(0, len(prompts), size)):
                if all(job.given_up for job in batch):
                    break
                images = torch.cat([job.images for job in batch]) if len(batch) > 1 else batch[0].images
                ready = images[part].permute(0, 3, 1, 2).float().div(255).contiguous()
                parts.append(score(self.reward, ready, prompts[part], metadata[part]))
            if left := len(prompts) - sum(len(each.values) for each in parts):
                parts.append(Scores(torch.zeros(left), torch.zeros(left).bool(), "nobody waits for it any more"))
            found = Scores.join(parts)
        except BaseException as error:  # no memory; or a reward that tries to end its thread, which is the server's
            nothing = torch.zeros(len(prompts))
            found = Scores(nothing, nothing.bool(), f"{type(error).__name__}: {error}")
        ends = list(accumulate(len(job.prompts) for job in batch))
        own = [slice(end - len(job.prompts), end) for job, end in zip(batch, ends, strict=True)]
        errors = [None if found.valid[part].all() else found.error for part in own]
        return [Scores(found.values[part], found.valid[part], error) for part, error in zip(own, errors, strict=True)]

    def _next_batch(self, first: Request) -> tuple[list[Request], Request | None]:
        """Requests for images of one size that come within ``config.wait``, and the one that did not fit in any more."""
        batch, end = [first], time.monotonic() + self.config.wait
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return batch, None
            images = sum(len(each.prompts) for each in [*batch, job])
            if images > self.config.batch_size or job.size != first.size:
                return batch, job
            batch.append(job)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffusionrl", ""
    wbufsize = -1  # head and body of a reply in one packet: two wait for each other 40 ms
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.config.timeout)  # so that a silent client frees its thread

    def handle_one_request(self) -> None:
        """Or hang up: a client has the time-out to begin, and once more for the request and its answer, however it drips."""
        self.server.give_until(self.connection, time.monotonic() + 2 * self.server.config.timeout)
        try:
            super().handle_one_request()
        finally:
            self.server.give_until(self.connection, None)

    def do_GET(self) -> None:
        try:
            self._check("/health")
        except Refused as refused:
            return self._send(refused.status, {"error": str(refused)})
        self._send(200, {"reward": self.server.config.name})

    def do_POST(self) -> None:
        try:
            self._check("/score")
            scores = self._scores()
        except Refused as refused:
            return self._send(refused.status, {"error": str(refused)})
        pairs = zip(scores.values.tolist(), scores.valid.tolist(), strict=True)
        self._send(200, {"scores": [value if valid else None for value, valid in pairs], "error": scores.error})

    def _check(self, path: str) -> None:
        """Raises Refused where a request does not say what it must; before it takes anything of the server."""
        if self.path != path:
            raise Refused(404, "there are GET /health and POST /score")
        said = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(said, f"Bearer {self.server.token}".encode()):
            raise Refused(401, "the token is missing or wrong")
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if _is_loopback(self.server.config.host) and not _is_loopback(host):  # a web page whose name was bound to this address
            raise Refused(421, "this server answers for loopback addresses alone")

    def _scores(self) -> Scores:
        config, deadline = self.server.config, time.monotonic() + self.server.config.timeout
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "Content-Length is needed")
        if len(length) > _MAX_DIGITS or int(length) > config.max_bytes:
            raise Refused(413, f"the body is longer than {config.max_bytes} bytes")
        with ExitStack() as held:
            if not self.server.places.acquire(blocking=False):
                raise Refused(503, f"{config.max_requests} requests are being answered already")
            held.callback(self.server.places.release)
            held.enter_context(self.server.bytes.taken(int(length)))
            request = parse(self._read(int(length), deadline))
            held.enter_context(self.server.pixels.taken(request.pixels))
            request.decode(self.server.decoding)
            return self.server.score(request, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        body = bytearray()
        while len(body) < length:
            if time.monotonic() > deadline:
                raise Refused(408, "the body did not come in time")
            try:
                part = self.rfile.read1(length - len(body))
            except TimeoutError as error:
                raise Refused(408, "the body did not come in time") from error
            if not part:
                raise Refused(400, "the body ended early")
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
        self.wfile.flush()
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
