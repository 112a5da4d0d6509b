"""Options to configurations: preset, then YAML file, then options."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from diffusionrl.config import ALGORITHMS, TaskConfig, TrainConfig
from diffusionrl.config.files import read_yaml
from diffusionrl.config.presets import PRESETS
from diffusionrl.config.rewards import BUILT_IN_REWARDS, RewardsConfig
from diffusionrl.errors import UserError, one_of, require
from diffusionrl.foreign.names import check_code, is_code
from diffusionrl.paths import expand

_SECTIONS = {
    "sampling",
    "policy",
    "algorithm",
    "optimizer",
    "rewards",
    "evaluation",
    "guard",
    "checkpoint",
    "pretraining",
    "tasks",
}
_ABOUT = {
    "train": "Train a model to a reward: the settings of --preset NAME, then of --config FILE, then these.",
    "doctor": "One tiny step of what train would do with the same options. Beside them: --control, what noise would do.",
    "plan": 'What of a card\'s memory train would need with the same options. Beside them: --card "24 GB", and --rate, its '
    "sustained TFLOP/s.",
}
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
        settings = read_yaml(expand(file))
        config = dataclasses.replace(config, tasks=_tasks_in(settings, config.tasks, file))
        rest = _as_options(settings, file) + rest
    name, rest = take(rest, "--algorithm.name")
    while name is not None:  # the last one wins
        if name not in ALGORITHMS:
            raise one_of("algorithm", name, ALGORITHMS)
        if name != config.algorithm.name:
            config = dataclasses.replace(config, algorithm=ALGORITHMS[name]())
        name, rest = take(rest, "--algorithm.name")
    kind = tyro.conf.AvoidSubcommands[TrainConfig]
    prog = f"diffusionrl {command} --config {file or 'FILE'}"
    return tyro.cli(kind, default=config, args=rest, prog=prog, description=_ABOUT[command])


def _preset_of(model: str | None) -> str:
    """An embedded model's own, which bears its name; "emoji" for any other, whatever a folder is called."""
    return model if model in PRESETS and PRESETS[model]().model == model else "emoji"


def parse_run(run_dir: Path) -> TrainConfig:
    """The settings of a run, with the places of what has moved along with it.

    Raises:
        UserError: it is no run folder, or its settings cannot be read.
    """
    from diffusionrl.runs.places import read_settings

    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.yaml")
    config, settings = parse_train(["--config", str(run_dir / "config.yaml")]), read_settings(run_dir)
    moved = {name: settings.get(name, getattr(config, name)) for name in ("model", "model_config", "prompts")}
    return dataclasses.replace(config, **moved)


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


def _tasks_in(settings: dict[str, Any], known: tuple[TaskConfig, ...], file: str) -> tuple[TaskConfig, ...]:
    """As many tasks as a file describes, for tyro to offer their options; the preset's where it says nothing of tasks."""
    entries = settings.get("tasks", ...)
    if entries is ...:
        return known
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise UserError(f"config file {file}: tasks must be a list of settings like '- name: faces', each with its name")
    return tuple(TaskConfig(f"task-{index}") for index in range(len(entries)))


def _as_options(settings: dict[str, Any], file: str, prefix: str = "") -> list[str]:
    """YAML settings as command line options, so that one parser checks both.

    Raises:
        UserError: a section has nothing under it, or a value reads as another option.
    """
    options = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace("_", "-")
        if value is None and f"{prefix}{key}" in _SECTIONS:
            raise UserError(f"config file {file}: there is nothing under {prefix}{key}: leave it out")
        if key == "tasks":
            value = {str(index): task for index, task in enumerate(value)}
        if isinstance(value, dict):
            options += _as_options(value, file, f"{name}.")
        elif isinstance(value, bool):
            options.append(f"--{prefix}{'' if value else 'no-'}{key}".replace("_", "-"))
        elif isinstance(value, list):
            for entry in map(str, value):
                if entry.startswith("-") and not _is_number(entry):
                    raise UserError(f"config file {file}: {prefix}{key} holds {entry!r}, which reads as an option")
            options += [f"--{name}", *map(str, value)]
        else:
            text = str(value)  # "=", where it would read as another option
            options += [f"--{name}={text}"] if text.startswith("-") and not _is_number(text) else [f"--{name}", text]
    return options


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def configured(arguments: Sequence[str], command: str) -> TrainConfig:
    """The configuration, checked before torch is imported, so that a broken file or a misspelt name is found at once."""
    config = parse_train(arguments, command)
    from diffusionrl.data.prompts import load_prompts  # which imports NumPy
    from diffusionrl.runs.places import check_model_name, check_run_dir

    if config.run_dir is not None or config.name is not None:
        check_run_dir(expand(config.run_dir or Path("runs") / str(config.name)))
    check_model_name(config.model)

    for task in config.all_tasks:
        try:
            load_prompts(task.prompts, config.max_broken_prompts, _FIRST_PROMPTS)
            check_rewards((*task.reward, *config.evaluation.held_out), config.rewards)
        except UserError as error:
            raise UserError(f"{task.whose}{error}") from error
    return config


def check_rewards(entries: Sequence[str], config: RewardsConfig) -> None:
    """``check_reward`` for NAME or NAME=WEIGHT each, and for the one that is to be smoothed."""
    for entry in entries:
        name = entry.partition("=")[0]
        check_reward(name)
        if name == "smooth":
            require(bool(config.smooth.reward), "the reward smooth needs another one in it: --rewards.smooth.reward")
            check_reward(config.smooth.reward)


def check_reward(name: str) -> None:
    """Raises UserError for a name that is neither built in nor a place to look for one."""
    if ":" not in name and name not in BUILT_IN_REWARDS:
        raise one_of("reward", name, BUILT_IN_REWARDS, "; your own is package.module:function or file.py:function")
    if is_code(name):
        check_code("reward", name)


def settings_of(arguments: Sequence[str]) -> TrainConfig:
    """Of the run that ``--model`` names, or of its preset, or of the preset "emoji"."""
    model, _ = take(list(arguments), "--model")
    run_config = expand(model or "") / "config.yaml"
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
