"""What a person has chosen, kept as it is chosen.

selection.json   what was chosen among: a selection that is taken up must be of the same
choices.jsonl    a line a round that was judged, in order: what was shown, and which image was chosen, if any
metadata.jsonl   a line a pair, {"chosen", "rejected", "prompt"}: what ``--preferences`` reads; always what choices.jsonl says
images/          what was judged, by round and place
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from diffusionrl.choosing.rounds import Round
from diffusionrl.errors import UserError
from diffusionrl.runs.lines import replace_file
from diffusionrl.runs.work import WorkFolder

KIND = "selection"


class Choices:
    """A folder of them, held by one process at a time.

    Args:
        settings: of the selection, as JSON values.

    Attributes:
        lines: of choices.jsonl; round ``len(lines)`` is the next one.

    Raises:
        UserError: see ``WorkFolder``; or a line of choices.jsonl is broken.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._work = folder, WorkFolder(folder, KIND, settings)
        try:
            self.lines = _read(folder / "choices.jsonl")
            self._write()
        except BaseException:
            self._work.release()
            raise

    def __enter__(self) -> "Choices":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._work.release()

    def keep(self, shown: Round, chosen: int | None) -> None:
        """The next round, and the place of the image that was chosen; None: none is better.

        Raises:
            OSError: it could not be kept, and is not.
        """
        names = [f"{self.image(len(self.lines), place)}{file.suffix.lower()}" for place, file in enumerate(shown.images)]
        if chosen is not None:
            for file, name in zip(shown.images, names, strict=True):
                self._copy(file, self.folder / name)
        self.lines.append({"prompt": shown.prompt, "shown": names, "chosen": chosen})
        try:
            self._write()
        except OSError:
            self.lines.pop()
            raise

    def undo(self) -> None:
        """Forget the newest line."""
        self.lines.pop()
        self._write()

    @staticmethod
    def image(number: int, place: int) -> str:
        """What an image is called in the folder, without its ending."""
        return f"images/{number:05d}_{place}"

    @property
    def chosen(self) -> int:
        """Rounds in which an image was chosen."""
        return sum(line["chosen"] is not None for line in self.lines)

    def _copy(self, file: Path, target: Path) -> None:
        if file != target:  # a model's are drawn there
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

    def _write(self) -> None:
        for name, lines in (("choices.jsonl", self.lines), ("metadata.jsonl", _pairs(self.lines))):
            replace_file(self.folder / name, "".join(f"{json.dumps(line)}\n" for line in lines))


def _pairs(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The image that was chosen, and each of the others."""
    return [
        {"chosen": line["shown"][line["chosen"]], "rejected": name, "prompt": line["prompt"]}
        for line in lines
        if line["chosen"] is not None
        for place, name in enumerate(line["shown"])
        if place != line["chosen"]
    ]


def _read(file: Path) -> list[dict[str, Any]]:
    """Lines, but for a last one that a killed process left half-written."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else (), 1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            _pairs([entry])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{file}:{number} is broken ({error}): remove it and all below, which is asked again") from error
        found.append(entry)
    return found
