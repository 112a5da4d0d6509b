"""Options to configurations: preset, then YAML file, then options."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from diffusionrl.config import ALGORITHMS, TaskConfig, TrainConfig
from diffusionrl.config.presets import PRESETS
from diffusionrl.config.rewards import BUILT_IN_REWARDS
from diffusionrl.errors import UserError, one_of

_FIRST_PROMPTS = 1000  # lines of a file that are looked at before torch is imported: enough to see what it is


def parse_train(arguments: Sequence[str], command: str = "train") -> TrainConfig:
    """Preset, then YAML file, then options.

    Raises:
        UserError: no such preset or file.
        SystemExit: with code 2, after tyro has named an unknown option, or a value of the wrong type or out of range.
    """
    preset, rest = take(list(arguments), "--preset")
    file, rest = take(rest, "--config")
    model, _ = take(rest, "--model")
    if preset is None:
        preset = _preset_of(model)
    if preset not in PRESETS:
        raise one_of("preset", preset, PRESETS)
    config = PRESETS[preset]()
    if file is not None:
        settings = _read_yaml(Path(file))
        config = dataclasses.replace(config, tasks=_tasks_in(settings, config.tasks, file))
        rest = _as_options(settings) + rest
    name, rest = take(rest, "--algorithm.name")
    while name is not None:  # the last one wins
        if name not in ALGORITHMS:
            raise one_of("algorithm", name, ALGORITHMS)
        if name != config.algorithm.name:
            config = dataclasses.replace(config, algorithm=ALGORITHMS[name]())
        name, rest = take(rest, "--algorithm.name")
    kind = tyro.conf.AvoidSubcommands[TrainConfig]
    return tyro.cli(kind, default=config, args=rest, prog=f"diffusionrl {command} --config {file or 'FILE'}")


def _preset_of(model: str | None) -> str:
    """An embedded model's own, which bears its name; "emoji" for any other, whatever a folder is called."""
    return model if model in PRESETS and PRESETS[model]().model == model else "emoji"


def take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Remove ``option VALUE`` or ``option=VALUE`` from the arguments."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
        if argument == option:
            if index + 1 == len(arguments):
                raise UserError(f"{option} needs a value")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {file} must hold settings like 'steps: 20', not a {type(content).__name__}")
    return content


def _tasks_in(settings: dict[str, Any], known: tuple[TaskConfig, ...], file: str) -> tuple[TaskConfig, ...]:
    """As many tasks as a file describes, for tyro to offer their options; the preset's where it says nothing of tasks."""
    entries = settings.get("tasks", ...)
    if entries is ...:
        return known
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise UserError(f"config file {file}: tasks must be a list of settings like '- name: faces', each with its name")
    return tuple(TaskConfig(f"task-{index}") for index in range(len(entries)))


def _as_options(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """YAML settings as command line options, so that one parser checks both."""
    options = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace("_", "-")
        if key == "tasks":
            value = {str(index): task for index, task in enumerate(value)}
        if isinstance(value, dict):
            options += _as_options(value, f"{name}.")
        elif isinstance(value, bool):
            options.append(f"--{prefix}{'' if value else 'no-'}{key}".replace("_", "-"))
        else:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def configured(arguments: Sequence[str], command: str) -> TrainConfig:
    """The configuration, checked before torch is imported, so that a broken file or a misspelt name is found at once."""
    config = parse_train(arguments, command)
    from diffusionrl.data.prompts import load_prompts  # which imports NumPy

    for task in config.all_tasks:
        try:
            load_prompts(task.prompts, config.max_broken_prompts, _FIRST_PROMPTS)
            for entry in (*task.reward, *config.evaluation.held_out):
                check_reward(entry.partition("=")[0])
        except UserError as error:
            raise UserError(f"{task.whose}{error}") from error
    return config


def check_reward(name: str) -> None:
    """Raises UserError for a name that is neither built in nor a place to look for one."""
    if ":" not in name and name not in BUILT_IN_REWARDS:
        raise one_of("reward", name, BUILT_IN_REWARDS, "; your own is package.module:function")


def settings_of(arguments: Sequence[str]) -> TrainConfig:
    """Of the run that ``--model`` names, or of its preset, or of the preset "emoji"."""
    model, _ = take(list(arguments), "--model")
    run_config = Path(model or "") / "config.yaml"
    if run_config.is_file():
        return parse_train(["--config", str(run_config)])
    return PRESETS[_preset_of(model)]()


def quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for chatty in ("torchao", "torch.utils._pytree"):  # which name kernels that are for other machines
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
