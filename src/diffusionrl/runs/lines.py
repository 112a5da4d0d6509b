"""The small files of a run: JSON objects, a line each or a file each."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError
from diffusionrl.runs import checkpoint

PARTIAL = ".partial"
"""End of the name of what a killed process may leave behind."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return read_lines(run_dir / "metrics.jsonl")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with its "step"; a last line that a killed process left half-written is not one.

    Raises:
        UserError: naming the line that is broken.
    """
    found = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            found.append(_object(line, f"{file}:{number}", "remove that line, and the run goes on without it"))
            if not isinstance(found[-1].get("step"), int):
                raise UserError(f"{file}:{number} does not say of which step it is: remove that line")
    return found


def read_object(file: Path) -> dict[str, Any]:
    """Raises UserError where a file is no JSON object."""
    return _object(file.read_text(errors="replace"), str(file), "remove the file, and the run goes on without it")


def _object(text: str, where: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is broken ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is broken (a {type(found).__name__}, no object): {remedy}")
    return {sys.intern(key): value for key, value in found.items()}  # lines share their names, which are most of them


def append_line(file: Path, entry: dict[str, Any]) -> None:
    """Append an object to a JSONL file, down to the disk."""
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + PARTIAL)
    temporary.write_text(text, encoding="utf-8")
    checkpoint.flush(temporary)
    temporary.rename(path)
