"""Prompts: built-in sets, files of many kinds, and ``datasets``. Checked before torch is imported.

Files may hold millions. Of a text or JSONL file only the places of its lines are kept in memory (8 bytes each), and a prompt
is read when it is asked for; parquet and ``datasets`` are mapped into memory by that library. Tables and JSON lists are read
whole.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from diffusionrl.data.entries import Prompt as Prompt
from diffusionrl.data.entries import checked, content_of, from_entry, from_json, from_text, in_json
from diffusionrl.data.formats import Format, read_entries, recognise
from diffusionrl.emoji.vocabulary import prompt_sets
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.paths import describe, expand, is_there

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
"""Built-in sets beside those of the embedded world, a file each."""
CHECKED = 100_000  # lines that are checked before a run starts; the others, when they are drawn
_FILES = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_CHUNK = 1 << 22
_ROWS = 1000  # read at once: one by one, each takes tens of microseconds


def load_prompts(source: str, max_broken: int = 0, limit: int | None = None) -> Sequence[Prompt]:
    """A built-in set by name; ``dataset:ID`` or ``dataset:ID:SPLIT`` of the library ``datasets``; or a file, which is what its
    content says: one prompt a line; JSON lines or a JSON list, texts or objects with "prompt"; a table with a column "prompt";
    parquet, likewise. What an entry says beside the prompt is metadata; it may name images beside the
    file. A folder of images with captions gives the captions.

    Blank lines are skipped. Broken ones are too, up to ``max_broken`` of them. With a ``limit``, no more lines of a file are
    looked at, and no more rows are checked; what is found may be empty then.

    Raises:
        UserError: naming file and line.
    """
    built_in = prompt_sets()
    if source in built_in:
        return [Prompt(text) for text in built_in[source]]
    files = {file.stem: file for file in sorted(PROMPT_SETS.glob("*.txt"))}
    if source.startswith("dataset:"):
        return DatasetPrompts(source, max_broken, limit)
    path = files.get(source) or expand(source)
    if not is_there(path):
        raise UserError(f"prompts {source!r}: no such file, and no built-in set ({', '.join([*built_in, *files])})")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"prompts {source!r}: it is {describe(path)}: write the prompts to a file")
    try:
        kind = recognise(path)
        if kind == "parquet":
            return DatasetPrompts(str(path), max_broken, limit)
        if kind in ("text", "json lines"):
            return PromptFile(path, max_broken, limit, kind)
        return EntryPrompts(path, kind, max_broken, limit)
    except OSError as error:
        raise UserError(f"prompts {source!r} cannot be read: {error}") from error


def prompts_given(given: Sequence[str]) -> Sequence[Prompt]:
    """Of a command line: texts; or, where it is a single one, a built-in set or a file of prompts.

    Raises:
        UserError: see ``load_prompts``.
    """
    named = is_built_in(given[0]) or is_there(expand(given[0])) or given[0].lower().endswith(_FILES)
    return load_prompts(given[0]) if len(given) == 1 and named else [Prompt(text) for text in given]


def is_built_in(source: str) -> bool:
    return source in prompt_sets() or (PROMPT_SETS / f"{source}.txt").name in os.listdir(PROMPT_SETS)


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
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=in_json).encode()).hexdigest()


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

    def __init__(self, path: Path, max_broken: int = 0, limit: int | None = None, kind: Format = "text") -> None:
        super().__init__(max_broken)
        self.path, self.kind = path, kind
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._seen = self._state()
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
        if len(self) == 0 and (limit is None or len(self._bounds) <= limit):
            raise UserError(f"{path} holds no prompt: write one a line")

    def __len__(self) -> int:
        return len(self._starts)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _state(self) -> tuple[int, int]:
        """Of the file: size, and when it was last written to."""
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def _read(self, index: int) -> Prompt | None:
        start, end = int(self._starts[index]), int(self._ends[index])
        line = _read_at(self._file, start, end - start)
        if self._state() != self._seen:
            raise RunStopped(
                f"{self.path} was written to while it was in use, and its lines are elsewhere now: put it back as it was, or "
                "begin another run with it"
            )
        return _parse(line, self.kind, self.path, self._place(index) + 1)

    def _place(self, index: int) -> int:
        """Of a line among all: those that the check passes over have no index."""
        return int(np.searchsorted(self._bounds, self._starts[index]))


def _read_at(file: int, start: int, count: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, count, start)
    os.lseek(file, start, os.SEEK_SET)  # Windows
    return os.read(file, count)


def _line_bounds(path: Path, limit: int | None) -> tuple[np.ndarray, str]:
    """Where each line begins and the last one ends, up to so many, and a hash of what was read. One pass, in bounded memory.

    A line ends by LF, CR LF, or CR alone.
    """
    digest, bounds, position = hashlib.blake2b(digest_size=32), array("q", [0]), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            while chunk.endswith(b"\r") and (following := file.read(1)):  # a line feed may belong to it
                chunk += following
            digest.update(chunk)
            ends = _ends_in(chunk) + position + 1
            bounds.frombytes(ends.astype(np.int64).tobytes())
            position += len(chunk)
            if limit is not None and len(bounds) > limit:
                return np.frombuffer(bounds, dtype=np.int64)[: limit + 1], digest.hexdigest()
    if bounds[-1] != position:
        bounds.append(position)
    return np.frombuffer(bounds, dtype=np.int64), digest.hexdigest()


def _ends_in(chunk: bytes) -> np.ndarray:
    """Where lines end in it."""
    values = np.frombuffer(chunk, dtype=np.uint8)
    ends = values == ord("\n")
    if b"\r" in chunk:
        ends |= (values == ord("\r")) & ~np.append(ends[1:], False)
    return np.flatnonzero(ends)


def _parse(line: bytes, kind: Format, path: Path, number: int) -> Prompt | None:
    """A prompt, or None for a blank line. Raises UserError for a broken one."""
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    if not text:
        return None
    where = f"{path}:{number}"
    return from_json(text, path.parent, where) if kind == "json lines" else from_text(text, where)


class EntryPrompts(_Prompts):
    """The prompts of a file that is read whole, a table or a JSON list; or the captions of a folder of images.

    Raises:
        UserError: it cannot be read, too many entries are broken, or there is no prompt in it.
    """

    def __init__(self, path: Path, kind: Format, max_broken: int = 0, limit: int | None = None) -> None:
        super().__init__(max_broken)
        self._folder = path.parent
        self._entries = read_entries(path, kind, limit)
        images: list[str] = []

        def read(index: int) -> Prompt | None:
            prompt = self._read(index)
            if prompt is not None:
                images.extend(content_of(medium) for medium in prompt.media.values())
            return prompt

        if sum(self._check(len(self), read)) == 0:  # all of them are looked at
            raise UserError(f"{path} holds no prompt")
        said = json.dumps([[entry for _, entry in self._entries], images], default=str)
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, index: int) -> Prompt | None:
        where, entry = self._entries[index]
        if isinstance(entry, UserError):
            raise entry
        return from_entry(entry, self._folder, where)


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
        return checked(Prompt(text.strip()), where).text or None
