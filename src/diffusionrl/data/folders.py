"""Folders of images in the convention of ``datasets``' imagefolder: a file metadata.jsonl or metadata.csv names them, and says
what there is to say. Images are JPEG, PNG or WebP."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageOps

from diffusionrl.data.media import FORMATS
from diffusionrl.errors import RunStopped, UserError

_METADATA = ("metadata.jsonl", "metadata.csv")


def rows_of(folder: Path, setting: str, example: str) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, entry) of each line of a folder's metadata.

    Args:
        setting: which names the folder.
        example: of a line.

    Raises:
        UserError: no such folder, not one file of metadata in it, no line in that, or a broken one.
    """
    if not folder.is_dir():
        raise UserError(f"{setting} {str(folder)!r}: no such folder; give one of images, with lines like {example}")
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(found) != 1:
        said = "both" if found else "neither"
        raise UserError(
            f"{setting} {str(folder)!r} has {said} of {' and '.join(_METADATA)}: "
            f"captions are read from one of them, lines like {example}"
        )
    (file,) = found
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    rows = []
    for number, row in _rows_of_csv(text) if file.suffix == ".csv" else _rows_of_jsonl(text):
        if isinstance(row, Exception):
            raise UserError(f"{file}:{number}: {row}; each line is like {example}") from row
        rows.append((f"{file}:{number}", row if isinstance(row, dict) else {}))
    if not rows:
        raise UserError(f"{file} holds no caption: write a line an image like {example}")
    return rows


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


def text_in(row: dict[str, Any], column: str, where: str, example: str) -> str:
    """Raises UserError where there is none."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no {column}: an entry is like {example}")
    return text.strip()


def image_in(row: dict[str, Any], column: str, where: str, example: str) -> str:
    """The name of a file, relative to the folder. Raises UserError where there is none."""
    text_in(row, column, where, example)
    name = PurePath(row[column])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {str(name)!r} is outside of the folder: file names are relative to it")
    return str(name)


def decode(image: Path | bytes) -> Image.Image:
    """Upright, in RGB. Raises whatever a broken file leads Pillow to."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def check_broken(broken: dict[int, str], limit: int, setting: str) -> None:
    """Raises RunStopped where there are more than the setting allows."""
    if len(broken) > limit:
        raise RunStopped(
            f"{len(broken)} images do not decode as JPEG, PNG or WebP, more than {setting} = {limit}: "
            f"{'; '.join(list(broken.values())[:3])}"
        )
