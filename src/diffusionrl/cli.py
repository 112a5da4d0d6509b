"""The command line. Torch is imported only when a command runs."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from diffusionrl.config import ALGORITHMS, SamplingConfig, TaskConfig, TrainConfig
from diffusionrl.errors import RunStopped, UserError, one_of, require
from diffusionrl.interruption import Interrupted, noted
from diffusionrl.presets import PRESETS
from diffusionrl.reward_config import BUILT_IN_REWARDS, RewardsConfig, ServeConfig

_FIRST_PROMPTS = 1000  # lines of a file that are looked at before torch is imported: enough to see what it is
START_AGAIN = 75  # EX_TEMPFAIL: a scheduler should start the same command again
USAGE = f"""usage: diffusionrl COMMAND [OPTIONS]

  train         tune a model towards a reward     [--preset {{{",".join(PRESETS)}}}] [--config FILE.yaml] [OPTIONS]
  doctor        try one tiny step of what "train" would do with the same options, and say what is wrong
  sample        make images from a model or a run
  evaluate      score a model, a LoRA or a run on fixed seeds, alone or against a baseline
  report        write a run's report.html again   RUN
  compare       several runs on one page          RUN RUN ... [--out compare.html]
  push          upload what a run exported to the hub     RUN REPO_ID
  serve-reward  score images over HTTP            NAME [OPTIONS]

"diffusionrl COMMAND --help" lists the options. Every field of the configuration is one (--algorithm.clip-range 1e-4).
Options win over the YAML file, which wins over the preset (default: emoji).
"""


@dataclass(frozen=True)
class SampleConfig:
    """Make images."""

    model: str = "emoji"
    """"emoji", a folder in diffusers' format, a hub id, or a run folder (its model with what it learned)."""
    prompts: tuple[str, ...] = ("a cat", "a dog", "a butterfly", "a doctor")
    """One image a prompt and seed."""
    seeds: tuple[int, ...] = (0, 1)
    """The same seed makes the same image whatever else is asked for."""
    out: Path = Path("samples")
    """Folder for the images and grid.png; it must not exist."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """By default that of the run, or of the preset "emoji"."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on fixed seeds, with intervals; see docs/evaluate.md. What is not given is the run's, or the preset's."""

    model: str = "emoji"
    """"emoji", a folder in diffusers' format, a hub id, or a run folder (its model with what it learned)."""
    lora: Path | None = None
    """On that model: a safetensors file, or a folder with pytorch_lora_weights.safetensors in it."""
    baseline: str | None = None
    """A model or a run that draws the same prompts and noise, for differences and win rates."""
    reward: tuple[str, ...] = ("compressibility",)
    """Rewards as in train, without weights. Each is reported on its own."""
    prompts: str = "ddpo-animals"
    """A built-in set, a text file (one prompt a line) or a JSONL file ("prompt" and any metadata)."""
    samples_per_prompt: int = 1
    """With several, intervals of means are over prompts."""
    num_samples: int | None = None
    """Images, over the prompts in turn; by default samples_per_prompt for each of them. All are in memory at once."""
    seed: int = 0
    """The same seed draws the same noise."""
    out: Path = Path("evaluation.json")
    """Everything, down to the sample; it must not exist."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)

    def __post_init__(self) -> None:
        require(self.samples_per_prompt >= 1, f"samples_per_prompt must be at least 1, not {self.samples_per_prompt}")
        require(self.num_samples is None or self.num_samples >= 1, f"num_samples must be at least 1, not {self.num_samples}")
        for name in self.reward:
            if "=" in name:
                raise UserError(f"evaluate reports each reward on its own: leave out the weight of {name!r}")


@dataclass(frozen=True)
class PushConfig:
    """Upload what a run exported to the Hugging Face hub. Log in first (hf auth login), or set HF_TOKEN."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME; the repository is made if it is not there."""
    private: bool = False
    """Make a new repository private."""


@dataclass(frozen=True)
class ReportConfig:
    """Write a run's report.html again, from what is in its folder. A run does so itself as it goes on."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


@dataclass(frozen=True)
class CompareConfig:
    """Several runs on one page; those that differ in the seed alone are taken together."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Two run folders or more."""
    out: Path = Path("compare.html")
    """The page; one that is there is written over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a run that had to stop or that the doctor fails, 2 for what the user can
    mend, 75 for a run that a signal stopped and that the same command takes up again."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[Sequence[str]], int | None]] = {
        "train": _train,
        "doctor": _doctor,
        "sample": _sample,
        "evaluate": _evaluate,
        "report": _report,
        "compare": _compare,
        "push": _push,
        "serve-reward": _serve_reward,
    }
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        with noted() if arguments[0] == "train" else nullcontext():
            return commands[arguments[0]](arguments[1:]) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if error.saved_in is None:
            print(f"stopped by {error} before there was anything to save", file=sys.stderr)
        else:
            print(f"saved and stopped by {error}; go on with the same command and --run-dir {error.saved_in}", file=sys.stderr)
        return START_AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """The command line as a process. Python would wait for every thread at its end, and a reward's or tracker's may hang."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def parse_train(arguments: Sequence[str], command: str = "train") -> TrainConfig:
    """Preset, then YAML file, then options.

    Raises:
        UserError: no such preset or file.
        SystemExit: with code 2, after tyro has named an unknown option, or a value of the wrong type or out of range.
    """
    preset, rest = _take(list(arguments), "--preset")
    file, rest = _take(rest, "--config")
    if preset is not None and preset not in PRESETS:
        raise one_of("preset", preset, PRESETS)
    config = PRESETS[preset or "emoji"]()
    if file is not None:
        settings = _read_yaml(Path(file))
        config = dataclasses.replace(config, tasks=_tasks_in(settings, config.tasks, file))
        rest = _as_options(settings) + rest
    name, rest = _take(rest, "--algorithm.name")
    while name is not None:  # the last one wins
        if name not in ALGORITHMS:
            raise one_of("algorithm", name, ALGORITHMS)
        if name != config.algorithm.name:
            config = dataclasses.replace(config, algorithm=ALGORITHMS[name]())
        name, rest = _take(rest, "--algorithm.name")
    kind = tyro.conf.AvoidSubcommands[TrainConfig]
    return tyro.cli(kind, default=config, args=rest, prog=f"diffusionrl {command} --config {file or 'FILE'}")


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
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


def _quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _configured(arguments: Sequence[str], command: str) -> TrainConfig:
    """The configuration, checked before torch is imported, so that a broken file or a misspelt name is found at once."""
    config = parse_train(arguments, command)
    from diffusionrl.prompts import load_prompts

    for task in config.all_tasks:
        try:
            load_prompts(task.prompts, config.max_broken_prompts, _FIRST_PROMPTS)
            for entry in (*task.reward, *config.evaluation.held_out):
                _check_reward(entry.partition("=")[0])
        except UserError as error:
            raise UserError(f"{task.whose}{error}") from error
    return config


def _train(arguments: Sequence[str]) -> None:
    config = _configured(arguments, "train")
    _quiet_libraries()
    from diffusionrl import processes
    from diffusionrl.api import train
    from diffusionrl.report.picture import draw_before_after

    result = train(config)
    if not processes.is_main():
        return
    picture = draw_before_after(result.run_dir)
    before, after = result.before, result.after
    print(f"\nreward on the same {config.evaluation.num_samples} fixed seeds and prompts, mean ± standard error")
    print(f"  before  {before.mean:9.3f} ± {before.standard_error:.3f}")
    print(f"  after   {after.mean:9.3f} ± {after.standard_error:.3f}")
    print(f"report:               {result.run_dir / 'report.html'}")
    print(f"before/after picture: {picture}")
    print(f"trained weights:      {result.run_dir / 'export'}")


def _check_reward(name: str) -> None:
    """Raises UserError for a name that is neither built in nor a place to look for one."""
    if ":" not in name and name not in BUILT_IN_REWARDS:
        raise one_of("reward", name, BUILT_IN_REWARDS, "; your own is package.module:function")


def _doctor(arguments: Sequence[str]) -> int:
    config = _configured(arguments, "doctor")
    _quiet_libraries()
    from diffusionrl.api import diagnose

    width = max(60, min(120, shutil.get_terminal_size().columns))
    print(f"one tiny step of {config.algorithm.name} on {config.model}, for {' and '.join(config.reward)}\n", flush=True)
    verdicts = []
    for finding in diagnose(config):
        verdicts.append(finding.verdict)
        print(finding.layout(width), flush=True)
    passed, warned, failed = (verdicts.count(verdict) for verdict in ("pass", "warn", "fail"))
    print(f"\n{passed} passed, {warned} to look at, {failed} failed")
    return 1 if failed else 0


def _settings_of(arguments: Sequence[str]) -> TrainConfig:
    """Of the run that ``--model`` names, or of the preset "emoji"."""
    model, _ = _take(list(arguments), "--model")
    run_config = Path(model or "") / "config.yaml"
    return parse_train(["--config", str(run_config)] if run_config.is_file() else [])


def _sample(arguments: Sequence[str]) -> None:
    sampling = _settings_of(arguments).sampling
    config = tyro.cli(SampleConfig, default=SampleConfig(sampling=sampling), args=arguments, prog="diffusionrl sample")
    if config.out.exists():
        raise UserError(f"{config.out} exists: choose another --out")
    _quiet_libraries()
    from diffusionrl.sampling import sample_images

    print(f"images: {sample_images(config.model, config.prompts, config.seeds, config.sampling, config.out)}")


def _evaluate(arguments: Sequence[str]) -> None:
    run = _settings_of(arguments)
    names = tuple(dict.fromkeys(name.partition("=")[0] for name in (*run.reward, *run.evaluation.held_out)))
    default = EvaluateConfig(reward=names, prompts=run.prompts, seed=run.seed, sampling=run.sampling, rewards=run.rewards)
    config = tyro.cli(EvaluateConfig, default=default, args=arguments, prog="diffusionrl evaluate")
    from diffusionrl.prompts import load_prompts

    prompts = load_prompts(config.prompts)
    for name in config.reward:
        _check_reward(name)
    if config.out.exists():
        raise UserError(f"{config.out} exists: choose another --out")
    _quiet_libraries()
    from diffusionrl.assessment import report, score_model, table
    from diffusionrl.rewards import load_mixture, try_mixture
    from diffusionrl.sampling import find_trained, load_trained

    asked = [(config.model, config.lora), *([(config.baseline, None)] if config.baseline else [])]
    found = [find_trained(*each) for each in asked]
    rewards = load_mixture(config.reward, config.rewards)
    size = config.samples_per_prompt
    count = config.num_samples or len(prompts) * size
    rewards.require_groups(size, "samples_per_prompt", count, "num_samples")
    try_mixture(rewards, found[0].image_size, [p.text for p in prompts[:2]], [p.metadata for p in prompts[:2]], (size,))
    sheets = []
    for each, trained in zip(asked, found, strict=True):
        print(f"{trained.name}: {count} samples", flush=True)
        policy = load_trained(*each)
        settings = (size, config.sampling, config.seed, config.rewards.timeout, count)
        sheets.append(score_model(trained.name, policy, rewards, prompts, *settings))
    result = report(*sheets)
    settings_said = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result | {"settings": settings_said}, indent=2) + "\n")
    print(f"\n{table(result)}\n\neverything: {config.out}")
    for sheet in sheets:
        if sheet.error:
            print(f"warning: some scores are invalid; the last error for {sheet.name}: {sheet.error}", file=sys.stderr)


def _push(arguments: Sequence[str]) -> None:
    config = tyro.cli(PushConfig, args=arguments, prog="diffusionrl push")
    export = config.run / "export"
    if not export.is_dir():
        raise UserError(f"{config.run} has no export folder: give the folder of a run that has trained")
    from diffusionrl.hub import push

    print(f"pushed: {push(export, config.repo_id, config.private)}")


def _serve_reward(arguments: Sequence[str]) -> None:
    config = tyro.cli(ServeConfig, args=arguments, prog="diffusionrl serve-reward")
    _check_reward(config.name)
    from diffusionrl.rewards.server import serve  # which needs few of our dependencies: see docs/serve_reward.md

    serve(config)


def _report(arguments: Sequence[str]) -> None:
    config = tyro.cli(ReportConfig, args=arguments, prog="diffusionrl report")
    from diffusionrl.report.run_page import write_report

    print(f"report: {write_report(config.run)}")


def _compare(arguments: Sequence[str]) -> None:
    config = tyro.cli(CompareConfig, args=arguments, prog="diffusionrl compare")
    from diffusionrl.report.compare_page import write_comparison

    print(f"comparison: {write_comparison(config.runs, config.out)}")
