"""Images from disk as samples: drawn by address, cropped, and remembered in checkpoints."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusionrl import processes
from diffusionrl.data.folders import check_broken
from diffusionrl.errors import RunStopped, UserError

Drawn = TypeVar("Drawn")


class Source(Protocol):
    """What there is to draw from: ``data.pairs`` and ``data.preferences``."""

    fingerprint: str
    broken: dict[int, str]


def draw_all(draw: Callable[[int], Drawn], addresses: Sequence[int]) -> list[Drawn]:
    """Raises RunStopped on all processes where one of them finds too many broken images."""
    drawn: list[Drawn] = []
    error = None
    try:
        drawn = [draw(address) for address in addresses]
    except RunStopped as raised:
        error = raised
    for said in processes.ask(str(error) if error else None):
        if said is not None:
            raise RunStopped(said) from error
    return drawn


def share_broken(source: Source, limit: int, setting: str) -> None:
    """What all processes have found broken, each knows. Raises RunStopped where that is too much."""
    for broken in processes.ask(list(source.broken.items())):
        source.broken.update(broken)
    check_broken(source.broken, limit, setting)


def cropped(image: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """The largest part of its shape in the middle, resized, in [0, 1], (3, H, W)."""
    _, height, width = shape
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def capture(source: Source) -> dict[str, Any]:
    """What a training step changes, and what it must find again, as JSON values."""
    return {"source": source.fingerprint, "broken": list(source.broken.items())}


def check(source: Source, state: dict[str, Any], others: str, allow_changes: bool) -> None:
    """Raises UserError where a captured state is of another source; ``others`` says so."""
    if state["source"] != source.fingerprint and not allow_changes:
        raise UserError(
            f"{others} than the run began with: choose another --name, or go on all the same with --checkpoint.allow-changes"
        )


def restore(source: Source, state: dict[str, Any]) -> None:
    """Be as at ``capture``; another source has other images that do not decode."""
    if state["source"] == source.fingerprint:
        source.broken.clear()
        source.broken.update((place, said) for place, said in state["broken"])
