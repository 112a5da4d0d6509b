"""What a search leaves: images before and after on the same seeds, and what every candidate scored, image by image.

search.json       what was asked for, and the model's weights: a search that is taken up must be the same
images.jsonl      a line an image that is done: its scores before and after, every candidate's, and what was spent
before/  after/   00000.png ..., by the index of the line; grids of them beside
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image

from diffusionrl.data.images import image_grid
from diffusionrl.data.media import Show, shown, write_sample
from diffusionrl.errors import UserError
from diffusionrl.paths import describe, is_there
from diffusionrl.runs.lines import append_line, replace_file
from diffusionrl.runs.places import flat
from diffusionrl.sampling.search import Found

SIDES = ("before", "after")


class SearchFolder:
    """One that is written to, by one process at a time.

    Args:
        settings: of the search, as JSON values.

    Attributes:
        done: indices of the images that are there.

    Raises:
        UserError: it is no folder, another process is in it, or it is another search's, or something else's.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"another process is at work in {folder}: choose another --out, or wait for it") from error
        try:
            _keep_settings(folder, dict(settings))
            entries = read_images(folder)
            replace_file(folder / "images.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in entries))
            self.done = {entry["index"] for entry in entries}
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "SearchFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

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


def check_folder(folder: Path) -> None:
    """Raises UserError where no search can be: it is no folder, or holds something else."""
    if not is_there(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is {describe(folder)}, not a folder: choose another --out")
    if not (folder / "search.json").is_file() and any(each.name != "lock" for each in folder.iterdir()):
        raise UserError(f"{folder} is there, and no search: choose another --out")


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where the folder's search had others."""
    file = folder / "search.json"
    if not file.is_file():
        replace_file(file, json.dumps(settings, indent=2) + "\n")
        return
    before, now = flat(read_settings(folder)), flat(settings)
    differing = [key for key in (*before, *(key for key in now if key not in before)) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"{folder} holds another search: {key} was {before.get(key)!r}, and is {now.get(key)!r}{more}: choose another "
            "--out, or the same settings to go on"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """search.json. Raises UserError where it is none."""
    try:
        found = json.loads((folder / "search.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'search.json'} is broken ({error}): choose another --out") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / 'search.json'} is broken: choose another --out")
    return found


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
