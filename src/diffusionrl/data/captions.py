"""Captions of a folder of images: a table or JSON lines beside them, or a text file for each."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from diffusionrl.data.entries import check_encodes
from diffusionrl.data.tables import read_utf8, rows_of
from diffusionrl.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
EXAMPLE = '{"file_name": "0001.png", "text": "a cat"}'


def read_captions(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption) of each image, from metadata.jsonl or metadata.csv with file_name and text, as ``datasets`` reads
    them; or else from 0001.txt beside 0001.png, for every image of the folder.

    Raises:
        UserError: naming file and line.
    """
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(found) == 2:
        raise UserError(f"{folder} has both of {' and '.join(_METADATA)}: captions are read from one of them, remove the other")
    if found:
        entries = list(_read_metadata(found[0]))
        if not entries:
            raise UserError(f"{found[0]} holds no caption: write a line an image like {EXAMPLE}")
        return entries
    return _read_beside(folder)


def _read_beside(folder: Path) -> list[tuple[str, str]]:
    images = sorted(each for each in folder.rglob("*") if each.suffix.lower() in _IMAGES and each.is_file())
    files = {image: image.with_suffix(".txt") for image in images}
    without = [image.name for image, text in files.items() if not text.is_file()]
    if not images or len(without) == len(images):
        raise UserError(
            f"{folder} has neither of {' and '.join(_METADATA)}, nor text files beside its images: "
            f"captions are read from one of them, lines like {EXAMPLE}, or from 0001.txt beside 0001.png"
        )
    if without:
        raise UserError(
            f"{len(without)} images in {folder} have no caption in a .txt file beside them: {', '.join(without[:3])}"
        )
    captions = {image: read_utf8(text).strip() for image, text in files.items()}
    for image, caption in captions.items():
        if not caption:
            raise UserError(f"{files[image]} is empty: it holds the caption of {image.name}")
        check_encodes(caption, str(files[image]))
    return [(str(image.relative_to(folder)), caption) for image, caption in captions.items()]


def _read_metadata(file: Path) -> Iterator[tuple[str, str]]:
    text = read_utf8(file)
    if file.suffix == ".csv":
        if not text.strip():
            return
        for number, row in rows_of(text, file, ("file_name", "text")):
            if isinstance(row, UserError):
                raise row
            yield _checked(row, f"{file}:{number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: {error}; each line is like {EXAMPLE}") from error
            yield _checked(entry, f"{file}:{number}")


def _checked(row: Any, where: str) -> tuple[str, str]:
    entry = row if isinstance(row, dict) else {}
    for column in ("file_name", "text"):
        if not isinstance(entry.get(column), str) or not entry[column].strip():
            found = f" (it has {sorted(map(str, entry))})" if entry else ""
            raise UserError(f"{where} has no {column}{found}: an entry is like {EXAMPLE}")
    name = PurePath(entry["file_name"].strip())
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {str(name)!r} is outside of the folder: file names are relative to it")
    check_encodes(entry["text"], where)
    return str(name), entry["text"].strip()
