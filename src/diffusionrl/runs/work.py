"""A folder that a command keeps its results in, for the same command to go on with: its settings are in NAME.json."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffusionrl.errors import UserError
from diffusionrl.paths import describe, is_there
from diffusionrl.runs.lines import replace_file
from diffusionrl.runs.places import flat


@contextmanager
def held(folder: Path, kind: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the folder is there, and no other process in it.

    Args:
        kind: what is in it: "search".
        settings: as JSON values.

    Raises:
        UserError: it is no folder, another process is in it, or it holds what was made with other settings, or something else.
    """
    check_folder(folder, kind)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:  # which is an OSError too
        raise UserError(f"another process is at work in {folder}: choose another --out, or wait for it") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error}: choose another --out") from error
    try:
        _keep_settings(folder, kind, dict(settings))
        yield
    finally:
        lock.release()


def check_folder(folder: Path, kind: str) -> None:
    """Raises UserError where no such results can be: it is no folder, or holds something else."""
    if not is_there(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is {describe(folder)}, not a folder: choose another --out")
    if not (folder / f"{kind}.json").is_file() and any(each.name != "lock" for each in folder.iterdir()):
        raise UserError(f"{folder} is there, and no {kind}: choose another --out")


def _keep_settings(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    """Raises UserError where what is there was made with others."""
    file = folder / f"{kind}.json"
    if not file.is_file():
        replace_file(file, json.dumps(settings, indent=2) + "\n")
        return
    before, now = flat(read_settings(folder, kind)), flat(settings)
    differing = [key for key in (*before, *(key for key in now if key not in before)) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"{folder} holds another {kind}: {key} was {before.get(key)!r}, and is {now.get(key)!r}{more}: choose another "
            "--out, or the same settings to go on"
        )


def read_settings(folder: Path, kind: str) -> dict[str, Any]:
    """KIND.json. Raises UserError where it is none."""
    file = folder / f"{kind}.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is broken ({error}): choose another --out") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is broken: choose another --out")
    return found
