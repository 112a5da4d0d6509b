"""What a search leaves: images before and after on the same seeds, and what every candidate scored, image by image.

search.json       what was asked for, and the model's weights: a search that is taken up must be the same
images.jsonl      a line an image that is done: its scores before and after, every candidate's, and what was spent
before/  after/   00000.png ..., by the index of the line; grids of them beside
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusionrl.data.images import image_grid
from diffusionrl.data.media import Show, shown, write_sample
from diffusionrl.errors import UserError
from diffusionrl.runs.lines import append_line, replace_file
from diffusionrl.sampling.search import Found

SIDES = ("before", "after")
KIND = "search"


class SearchFolder:
    """One that is ``held`` (runs.work), and written to.

    Attributes:
        done: indices of the images that are there.

    Raises:
        UserError: a line of images.jsonl is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, entries = folder, read_images(folder)
        replace_file(folder / "images.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in entries))
        self.done = {entry["index"] for entry in entries}

    def keep(self, found: Found, show: Show | None = None, sampling_rate: int | None = None) -> None:
        """One image: its files, and then its line. See ``Policy`` for ``show`` and ``sampling_rate``."""
        samples, failed = shown(show, torch.stack([found.before, found.after]))
        if failed is not None:
            print(f"warning: no pictures of image {found.index}: {failed}", file=sys.stderr)
        for side, sample in zip(SIDES, samples, strict=True):
            (self.folder / side).mkdir(exist_ok=True)
            write_sample(sample, self.folder / side / f"{found.index:05d}.png", sampling_rate)
        entry = {
            "index": found.index,
            "prompt": found.prompt.text,
            "seed": found.seed,
            **{side: {name: _or_none(value) for name, value in found.scores[side].items()} for side in SIDES},
            "spent": asdict(found.spent),
            "rounds": [asdict(each) for each in found.rounds],
        }
        append_line(self.folder / "images.jsonl", entry)
        self.done.add(found.index)

    def write_grids(self, columns: int) -> None:
        """``before.png`` and ``after.png``, of what is there."""
        for side in SIDES:
            tiles = [Image.open(self.folder / side / f"{index:05d}.png") for index in sorted(self.done)]
            if tiles:
                image_grid(tiles, columns).save(self.folder / f"{side}.png")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_images(folder: Path) -> list[dict[str, Any]]:
    """The lines of images.jsonl, in the order of the images; what a killed process left half-written is no line.

    Raises:
        UserError: naming the line that is broken.
    """
    file = folder / "images.jsonl"
    found = {}
    for number, line in enumerate(file.read_text().splitlines(keepends=True) if file.is_file() else (), 1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            found[int(entry["index"])] = entry
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{file}:{number} is broken ({error}): remove that line, and that image is made again") from error
    return [found[index] for index in sorted(found)]
