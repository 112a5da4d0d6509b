"""Code by name: ``package.module:function`` or ``file.py:function``. Nothing here imports torch, or what is named."""

import importlib
import os
import re
import sys
from importlib.machinery import PathFinder

from diffusionrl.errors import UserError
from diffusionrl.paths import expand


def is_code(name: str) -> bool:
    """Whether a name says a function somewhere, and no address, folder or hub id."""
    return re.fullmatch(r".+:[^\W\d]\w*", name) is not None and "://" not in name


def check_code(kind: str, name: str) -> None:
    """Raises UserError where there is no such file or package; ``kind`` is for the message."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        if not expand(place).is_file():
            raise UserError(f"{kind} {name!r}: there is no file {place}")
        return
    package = place.partition(".")[0]
    if package.isidentifier():
        importlib.invalidate_caches()
        places = [os.getcwd(), *sys.path]
        if package not in {*sys.builtin_module_names, *sys.modules} and PathFinder.find_spec(package, places) is None:
            raise UserError(f"{kind} {name!r} does not import: there is no module {package!r} here or installed")
