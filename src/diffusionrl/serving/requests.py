"""What a request to the reward server holds, checked and decoded within bounds that all requests share."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusionrl.data.media import to_rgb
from diffusionrl.rewards.base import Scores
from diffusionrl.web.server import Refused

MAX_PIXELS = 4 * 4096 * 4096
"""Of the images of all requests together, which are held in 8 bits: 200 MB."""
MAX_IMAGES = 1024
"""Of one request."""


class Budget:
    """So much of something for all requests together."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self._left, self._lock = total, what, total, threading.Lock()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Within it, as much is taken.

        Raises:
            Refused: there is not as much left now (503), or never is (413).
        """
        if amount > self.total:
            raise Refused(413, f"the request has {amount} {self.what}, more than {self.total}")
        with self._lock:
            if amount > self._left:
                raise Refused(503, f"other requests hold too many {self.what} at the moment")
            self._left -= amount
        try:
            yield
        finally:
            with self._lock:
                self._left += amount


@dataclass
class Request:
    """What is to be scored.

    Attributes:
        encoded: PNG files.
        size: of all of them, (width, height).
        images: (B, H, W, 3), 8 bits, once they are decoded.
        given_up: nobody waits for it any more.
    """

    encoded: list[bytes]
    size: tuple[int, int]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    given_up: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    scores: Scores | None = None

    @property
    def pixels(self) -> int:
        return len(self.encoded) * self.size[0] * self.size[1]

    def decode(self, turn: threading.Lock) -> None:
        """``images`` of ``encoded``, one after the other over all requests, as an image needs several times its size.

        Raises:
            Refused: one is broken.
        """
        decoded = torch.empty(len(self.encoded), self.size[1], self.size[0], 3, dtype=torch.uint8)
        for index, encoded in enumerate(self.encoded):
            with turn, _decoding(index):
                image = to_rgb(Image.open(io.BytesIO(encoded), formats=["PNG"]))
                decoded[index] = torch.from_numpy(np.asarray(image).copy())
        self.images, self.encoded = decoded, []


def parse(body: bytes) -> Request:
    """Raises Refused where the body is not what ``/score`` takes. No image is decoded yet."""
    try:
        request = json.loads(body)
        images, prompts, metadata = request["images"], request["prompts"], request["metadata"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(400, 'the body must be {"images": [...], "prompts": [...], "metadata": [...]}') from error
    columns = {"images": (images, str), "prompts": (prompts, str), "metadata": (metadata, dict)}
    for name, (column, kind) in columns.items():
        if not isinstance(column, list) or not column or not all(isinstance(entry, kind) for entry in column):
            raise Refused(400, f"{name} must be a list of JSON {'objects' if kind is dict else 'strings'}")
        if len(column) != len(images):
            raise Refused(400, f"there are {len(images)} images and {len(column)} {name}")
    if len(images) > MAX_IMAGES:
        raise Refused(413, f"there are {len(images)} images, more than {MAX_IMAGES}")
    encoded, sizes = [], set()
    for index, image in enumerate(images):
        with _decoding(index):
            encoded.append(base64.b64decode(image, validate=True))
            sizes.add(Image.open(io.BytesIO(encoded[-1]), formats=["PNG"]).size)  # of the header alone
    if len(sizes) > 1:
        raise Refused(400, "the images of one request must have one size")
    return Request(encoded, sizes.pop(), prompts, metadata)


@contextmanager
def _decoding(index: int) -> Iterator[None]:
    """Raises Refused where an image is no PNG."""
    try:
        yield
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(400, f"image {index} does not decode as PNG") from error
