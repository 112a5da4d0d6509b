"""What a person has chosen, kept as it is chosen.

selection.json   what was chosen among: a selection that is taken up must be of the same
choices.jsonl    a line a round that was judged, in order: what was shown, and which image was chosen, if any
metadata.jsonl   a line a pair, {"chosen", "rejected", "prompt"}: what ``--preferences`` reads; always what choices.jsonl says
images/          what was judged, by round and place
"""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusionrl.choosing.board import Board
from diffusionrl.errors import UserError
from diffusionrl.runs.lines import replace_file

KIND = "selection"


class Choices(Board):
    """Of a folder that is ``held`` (runs.work).

    Raises:
        UserError: a line of choices.jsonl is broken.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(several=False, about=f"kept in {folder}")
        self.folder, self._lines = folder, _read(folder / "choices.jsonl")
        self.answers = [None if line["chosen"] is None else [line["chosen"]] for line in self._lines]
        self.save()

    def save(self) -> None:
        lines = self._lines[: len(self.answers)]
        if len(lines) < len(self.answers):
            lines.append(self._line(len(lines)))
        for name, content in (("choices.jsonl", lines), ("metadata.jsonl", _pairs(lines))):
            replace_file(self.folder / name, "".join(f"{json.dumps(line)}\n" for line in content))
        self._lines = lines

    def _line(self, number: int) -> dict[str, Any]:
        """Of the round that was judged last, whose images come into the folder."""
        shown, chosen = self.rounds[number], self.answers[number]
        files = [file for file in shown.images if isinstance(file, Path)]
        names = [f"{image_name(number, place)}{file.suffix.lower()}" for place, file in enumerate(files)]
        for file, name in zip(files, names, strict=True):
            if chosen is not None and file != self.folder / name:  # where a model's are drawn
                (self.folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, self.folder / name)
        return {"prompt": shown.prompt, "shown": names, "chosen": None if chosen is None else chosen[0]}

    @property
    def chosen(self) -> int:
        """Rounds in which an image was chosen."""
        return sum(answer is not None for answer in self.answers)


def image_name(number: int, place: int) -> str:
    """Of a round's image, in the folder, without its ending."""
    return f"images/{number:05d}_{place}"


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
    """Raises UserError naming a line that is broken."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), 1):
        try:
            found.append(json.loads(line))
            _pairs(found[-1:])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{file}:{number} is broken ({error}): remove it and all below, which is asked again") from error
    return found
