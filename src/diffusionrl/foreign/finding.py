"""Foreign code by name (``foreign.names``), imported; and whether it is the same as before."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError, describe
from diffusionrl.foreign import surroundings
from diffusionrl.foreign.thread import Job
from diffusionrl.paths import expand


def find_function(kind: str, name: str, signature: str) -> Callable[..., Any]:
    """``package.module:function``, looked up from the working directory too, or ``file.py:function``. The module is imported in
    the thread of foreign code (``foreign.thread``); ``kind`` and ``signature`` are for messages.

    Raises:
        UserError: it does not import, or is no function.
    """
    found: list[Any] = []
    job = Job(lambda: found.append(_import(name))).start()
    job.wait(math.inf)
    if job.raised is not None:  # whatever the user's module raises is the answer
        remedy = "" if isinstance(job.raised, Exception) else "; does it parse the command line? Put that under __main__"
        raise UserError(f"{kind} {name!r} does not import: {describe(job.raised)}{remedy}") from job.raised
    if not callable(found[0]):
        raise UserError(f"{kind} {name!r} is a {type(found[0]).__name__}, not a function {signature}")
    return found[0]


def _import(name: str) -> Any:
    module_name, _, attribute = name.rpartition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with surroundings.kept(f"the module of {name}", []):
        is_file = module_name.endswith(".py")
        return getattr(_import_file(expand(module_name)) if is_file else importlib.import_module(module_name), attribute)


def _import_file(file: Path) -> Any:
    """A module by its file, once; it may import what lies beside it."""
    path = str(file.absolute())
    digest = hashlib.sha256(path.encode()).hexdigest()
    for name in (file.stem, f"{file.stem}_{digest[:8]}"):  # another module may have that name
        known = sys.modules.get(name)
        if known is None:
            break
        if getattr(known, "__file__", None) == path:
            return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    if str(file.absolute().parent) not in sys.path:
        sys.path.append(str(file.absolute().parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def code_of(code: Any) -> dict[str, str | None]:
    """Hashes of foreign code: of the "function" (or the class of an object) itself, and of the "file" that it is in. None where
    there is none to be read."""
    code = code if inspect.isroutine(code) else type(code)
    found: dict[str, str | None] = {"function": None, "file": None}
    with suppress(TypeError, OSError, SyntaxError):
        found["function"] = hashlib.sha256(inspect.getsource(code).encode()).hexdigest()
        found["file"] = hashlib.sha256(Path(inspect.getfile(code)).read_bytes()).hexdigest()
    return found
