"""Real pairs of image and caption: scenes of the embedded world, or a folder of images."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Protocol

from PIL import Image, ImageOps

from diffusionrl.config import PretrainingConfig
from diffusionrl.data.media import FORMATS
from diffusionrl.emoji.scenes import draw_scene
from diffusionrl.errors import RunStopped, UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_EXAMPLE = '{"file_name": "0001.png", "text": "a cat"}'


class Pairs(Protocol):
    """Images with captions.

    Attributes:
        fingerprint: a run that is taken up must have the same.
        broken: what is wrong with the images that were found not to decode, by their number.
    """

    fingerprint: str
    broken: dict[int, str]

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """The pair that a number picks."""
        ...


def load_pairs(config: PretrainingConfig) -> Pairs | None:
    """What ``pretraining.source`` names; None where the loss is off.

    Raises:
        UserError: no such folder, no captions in it, or its first image does not decode.
    """
    if not config.source:
        return None
    return ScenePairs() if config.source == "emoji" else FolderPairs(Path(config.source), config.max_broken)


class ScenePairs:
    """The endless training set of the embedded world, with its own distribution."""

    def __init__(self) -> None:
        self.fingerprint = "emoji"
        self.broken: dict[int, str] = {}

    def draw(self, address: int) -> tuple[Image.Image, str]:
        scene = draw_scene(address, 0)
        return scene.image, scene.caption


class FolderPairs:
    """A folder in the convention of ``datasets``' imagefolder: metadata.jsonl or metadata.csv with file_name and text. Images
    are JPEG, PNG or WebP.

    In the place of an image that does not decode stands the next that does.

    Raises:
        UserError: as in ``load_pairs``.
    """

    def __init__(self, folder: Path, max_broken: int = 0) -> None:
        self.folder, self.max_broken = folder, max_broken
        self.broken: dict[int, str] = {}
        if not folder.is_dir():
            raise UserError(f'pretraining.source {str(folder)!r}: no such folder; give one of images and captions, or "emoji"')
        found = [folder / name for name in _METADATA if (folder / name).is_file()]
        if len(found) != 1:
            said = "both" if found else "neither"
            raise UserError(
                f"pretraining.source {str(folder)!r} has {said} of {' and '.join(_METADATA)}: "
                f"captions are read from one of them, lines like {_EXAMPLE}"
            )
        self._entries = list(_read_metadata(found[0]))
        if not self._entries:
            raise UserError(f"{found[0]} holds no caption: write a line an image like {_EXAMPLE}")
        self.fingerprint = hashlib.sha256(json.dumps(self._entries).encode()).hexdigest()
        try:
            self.draw(0)
        except RunStopped as error:
            raise UserError(str(error)) from error

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """Raises RunStopped where more than ``max_broken`` have turned out broken."""
        for further in range(len(self._entries)):
            place = (address + further) % len(self._entries)
            name, caption = self._entries[place]
            try:
                with Image.open(self.folder / name, formats=FORMATS) as image:
                    return ImageOps.exif_transpose(image).convert("RGB"), caption
            except Exception as error:  # Pillow raises whatever a broken file leads it to
                self.broken[place] = f"{self.folder / name} ({type(error).__name__}: {error})"
                check_broken(self.broken, self.max_broken)
        raise RunStopped(f"no image in {self.folder} decodes")


def check_broken(broken: dict[int, str], limit: int) -> None:
    """Raises RunStopped where there are more."""
    if len(broken) > limit:
        raise RunStopped(
            f"{len(broken)} images do not decode as JPEG, PNG or WebP, more than pretraining.max_broken = {limit}: "
            f"{'; '.join(list(broken.values())[:3])}"
        )


def _read_metadata(file: Path) -> Iterator[tuple[str, str]]:
    """(file name, caption) of each line. Raises UserError naming file and line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    for number, row in _rows_of_csv(text) if file.suffix == ".csv" else _rows_of_jsonl(text):
        if isinstance(row, Exception):
            raise UserError(f"{file}:{number}: {row}; each line is like {_EXAMPLE}") from row
        yield _checked(row, f"{file}:{number}")


def _rows_of_csv(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there, or the error that ends it."""
    rows = csv.DictReader(io.StringIO(text))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        yield rows.line_num, error


def _rows_of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there, or the error in its place."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, error


def _checked(row: Any, where: str) -> tuple[str, str]:
    entry = row if isinstance(row, dict) else {}
    for column in ("file_name", "text"):
        if not isinstance(entry.get(column), str) or not entry[column].strip():
            raise UserError(f"{where} has no {column}: an entry is like {_EXAMPLE}")
    name = PurePath(entry["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {str(name)!r} is outside of the folder: file names are relative to it")
    return str(name), entry["text"].strip()
