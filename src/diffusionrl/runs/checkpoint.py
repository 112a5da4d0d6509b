"""Checkpoints that are complete or not there, and verified before they are used.

A checkpoint is a folder ``step_000100`` of safetensors and JSON. It is written under another name; a manifest with each file's
size and SHA-256 comes last; every file is flushed to the disk; the folder is renamed into place and its parent flushed; only
then are older ones pruned. So whatever happens, the newest folder with a manifest is whole, or can be seen not to be.

There is no generator state in it: randomness is addressed (``seeds.py``).
"""

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl import processes
from diffusionrl.errors import RunStopped, UserError

FORMAT = 1
MANIFEST = "MANIFEST.json"
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can only be read by setting it


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: steps done.
        tensors: by file ("policy", "optimizer"), then by name.
        state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Corrupted(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that were renamed into place, oldest first."""
    steps = [step_of(path) for path in (run_dir / "checkpoints").glob("step_*")]
    return sorted(step for step in steps if step is not None)


def step_of(folder: Path) -> int | None:
    """What a folder of a step is called after; None of one that is called otherwise, such as a copy of somebody's."""
    digits = folder.name.removeprefix("step_")
    step = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else -1
    return step if folder.name == f"step_{step:06d}" else None


def save(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; one of the same step that is whole already is left alone.

    Raises:
        RunStopped: it cannot be written; what was there before is as it was.
    """
    final = folder_of(run_dir, checkpoint.step)
    if final.exists():
        try:
            verify(final)
            return final
        except Corrupted:
            _remove(final)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
        open_to_all(temporary)
        (temporary / "state.json").write_text(json.dumps(checkpoint.state))
        listed = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_bytes(_manifest({"format": FORMAT, "step": checkpoint.step, "files": listed}))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        temporary.rename(final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunStopped(
            f"the checkpoint of step {checkpoint.step} cannot be written to {final.parent}: {error}; it needs "
            f"{size_of(checkpoint.tensors) / 1e6:.1f} MB, and {free_bytes(run_dir) / 1e6:.1f} MB are free. "
            "Make room and give the same command again: the checkpoints before it are whole"
        ) from error
    return final


def prune(run_dir: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one: that of step ``best``, or else with the best score."""
    steps = complete_steps(run_dir)
    scores = {step: _score(folder_of(run_dir, step)) for step in steps if best is None}
    highest = max((score for score in scores.values() if score is not None), default=None)
    for step in steps[:-keep]:
        if step != best and (scores.get(step) is None or scores[step] != highest):
            _remove(folder_of(run_dir, step))


def forget(run_dir: Path, step: int) -> None:
    """Remove the checkpoint of a step, if there is one."""
    if folder_of(run_dir, step).exists():
        _remove(folder_of(run_dir, step))


def _remove(folder: Path) -> None:
    """Under another name first, so that a kill half-way leaves no folder that looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _score(folder: Path) -> float | None:
    """Of the evaluation at that step, if there was one."""
    try:
        score = json.loads((folder / "state.json").read_text())["score"]
    except (OSError, ValueError, KeyError):
        return None
    return score if score is not None and math.isfinite(score) else None


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Raises Corrupted where anything differs from the manifest."""
    manifest = verify(folder)
    try:
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise Corrupted(f"{folder}: {error}") from error
    if manifest.get("step") != step_of(folder):
        raise Corrupted(f"{folder}: its manifest is of step {manifest.get('step')}")
    if not isinstance(state, dict):
        raise Corrupted(f"{folder / 'state.json'} holds a {type(state).__name__}, not an object")
    return Checkpoint(manifest["step"], tensors, state)


def load_newest(run_dir: Path, exact: bool) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there never was one; says which ones it passed over, and renames them.

    Raises:
        UserError: there are some, and none can be used; or ``exact`` is asked for, and the newest one is corrupted.
    """
    steps = complete_steps(run_dir)
    for step in reversed(steps):
        try:
            return load(folder_of(run_dir, step))
        except Corrupted as error:
            if exact:
                raise UserError(
                    f"corrupted checkpoint: {error}; without --checkpoint.exact the run goes on from an older one"
                ) from error
            print(f"warning: corrupted checkpoint passed over: {error}", file=sys.stderr)
            broken = error
        if step == steps[0]:
            raise UserError(f"none of the {len(steps)} checkpoints in {run_dir} can be used ({broken}): choose another --name")
        folder = folder_of(run_dir, step)
        names = (folder.with_name(f"corrupted_{folder.name}{more}") for more in chain([""], (f"_{n}" for n in count(2))))
        folder.rename(next(name for name in names if not name.exists()))  # so that it does not count among those that are kept
    return None


def tell(found: Checkpoint | None) -> Checkpoint | None:
    """What the main process has found, on all of them."""
    if processes.count() == 1:
        return found
    said = processes.tell(None if found is None else [found.step, found.state])
    return None if said is None else Checkpoint(said[0], processes.tell_tensors(found.tensors if found else None), said[1])


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file has been compared with it.

    Raises:
        Corrupted: a file is missing, too many, or not the one that was written.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        if written != _manifest({key: value for key, value in manifest.items() if key != "sha256"}):
            raise ValueError("it was changed after it was written")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
        listed = manifest["files"]
        listed.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupted(f"{folder / MANIFEST}: {error}") from error
    try:
        found = {path.name: _describe(path) for path in folder.iterdir() if path.name != MANIFEST}
    except OSError as error:
        raise Corrupted(f"{folder}: {error}") from error
    for name in sorted(found.keys() ^ listed.keys()):
        raise Corrupted(f"{folder / name} is {'not in the manifest' if name in found else 'missing'}")
    for name in sorted(found):
        if found[name] != listed[name]:
            raise Corrupted(f"{folder / name} is not the file that was written: its size or SHA-256 differs")
    return manifest


def size_of(tensors: dict[str, dict[str, Tensor]]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for file in tensors.values() for tensor in file.values())


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder, or of the nearest parent that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk. On Windows, which opens no folder so, nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_all(folder: Path) -> None:
    """Its files to whom the umask says; safetensors writes them for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_UMASK)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest(content: dict[str, Any]) -> bytes:
    """In one canonical form, with its own SHA-256 in it."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()
