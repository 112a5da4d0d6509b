"""Images that people have judged: pairs of a chosen and a rejected one, or single ones with a label, from disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionrl.data.folders import check_broken, image_in, rows_of, size_of, text_in
from diffusionrl.data.media import decode
from diffusionrl.data.prompts import load_rows
from diffusionrl.errors import RunStopped, UserError

MAX_BROKEN = "max_broken_preferences"
"""The setting."""
_PAIR = '{"chosen": "0001.png", "rejected": "0002.png", "prompt": "a cat"}'
_SINGLE = '{"file_name": "0001.png", "label": 1, "prompt": "a cat"}'
_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
_LABELS = {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}


@dataclass(frozen=True)
class Judged:
    """Images of one prompt, and how they were judged: 1 for a chosen one, 0 for a rejected one."""

    prompt: str
    images: Sequence[Path | bytes]
    scores: Sequence[float]


class Preferences:
    """What was judged, an entry a pair or an image. In the place of an entry that does not decode stands the next that does.

    Attributes:
        size: images of an entry: 2 of a pair, 1 with a label.
        ties: entries without a winner, which are left out.
        fingerprint: of prompts, judgements, and names and sizes of the files; a run that is taken up must have the same.
        broken: what is wrong with the entries that were found not to decode, by their number.
    """

    size = 2
    ties = 0
    fingerprint = ""

    def __init__(self, source: str, max_broken: int) -> None:
        self.source, self.max_broken = source, max_broken
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def entry(self, place: int) -> Judged:
        raise NotImplementedError

    def draw(self, address: int) -> tuple[Judged, list[Image.Image]]:
        """The entry that a number picks, and its images. Raises RunStopped where more than ``max_broken`` turn out broken."""
        for further in range(len(self)):
            place = (address + further) % len(self)
            entry = self.entry(place)
            try:
                return entry, [decode(image) for image in entry.images]
            except Exception as error:  # Pillow raises whatever a broken file leads it to
                named = ", ".join(str(image) for image in entry.images if isinstance(image, Path)) or f"row {place}"
                self.broken[place] = f"{named} ({type(error).__name__}: {error})"
                check_broken(self.broken, self.max_broken, MAX_BROKEN)
        raise RunStopped(f"no image in {self.source} decodes")


def load_preferences(source: str, max_broken: int = 0) -> Preferences | None:
    """A folder with metadata.jsonl or metadata.csv (``data.folders``) of chosen, rejected and prompt, or of file_name, label
    and prompt; or a ``.parquet`` file, or ``dataset:ID[:SPLIT]``, with Pick-a-Pic's columns. None where none is named.

    Raises:
        UserError: it cannot be read, an entry has no prompt or no winner, or its first entry does not decode.
    """
    if not source:
        return None
    parquet = source.startswith("dataset:") or Path(source).suffix == ".parquet"
    found = ParquetPreferences(source, max_broken) if parquet else FolderPreferences(source, max_broken)
    try:
        found.draw(0)
    except RunStopped as error:
        raise UserError(f"preferences {source!r}: {error}") from error
    return found


class FolderPreferences(Preferences):
    """Of a folder, whose first line tells whether these are pairs or labelled images."""

    def __init__(self, source: str, max_broken: int) -> None:
        super().__init__(source, max_broken)
        self._folder = Path(source)
        rows = rows_of(self._folder, "preferences", _PAIR)
        self.size = 1 if "label" in rows[0][1] else 2
        self._entries = [(self._single if self.size == 1 else self._pair)(row, where) for where, row in rows]
        if self.size == 1 and len({scores for *_, scores in self._entries}) < 2:
            raise UserError(f"preferences {source!r}: all labels are alike, so there is nothing to tell apart")
        sizes = [[size_of(self._folder / name) for name in names] for _, names, _ in self._entries]
        self.fingerprint = hashlib.sha256(json.dumps([self._entries, sizes]).encode()).hexdigest()

    def _pair(self, row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...], tuple[float, ...]]:
        chosen, rejected = (self._file(row, column, where, _PAIR) for column in ("chosen", "rejected"))
        if chosen == rejected:
            raise UserError(f"{where}: {chosen!r} is chosen and rejected: a pair needs a winner, so leave ties out")
        return text_in(row, "prompt", where, _PAIR), (chosen, rejected), (1.0, 0.0)

    def _single(self, row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...], tuple[float, ...]]:
        file = self._file(row, "file_name", where, _SINGLE)
        label = _LABELS.get(str(row.get("label")).strip().lower())
        if label is None:
            raise UserError(f"{where}: the label must be 1 or 0, not {row.get('label')!r}: an entry is like {_SINGLE}")
        return text_in(row, "prompt", where, _SINGLE), (file,), (label,)

    def _file(self, row: dict[str, Any], column: str, where: str, example: str) -> str:
        name = image_in(row, column, where, example)
        if not (self._folder / name).is_file():
            raise UserError(f"{where}: {column} {name!r} is no file in {self._folder}")
        return name

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, place: int) -> Judged:
        prompt, names, scores = self._entries[place]
        return Judged(prompt, [self._folder / name for name in names], scores)


class ParquetPreferences(Preferences):
    """With Pick-a-Pic's columns: the images jpg_0 and jpg_1, caption, and label_0, which is 1 where jpg_0 was chosen, 0 where
    jpg_1 was, and 0.5 or missing where neither was."""

    def __init__(self, source: str, max_broken: int) -> None:
        super().__init__(source, max_broken)
        rows = load_rows(source, "preferences")
        missing = [name for name in _COLUMNS if name not in rows.column_names]
        if missing:
            raise UserError(f"preferences {source!r} has no column {', '.join(missing)}, but {rows.column_names}")
        for name, feature in rows.features.items():
            if hasattr(feature, "decode_example"):  # decoded here alone, where formats are limited
                rows = rows.cast_column(name, type(feature)(decode=False))
        self._rows = rows.select_columns(list(_COLUMNS))
        labels, captions = list(rows["label_0"]), list(rows["caption"])
        self._places = []
        for place, (label, caption) in enumerate(zip(labels, captions, strict=True)):
            if label not in (0, 0.5, 1, None):
                raise UserError(f"{source}, row {place}: label_0 must be 0, 1, or 0.5 for a tie, not {label!r}")
            if label in (0.5, None):
                continue
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"{source}, row {place} has no caption")
            self._places.append(place)
        self.ties = len(labels) - len(self._places)
        if not self._places:
            raise UserError(f"preferences {source!r}: none of {len(labels)} pairs has a winner (label_0 1 or 0)")
        self.fingerprint = hashlib.sha256(json.dumps([labels, captions, size_of(Path(source))]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, place: int) -> Judged:
        row = self._rows[self._places[place]]
        images = [each["bytes"] if isinstance(each, dict) else each for each in (row["jpg_0"], row["jpg_1"])]
        chosen, rejected = images if row["label_0"] == 1 else reversed(images)
        return Judged(row["caption"].strip(), [chosen, rejected], (1.0, 0.0))
