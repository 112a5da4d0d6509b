"""``diffusionrl serve-reward``: any reward over HTTP, for training processes that cannot hold it in their own.

    POST /score   {"images": [base64 PNG, ...], "prompts": [...], "metadata": [{...}, ...]}
                  -> {"scores": [number or null, ...], "error": why the last null is one, or null}
    GET  /health  -> {"reward": name}

Requests that wait are scored together. It listens on loopback; anywhere else only with a token (Authorization: Bearer). A body
must say that it is JSON, which a foreign web page cannot send without asking first.
"""

import hmac
import os
import queue
import threading
import time
from contextlib import ExitStack
from itertools import accumulate

import torch

from diffusionrl.config.rewards import ServeConfig
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward
from diffusionrl.rewards.base import Reward, Scores, looks_at_groups, score
from diffusionrl.serving.requests import MAX_PIXELS, Budget, Request, parse
from diffusionrl.web.server import BoundedServer, Handler, Refused, is_loopback

_PIXELS_AT_ONCE = 4096 * 4096  # in float32, before the reward: 200 MB
_BODIES_AT_ONCE = 256_000_000  # bytes


class RewardServer(BoundedServer):
    """Serves one reward.

    Raises:
        UserError: a reward that looks at whole groups, an open address without a token, or an address that cannot be had.
    """

    def __init__(self, reward: Reward, config: ServeConfig) -> None:
        if looks_at_groups(reward):
            raise UserError(
                f"{config.name} looks at all the samples of a prompt together, and a request may hold a part of them: "
                f"name it in the run itself (--reward {config.name})"
            )
        self.reward, self.config = reward, config
        self.token = os.environ.get(config.token_variable, "").strip()
        if not self.token and not is_loopback(config.host):
            raise UserError(
                f"{config.host} can be reached from other machines: set {config.token_variable} to a secret that its clients "
                "know too, or listen on 127.0.0.1"
            )
        self.places = threading.BoundedSemaphore(config.max_requests)
        self.bytes = Budget(max(config.max_bytes, _BODIES_AT_ONCE), "bytes")
        self.pixels, self.decoding = Budget(MAX_PIXELS, "pixels"), threading.Lock()
        self._jobs: queue.SimpleQueue[Request] = queue.SimpleQueue()
        super().__init__(config.host, config.port, _Handler, config.timeout, 4 * config.max_requests)
        threading.Thread(target=self._work, daemon=True).start()

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


class _Handler(Handler):
    server: RewardServer

    def get(self) -> None:
        self._check("/health")
        self.send_json(200, {"reward": self.server.config.name})

    def post(self) -> None:
        self._check("/score")
        scores = self._scores()
        pairs = zip(scores.values.tolist(), scores.valid.tolist(), strict=True)
        self.send_json(200, {"scores": [value if valid else None for value, valid in pairs], "error": scores.error})

    def more_headers(self) -> dict[str, str]:
        request_id = self.headers.get("X-Request-Id", "")
        return {"X-Request-Id": request_id[:200]} if request_id.isascii() and request_id.isprintable() else {}

    def _check(self, path: str) -> None:
        """Raises Refused where a request does not say what it must; before it takes anything of the server."""
        if self.path != path:
            raise Refused(404, "there are GET /health and POST /score")
        said = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(said, f"Bearer {self.server.token}".encode()):
            raise Refused(401, "the token is missing or wrong")
        self.check_host()

    def _scores(self) -> Scores:
        config, deadline = self.server.config, time.monotonic() + self.server.config.timeout
        length = self.length(config.max_bytes)
        with ExitStack() as held:
            if not self.server.places.acquire(blocking=False):
                raise Refused(503, f"{config.max_requests} requests are being answered already")
            held.callback(self.server.places.release)
            held.enter_context(self.server.bytes.taken(length))
            request = parse(self.read(length, deadline))
            held.enter_context(self.server.pixels.taken(request.pixels))
            request.decode(self.server.decoding)
            return self.server.score(request, deadline)


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
