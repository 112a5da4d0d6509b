"""What a prompt file is. Its content decides; its name does where the content leaves it open."""

import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from diffusionrl.data.folders import captions_in
from diffusionrl.data.tables import DELIMITERS, cells_of, read_utf8, rows_of
from diffusionrl.errors import UserError

Format = Literal["text", "json lines", "json", "table", "parquet", "captions"]
_HEAD = 1 << 16  # bytes that are looked at
_WHOLE = 1 << 28  # bytes of a file that is read whole
_OTHER = {
    b"\x1f\x8b": "compressed",
    b"PK\x03\x04": "a zip file or a spreadsheet",
    b"BZh": "compressed",
    b"\xfd7zXZ": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"\xd0\xcf\x11\xe0": "a spreadsheet or document",
    b"%PDF": "a PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""How files begin that are none of ours."""
_BEGUN = re.compile(r'\{\s*"|\[\s*["{]')  # text that can only be meant as JSON
_TEXTS = {"prompt", "prompts", "text", "texts", "caption", "captions", "description"}
_NAME = re.compile(r"[^\W\d][\w.-]*")  # of a column


def recognise(path: Path) -> Format:
    """Raises UserError for a file that holds no prompts in any form that is read here."""
    if path.is_dir():
        return "captions"
    with path.open("rb") as file:
        head = file.read(_HEAD)
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    for magic, kind in _OTHER.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {kind}: save the prompts as text in UTF-8, one a line, or as JSON lines or CSV")
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").splitlines() if line.strip()]
    first = lines[0].strip() if lines else ""
    found = _json_of(first, suffix)
    if found is not None:
        return found
    if suffix in (".csv", ".tsv") or _is_header(first, lines if len(head) < _HEAD else lines[:-1]):
        return "table"
    return "text"


def _json_of(first: str, suffix: str) -> Format | None:
    """Which form of JSON a file is, by its first line."""
    by_name: Format | None = {".json": "json", ".jsonl": "json lines", ".ndjson": "json lines"}.get(suffix)  # type: ignore[assignment]
    if not first.startswith(("{", "[")):
        return by_name
    try:
        return "json lines" if isinstance(json.loads(first), dict) else "json"
    except RecursionError:
        return by_name
    except json.JSONDecodeError as error:
        if error.pos >= len(first):  # it goes on in the next line
            return "json"
        return by_name or ("json lines" if _BEGUN.match(first) else None)
    except ValueError:
        return by_name


def _is_header(first: str, lines: list[str]) -> bool:
    """Whether the first line names columns: "prompt" among them, or another name for texts in what has the shape of a table."""
    for delimiter in DELIMITERS:
        names = [cell.casefold() for cell in cells_of(first, delimiter)]
        words = all(_NAME.fullmatch(name) or name in ("", "negative prompt") for name in names)
        if "prompt" in names and words:
            return True
        if len(names) > 1 and words and _TEXTS & set(names) and f"{delimiter} " not in first:
            try:
                widths = {len(row) for row in csv.reader(lines, delimiter=delimiter)}
            except csv.Error:
                continue
            if len(lines) > 1 and widths == {len(names)}:
                return True
    return False


def read_entries(path: Path, kind: Format, limit: int | None) -> list[tuple[str, Any]]:
    """Where each entry of a table, of a JSON file or of a folder of captions is, and what it says (or what is wrong with it).

    Raises:
        UserError: it cannot be read.
    """
    if kind == "captions":
        entries = captions_in(path, "prompts")
        return [(str(path / name), {"prompt": text, "file_name": name}) for name, text in islice(entries, limit)]
    if path.stat().st_size > _WHOLE:
        raise UserError(f"{path} is larger than {_WHOLE >> 20} MB: JSON lines (.jsonl) may hold as much as there is")
    text = read_utf8(path)
    found = _rows(text, path) if kind == "table" else _document(text, path)
    return list(islice(found, limit))


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for line, row in rows_of(text, path, ["prompt"], needed=["prompt"]) if text.strip() else ():
        yield f"{path}:{line}", row


def _document(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path}: not JSON ({error}); a list like ["a cat", "a dog"], or an object a line like {{"prompt": "a cat"}}'
        ) from error
    if isinstance(found, dict) and "prompt" in found:
        found = [found]
    if not isinstance(found, list):
        said = f"an object with the keys {sorted(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise UserError(f'{path} holds {said}, not a list of prompts like ["a cat"] or [{{"prompt": "a cat"}}]')
    for number, entry in enumerate(found, 1):
        yield f"{path}, entry {number}", entry
