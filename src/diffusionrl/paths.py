"""Paths as people type them."""

import os
from pathlib import Path

from diffusionrl.errors import UserError


def expand(name: str | Path) -> Path:
    """With the home folder in the place of ``~``.

    Raises:
        UserError: nobody is called so.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(name)!r}: there is no user of that name here, and so no home folder") from error


def is_there(path: Path) -> bool:
    """Something has this name; one that no disk can hold has nothing."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def describe(path: Path) -> str:
    """What is there, in words."""
    if not is_there(path):
        return "not there"
    return (
        "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder, but a pipe or a device"
    )
