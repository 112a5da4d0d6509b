"""A reward behind ``diffusionrl serve-reward``, in another environment or on another machine: ``--reward http://host:port``.

What is sent is 8-bit PNG images, prompts and metadata, as JSON; what comes back, one number or null for each. A request that
fails for good makes its own samples invalid, and no others.
"""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RemoteConfig
from diffusionrl.data.images import to_png
from diffusionrl.errors import describe
from diffusionrl.rewards.base import Scores
from diffusionrl.rewards.http import BadAnswer, JSONClient


class RemoteReward:
    """Asks the server in requests of ``config.batch_size`` images, several at once.

    Attributes:
        counts: requests made, tries included ("asked"), and without a proper answer ("failed").
    """

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.config = config
        self._http = JSONClient(
            f"{url.rstrip('/')}/score",
            config.concurrency,
            config.timeout,
            config.retries,
            config.backoff,
            config.token_variable,
            "scores",
        )
        self.counts = self._http.counts

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        parts = [slice(start, start + self.config.batch_size) for start in range(0, len(images), self.config.batch_size)]
        bodies = [self._body(images[part], prompts[part], metadata[part]) for part in parts]
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            results = list(pool.map(self._ask, bodies, [len(images[part]) for part in parts]))
        values = torch.tensor([value for scores, _ in results for value in scores], dtype=torch.float64)
        errors = [error for _, error in results if error]
        return Scores(values, values.isfinite(), errors[-1] if errors else None)

    def _body(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> bytes:
        encoded = [base64.b64encode(to_png(image)).decode() for image in images]
        return json.dumps({"images": encoded, "prompts": list(prompts), "metadata": list(metadata)}).encode()

    def _ask(self, body: bytes, count: int) -> tuple[list[float], str | None]:
        """``count`` scores, NaN where there is none, and the last reason why."""
        try:
            answer = self._http.post(body, hashlib.sha256(body).hexdigest())
            return _read(answer, count), answer.get("error")
        except Exception as error:  # a server may answer with anything, and the others have their scores
            self._http.count("failed")
            return [math.nan] * count, str(error) if isinstance(error, BadAnswer) else describe(error)


def _read(answer: dict[str, Any], count: int) -> list[float]:
    scores = answer.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise BadAnswer(f"the server's reply does not hold {count} scores: {json.dumps(answer)[:200]}")
    if not all(score is None or (isinstance(score, int | float) and not isinstance(score, bool)) for score in scores):
        raise BadAnswer(f"the server's scores are not numbers: {json.dumps(scores)[:200]}")
    return [math.nan if score is None or abs(score) > sys.float_info.max else float(score) for score in scores]
