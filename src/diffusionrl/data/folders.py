"""Folders of images in the convention of ``datasets``' imagefolder: a file metadata.jsonl or metadata.csv names them, and says
what there is to say. Images are JPEG, PNG or WebP."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from diffusionrl.data.entries import check_encodes
from diffusionrl.data.tables import read_utf8
from diffusionrl.data.tables import rows_of as table_rows
from diffusionrl.errors import RunStopped, UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_KNOWN = ("file_name", "text", "chosen", "rejected", "prompt", "label")
"""Columns, however they are written."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
"""Ends of the names of images."""
_EXAMPLE = '{"file_name": "0001.png", "text": "a cat"}'


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
            f"captions are read from one of them, lines like {example}, or for each 0001.png from 0001.txt"
        )
    (file,) = found
    rows = list(_lines_of(file, example))
    if not rows:
        raise UserError(f"{file} holds no caption: write a line an image like {example}")
    return rows


def _lines_of(file: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_utf8(file)
    if file.suffix == ".csv":
        for number, cells in table_rows(text, file, _KNOWN) if text.strip() else ():
            if isinstance(cells, UserError):
                raise cells
            yield f"{file}:{number}", dict(cells)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: {error}; each line is like {example}") from error
            yield f"{file}:{number}", row if isinstance(row, dict) else {}


def captions_in(folder: Path, setting: str) -> list[tuple[str, str]]:
    """(file name, caption) of each image: of a folder's metadata, with the columns file_name and text; or, where it has none,
    from 0001.txt beside 0001.png, for every image.

    Raises:
        UserError: as in ``rows_of``; or an image has no caption.
    """
    if folder.is_dir() and not _has_metadata(folder):
        images = _images_in(folder)
        if any(image.with_suffix(".txt").is_file() for image in images):
            return _beside(folder, images)
    return [
        (image_in(row, "file_name", where, _EXAMPLE), text_in(row, "text", where, _EXAMPLE))
        for where, row in rows_of(folder, setting, _EXAMPLE)
    ]


def has_captions(folder: Path) -> bool:
    """Whether there is anything for ``captions_in`` to read."""
    return _has_metadata(folder) or any(image.with_suffix(".txt").is_file() for image in _images_in(folder))


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _METADATA)


def _images_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGES and each.is_file())


def _beside(folder: Path, images: Sequence[Path]) -> list[tuple[str, str]]:
    files = {image: image.with_suffix(".txt") for image in images}
    without = [image.name for image, text in files.items() if not text.is_file()]
    if without:
        raise UserError(
            f"{len(without)} images in {folder} have no caption in a .txt file beside them: {', '.join(without[:3])}"
        )
    found = []
    for image, file in files.items():
        caption = read_utf8(file).strip()
        if not caption:
            raise UserError(f"{file} is empty: it holds the caption of {image.name}")
        found.append((str(image.relative_to(folder)), caption))
    return found


def text_in(row: dict[str, Any], column: str, where: str, example: str) -> str:
    """Raises UserError where there is none."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        found = f" (it has {sorted(map(str, row))})" if row else ""
        raise UserError(f"{where} has no {column}{found}: an entry is like {example}")
    check_encodes(text, where)
    return text.strip()


def image_in(row: dict[str, Any], column: str, where: str, example: str) -> str:
    """The name of a file, relative to the folder. Raises UserError where there is none."""
    text_in(row, column, where, example)
    name = PurePath(row[column].strip())
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {str(name)!r} is outside of the folder: file names are relative to it")
    return str(name)


def is_file(path: Path) -> bool:
    """Neither a pipe, which would be waited for, nor what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def size_of(path: Path) -> int:
    """In bytes: an image that is exchanged has another. 0 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def check_broken(broken: dict[int, str], limit: int, setting: str) -> None:
    """Raises RunStopped where there are more than the setting allows."""
    if len(broken) > limit:
        raise RunStopped(
            f"{len(broken)} images do not decode as JPEG, PNG or WebP, more than {setting} = {limit}: "
            f"{'; '.join(list(broken.values())[:3])}"
        )
