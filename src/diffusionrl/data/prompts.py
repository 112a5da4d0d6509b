"""Prompts: built-in sets, text and JSONL files, parquet files and ``datasets``. Checked before torch is imported.

Files may hold millions. Of a text or JSONL file only the places of its lines are kept in memory (8 bytes each), and a prompt is
read when it is asked for; parquet and ``datasets`` are mapped into memory by that library.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from diffusionrl.emoji.vocabulary import prompt_sets
from diffusionrl.errors import RunStopped, UserError

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
"""Built-in sets beside those of the embedded world, a file each."""
MAX_LENGTH = 10_000  # characters
CHECKED = 100_000  # lines that are checked before a run starts; the others, when they are drawn
_MEDIA = ("image", "mask_image", "control_image")
"""Keys of a JSONL line that name an image for the pipeline, under the names of its arguments."""
_CHUNK = 1 << 22
_ROWS = 1000  # read at once: one by one, each takes tens of microseconds


@dataclass(frozen=True)
class Prompt:
    """What a sample is made from.

    Attributes:
        metadata: whatever its file says beside it, which is handed to the reward.
        media: images that the pipeline takes beside the text, by the name of its argument: paths, or PIL images.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Of what a model makes of it: prompts of one key are alike to it."""
        if not self.media:
            return self.text
        named = [(name, str(each) if isinstance(each, Path) else content_of(each)) for name, each in self.media.items()]
        return f"{self.text}\0{named}"


def load_prompts(source: str, max_broken: int = 0, limit: int | None = None) -> Sequence[Prompt]:
    """A built-in set by name; a ``.jsonl`` file, one object with "prompt" a line, which may name images beside the file; a
    ``.parquet`` file with a column "prompt"; ``dataset:ID`` or ``dataset:ID:SPLIT`` of the library ``datasets``, likewise; any
    other file, one prompt a line.

    Blank lines are skipped. Broken ones are too, up to ``max_broken`` of them. With a ``limit``, no more lines of a file are
    looked at, and no more rows are checked.

    Raises:
        UserError: naming file and line.
    """
    built_in = prompt_sets()
    if source in built_in:
        return [Prompt(text) for text in built_in[source]]
    files = {file.stem: file for file in sorted(PROMPT_SETS.glob("*.txt"))}
    path = files.get(source, Path(source))
    if source.startswith("dataset:"):
        return DatasetPrompts(source, max_broken, limit)
    if not path.is_file():
        raise UserError(f"prompts {source!r}: no such file, and no built-in set ({', '.join([*built_in, *files])})")
    return DatasetPrompts(source, max_broken, limit) if path.suffix == ".parquet" else PromptFile(path, max_broken, limit)


def keep_newest(known: dict[str, Any], count: int) -> None:
    """Drop what is known of all prompts but those that were entered last: there may be millions of them."""
    for prompt in list(known)[:-count]:
        del known[prompt]


def members_of(prompts: Sequence[str]) -> dict[str, list[int]]:
    """The indices of each prompt's samples."""
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    return members


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of their texts, metadata and images: a run that is taken up must have the same."""
    known = getattr(prompts, "fingerprint", None)
    if known is not None:
        return str(known)
    said = [[prompt.text, prompt.metadata, *map(content_of, prompt.media.values())] for prompt in prompts]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def content_of(medium: Any) -> str:
    """A hash of an image, a file or PIL's. Raises UserError where it cannot be read."""
    if not isinstance(medium, Path):
        return hashlib.blake2b(f"{medium.mode}{medium.size}".encode() + medium.tobytes(), digest_size=32).hexdigest()
    try:
        with medium.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise UserError(f"image {medium} of a prompt cannot be read: {error}") from error


class _Prompts(Sequence[Prompt]):
    """Prompts that are read when they are asked for. In the place of a broken one stands the next that is not.

    Attributes:
        broken: what is wrong with the broken ones that were found, by their place in the source.
        fingerprint: of the whole file, and of the images that the first 1,000 such prompts name; of a data set its length,
            columns, and first and last 1,000 rows.
    """

    def __init__(self, max_broken: int) -> None:
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}
        self.fingerprint = ""

    def _read(self, index: int) -> Prompt | None:
        """None for a blank one. Raises UserError for a broken one."""
        raise NotImplementedError

    def _place(self, index: int) -> int:
        return index

    def _check(self, count: int, read: Callable[[int], object | None]) -> Iterator[bool]:
        """Whether each of the first ``count``, read in order, is a prompt. Raises UserError where too many are broken."""
        for index in range(count):
            try:
                yield read(index) is not None
            except UserError as error:
                self.broken[self._place(index)] = str(error)
                if len(self.broken) > self.max_broken:
                    raise UserError(self._too_many()) from error
                yield False

    def _too_many(self) -> str:
        first = list(self.broken.values())[:3]
        if len(self.broken) == 1:
            return first[0]
        return f"{len(self.broken)} broken prompts, more than max_broken_prompts = {self.max_broken}: {'; '.join(first)}"

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Raises RunStopped where more than ``max_broken`` have turned out broken."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for further in range(len(self)):
            place = (index + further) % len(self)
            try:
                prompt = self._read(place)
            except UserError as error:
                self.broken[self._place(place)] = str(error)
                if len(self.broken) > self.max_broken:
                    raise RunStopped(self._too_many()) from error
                continue
            if prompt is not None:
                return prompt
        raise RunStopped("every prompt is blank or broken")


class PromptFile(_Prompts):
    """The prompts of a text or JSONL file.

    Raises:
        UserError: too many of the first ``CHECKED`` lines are broken, or there is no prompt in it.
    """

    def __init__(self, path: Path, max_broken: int = 0, limit: int | None = None) -> None:
        super().__init__(max_broken)
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._bounds, self.fingerprint = _line_bounds(path, limit)
        self._starts, self._ends = self._bounds[:-1], self._bounds[1:]
        count = min(CHECKED, len(self))
        images: list[str] = []

        def read(index: int) -> Prompt | None:
            prompt = self._read(index)
            if prompt is not None and prompt.media and len(images) < _ROWS:
                images.append(str([content_of(medium) for medium in prompt.media.values()]))
            return prompt

        good = np.fromiter(self._check(count, read), dtype=bool, count=count)
        if images:
            self.fingerprint = hashlib.sha256("".join([self.fingerprint, *images]).encode()).hexdigest()
        if not good.all():
            kept = np.concatenate([np.flatnonzero(good), np.arange(count, len(self))])
            self._starts, self._ends = self._starts[kept], self._ends[kept]
        if len(self) == 0:
            raise UserError(f"{path} holds no prompt: write one a line")

    def __len__(self) -> int:
        return len(self._starts)

    def __del__(self) -> None:
        os.close(self._file)

    def _read(self, index: int) -> Prompt | None:
        start, end = int(self._starts[index]), int(self._ends[index])
        return _parse(os.pread(self._file, end - start, start), self.path, self._place(index) + 1)

    def _place(self, index: int) -> int:
        """Of a line among all: those that the check passes over have no index."""
        return int(np.searchsorted(self._bounds, self._starts[index]))


def _line_bounds(path: Path, limit: int | None) -> tuple[np.ndarray, str]:
    """Where each line begins and the last one ends, up to so many, and a hash of what was read. One pass, in bounded memory."""
    digest, bounds, position = hashlib.blake2b(digest_size=32), array("q", [0]), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + position + 1
            bounds.frombytes(ends.astype(np.int64).tobytes())
            position += len(chunk)
            if limit is not None and len(bounds) > limit:
                return np.frombuffer(bounds, dtype=np.int64)[: limit + 1], digest.hexdigest()
    if bounds[-1] != position:
        bounds.append(position)
    return np.frombuffer(bounds, dtype=np.int64), digest.hexdigest()


def _parse(line: bytes, path: Path, number: int) -> Prompt | None:
    """A prompt, or None for a blank line. Raises UserError for a broken one."""
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    if not text:
        return None
    prompt = _from_json(text, path, number) if path.suffix == ".jsonl" else Prompt(text)
    return _checked(prompt, f"{path}:{number}")


def _checked(prompt: Prompt, where: str) -> Prompt:
    """Raises UserError where a text cannot be meant as a prompt."""
    text = prompt.text
    if len(text) > MAX_LENGTH:
        raise UserError(f"{where}: {len(text):,} characters in one prompt, at most {MAX_LENGTH:,}: one prompt a line")
    if "\0" in text:
        raise UserError(f"{where}: a NUL character at column {text.index(chr(0)) + 1}: is this a text file?")
    return prompt


def _from_json(text: str, path: Path, number: int) -> Prompt:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}:{number}: not JSON ({error}); each line is an object like {{"prompt": "a cat"}}') from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        found = f"has the columns {sorted(entry)}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise UserError(f'{path}:{number}: no "prompt" with text in it (the line {found})')
    media = _media(entry, path, number)
    return Prompt(entry.pop("prompt").strip(), entry | {name: str(file) for name, file in media.items()}, media)


def _media(entry: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    """The images that an entry names, relative to its file. Raises UserError for one that is not there."""
    media = {}
    for name in _MEDIA:
        if entry.get(name) is not None:
            file = path.parent / str(entry[name])
            if not file.is_file():
                raise UserError(f"{path}:{number}: {name} {entry[name]!r} is no file beside it ({file})")
            media[name] = file
    return media


def load_rows(source: str, setting: str) -> Any:
    """A ``datasets.Dataset``: of a ``.parquet`` file, or of ``dataset:ID[:SPLIT]``.

    Raises:
        UserError: ``datasets`` is not installed, or cannot load this; naming the setting.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{setting} {source!r} need the library datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    try:
        if source.startswith("dataset:"):
            name, _, split = source.removeprefix("dataset:").partition(":")
            return datasets.load_dataset(name, split=split or "train")
        return datasets.Dataset.from_parquet(source)
    except Exception as error:  # the library's own, pyarrow's, the hub's
        raise UserError(f"{setting} {source!r} cannot be loaded: {type(error).__name__}: {error}") from error


class DatasetPrompts(_Prompts):
    """The prompts of a ``.parquet`` file or of ``dataset:ID[:SPLIT]``; every column but "prompt" is metadata, and
    those of images, sound and the like, which would be decoded for nothing, are left out.

    Raises:
        UserError: ``datasets`` is not installed, it cannot load this, there is no column "prompt", or too many of the first
            ``CHECKED`` rows are broken.
    """

    def __init__(self, source: str, max_broken: int = 0, limit: int | None = None) -> None:
        super().__init__(max_broken)
        self.source = source
        self._rows = load_rows(source, "prompts")
        if "prompt" not in self._rows.column_names:
            raise UserError(f'{source} has no column "prompt", but {self._rows.column_names}')
        media = [name for name, feature in self._rows.features.items() if hasattr(feature, "decode_example")]
        self._rows = self._rows.remove_columns(media)
        ends = [*range(min(1000, len(self))), *range(max(0, len(self) - 1000), len(self))]
        said = [len(self), self._rows.column_names, [self._rows[i] for i in ends]]
        self.fingerprint = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()  # all rows would take too long
        texts = self._texts()
        count = min(CHECKED, len(self), len(self) if limit is None else limit)
        good = sum(self._check(count, lambda index: self._text(next(texts), index)))
        if good == 0:
            raise UserError(f"{source} holds no prompt")

    def __len__(self) -> int:
        return len(self._rows)

    def _texts(self) -> Iterator[Any]:
        """The column "prompt", many rows at once: what else a row holds may be large."""
        for batch in self._rows.select_columns("prompt").iter(_ROWS):
            yield from batch["prompt"]

    def _read(self, index: int) -> Prompt | None:
        entry = dict(self._rows[index])
        text = self._text(entry.pop("prompt"), index)
        return None if text is None else Prompt(text, entry)

    def _text(self, text: Any, index: int) -> str | None:
        """Of a prompt, or None for a blank one. Raises UserError for a broken one."""
        where = f"{self.source}, row {index}"
        if not isinstance(text, str):
            raise UserError(f"{where}: the prompt is a {type(text).__name__}, not a text")
        return _checked(Prompt(text.strip()), where).text or None
