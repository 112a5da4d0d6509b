"""Where things are: the run folder, and what a configuration names. Nothing here imports torch."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffusionrl.config import TrainConfig
from diffusionrl.config.files import read_yaml
from diffusionrl.config.run import plain
from diffusionrl.data.prompts import is_built_in
from diffusionrl.errors import UserError
from diffusionrl.foreign.names import check_code, is_code
from diffusionrl.paths import describe, expand, is_there
from diffusionrl.runs.hub import PICKLES, is_single_file, local_folder

EMBEDDED = ("emoji", "emoji-flow")


def is_held(run_dir: Path) -> bool:
    """A process is at work in the folder."""
    if not (run_dir / "lock").is_file():
        return False
    try:
        with FileLock(run_dir / "lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to write to
        return False


def check_run_dir(run_dir: Path) -> None:
    """Raises UserError where no run can be: it is no folder, cannot be made, or another process is in it."""
    if any(len(os.fsencode(part)) > 255 for part in run_dir.parts):
        raise UserError(f"a name in {run_dir} is too long for a folder: choose another --run-dir")
    if run_dir.is_symlink() and not is_there(run_dir):
        raise UserError(f"{run_dir} is a link to what is not there: choose another --run-dir")
    nearest = next(each for each in (run_dir, *run_dir.absolute().parents) if is_there(each))
    if not nearest.is_dir():
        raise UserError(f"{nearest} is {describe(nearest)}, not a folder: choose another --run-dir")
    if is_held(run_dir):
        raise UserError(f"another process is at work in {run_dir}: choose another --name, or wait for it")
    if nearest == run_dir:
        return
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest))
    except OSError as error:
        raise UserError(f"{run_dir} cannot be made: {error}: choose another --run-dir") from error


def check_model_name(model: str) -> None:
    """Raises UserError where a model's name says a folder or a file that cannot be one; a hub id is not asked for."""
    if is_code(model):
        check_code("model", model)
        return
    if model in EMBEDDED or is_single_file(model) or model.endswith(PICKLES):  # which are looked into later
        return
    folder = local_folder(model)
    if folder is not None and not any((folder / name).is_file() for name in ("model_index.json", "config.yaml")):
        raise UserError(f"{folder} is no diffusers pipeline: it has no model_index.json")


def located(config: TrainConfig) -> TrainConfig:
    """With the whole paths of the files and folders that it names, so that they are the same from any other folder."""
    policy = config.policy
    return replace(
        config,
        model=config.model if config.model in EMBEDDED else _whole(config.model),
        model_config=None if config.model_config is None else _whole(config.model_config),
        prompts=_prompts(config.prompts),
        preferences=_whole(config.preferences) if config.preferences else "",
        tasks=tuple(replace(task, prompts=_prompts(task.prompts)) for task in config.tasks),
        policy=policy if policy.lora is None else replace(policy, lora=expand(policy.lora).absolute()),
        pretraining=replace(config.pretraining, source=_source(config.pretraining.source)),
    )


def _whole(name: str) -> str:
    file, function = _in_parts(name)
    path = expand(file)
    return f"{path.absolute()}{function}" if is_there(path) else name


def _in_parts(name: str) -> tuple[str, str]:
    """The file of code, and ":" with what is in it; of anything else, all of it and nothing."""
    file, colon, function = name.rpartition(":")
    return (file, colon + function) if is_code(name) and file.endswith(".py") else (name, "")


def _prompts(source: str) -> str:
    return source if is_built_in(source) or source.startswith("dataset:") else _whole(source)


def _source(source: str) -> str:
    return source if source in ("", "emoji") else _whole(source)


def read_settings(run_dir: Path) -> dict[str, Any]:
    """What config.yaml says. A path that is not there any more, but in the same place as seen from the run folder, has moved
    with it.

    Raises:
        UserError: it cannot be read.
    """
    settings = read_yaml(run_dir / "config.yaml", "settings of a run")
    try:
        then = Path(str(json.loads((run_dir / "env.json").read_text())["folder"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return settings
    return {key: _moved(value, then, run_dir) for key, value in settings.items()}


def _moved(value: Any, then: Path, now: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, then, now) for key, each in value.items()}
    if not isinstance(value, str) or not value.startswith(os.sep):
        return value
    file, function = _in_parts(value)
    beside = Path(os.path.normpath(now.absolute() / os.path.relpath(file, then)))
    return f"{beside}{function}" if not is_there(Path(file)) and is_there(beside) else value


def safe_changes(config: TrainConfig) -> tuple[str, ...]:
    """Beginnings of the names of settings that a run may be taken up with in another value: they say how long it goes on and
    what it writes, nothing else. A schedule of the learning rate depends on how long."""
    length = ("steps", "max_queries") if config.optimizer.schedule == "constant" else ()
    return (*length, "track", "evaluation.every", "checkpoint.", "guard.", "rewards.human.")


def same(before: Any, now: Any) -> bool:
    """Two settings, or two names of one place."""
    if before == now:
        return True
    if not (isinstance(before, str) and isinstance(now, str) and before and now):
        return False
    return os.sep in before + now and Path(before).expanduser().absolute() == Path(now).expanduser().absolute()


def default_of(settings: Any, key: str) -> Any:
    """Of a setting by its dotted name, as YAML says it; None where there is none."""
    *rooms, name = key.split(".")
    for room in rooms:
        settings = getattr(settings, room, None)
    found = {field.name: field for field in fields(settings)} if is_dataclass(settings) else {}
    if name not in found:
        return None
    field = found[name]
    if field.default_factory is not MISSING:
        return plain(field.default_factory())
    return None if field.default is MISSING else plain(field.default)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
