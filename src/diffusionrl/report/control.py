"""A run beside its controls: the same training on a reward of noise, or with one weight for every sample."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from diffusionrl.config import TrainConfig
from diffusionrl.errors import UserError
from diffusionrl.evaluation.intervals import Estimate, differences, overall
from diffusionrl.report.page import plus_minus
from diffusionrl.report.record import Evaluated, Run, Sample
from diffusionrl.runs.signal import signal_of

NOISE = "noise"
"""The built-in reward that controls are trained on."""


def noise_control(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The settings of a run's control on noise: all as they are, but every reward is noise, and the first task's own are held
    out.

    Raises:
        UserError: the run is a control, its data is from disk, or parts of it were handed over in Python, which have no name.
    """
    own = _own_rewards(config)
    if config.preferences:
        raise UserError("the run learned from judged images, not from a reward: noise cannot take its place")
    held_out = tuple(dict.fromkeys((*own, *config.evaluation.held_out)))
    return dataclasses.replace(
        config,
        reward=(NOISE,),
        tasks=tuple(dataclasses.replace(task, reward=(NOISE,)) for task in config.tasks),
        evaluation=dataclasses.replace(config.evaluation, held_out=held_out),
        name=None,
        run_dir=run_dir,
        push_to_hub=None,
    )


def blind_control(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The settings of a run's blind control: all as they are, but every sample counts 1, and as no score is looked at, no group
    is drawn anew.

    Raises:
        UserError: as above; or the run's algorithm has no blind run.
    """
    _own_rewards(config)
    return dataclasses.replace(config, blind=True, redraw_queries=0, name=None, run_dir=run_dir, push_to_hub=None)


CONTROLS = {"noise": noise_control, "blind": blind_control}
"""By name: the settings of the control of a run, in a folder of its own."""


def _own_rewards(config: TrainConfig) -> list[str]:
    """Of a run that can have a control, by name. Raises UserError for another."""
    own = [entry.partition("=")[0] for entry in config.reward]
    if own == [NOISE] or config.blind:
        raise UserError(f"the run {'is blind' if config.blind else 'was trained on noise'}: it is a control itself")
    unnamed = [name for name in (*own, config.model, config.prompts) if "<" in name or name.startswith("__main__:")]
    if unnamed:
        raise UserError(
            f"{unnamed[0]} was handed over in Python, and cannot be had again: give model, prompts and reward by name "
            "(FILE.py:FUNCTION), or train with reward='noise' or blind=True in Python"
        )
    return own


@dataclass(frozen=True)
class Effect:
    """What training did to a score: means over samples or prompts, with 95 % intervals.

    Attributes:
        run, control: the change since before training.
        reward: of the run beyond the control, paired by sample: what the reward did, where the control is on noise.
    """

    score: str
    run: Estimate
    control: Estimate
    reward: Estimate


def effects(run: Run, control: Run) -> list[Effect]:
    """Of the run's rewards and held-out scores, at the last step at which both were evaluated.

    Raises:
        UserError: they have no evaluation in common after training has begun, or did not begin from the same samples.
    """
    common = sorted({each.step for each in run.evaluations} & {each.step for each in control.evaluations})
    if len(common) < 2:
        raise UserError(f"{run.folder} and {control.folder} have no evaluation after training in common")
    theirs, others = (_at(each, common[0], common[-1]) for each in (run, control))
    if {i: s.prompt for i, s in theirs[0].samples.items()} != {i: s.prompt for i, s in others[0].samples.items()}:
        raise UserError(f"{control.folder} is no control of {run.folder}: it was evaluated on other prompts")
    found = []
    for name in _scores(run, control):
        indices = sorted(set(theirs[0].samples) & set(theirs[1].samples) & set(others[1].samples))
        before, after, beside, drifted = (
            [_value(each.samples[i], name) for i in indices] for each in (theirs[0], theirs[1], others[0], others[1])
        )
        prompts = [theirs[0].samples[i].prompt for i in indices]
        gained, moved = differences(after, before), differences(drifted, beside)
        estimates = (overall(values, prompts) for values in (gained, moved, differences(gained, moved)))
        found.append(Effect(name, *estimates))
    return found


def table(found: list[Effect], run: Run, control: Run) -> str:
    """For the terminal: the effects, and the signal of both runs' updates."""
    names = ("its blind run", "difference") if control.config.get("blind") else ("its control", "what the reward did")
    rows = [["score", "the run", *names]]
    rows += [[each.score, *(plus_minus(part, sign=True) for part in (each.run, each.control, each.reward))] for each in found]
    walks = [f"{100 * signal.walk():.0f} %" if (signal := signal_of(each.metrics)) else "-" for each in (run, control)]
    rows.append(["random walk", *walks, ""])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _at(run: Run, *steps: int) -> list[Evaluated]:
    return [next(each for each in run.evaluations if each.step == step) for step in steps]


def _scores(run: Run, control: Run) -> list[str]:
    """Names that the samples of both have, and the run's one reward, which is held out in a control on noise."""
    entries = [str(entry).partition("=") for entry in run.config.get("reward") or []]
    raw = entries[0][2] in ("", "1") and not (run.config.get("rewards") or {}).get("normalise") if entries else False
    own = [name for name, *_ in entries] if len(entries) > 1 or raw else []
    if control.config.get("blind"):  # whose reward is the run's own, weighed and normalised alike
        return list(dict.fromkeys((*(own or ["reward"]), *_held_out(run))))
    theirs = _held_out(control)
    return [name for name in dict.fromkeys((*own, *_held_out(run))) if name in theirs]


def _held_out(run: Run) -> list[str]:
    return [str(name).partition("=")[0] for name in (run.config.get("evaluation") or {}).get("held_out") or []]


def _value(sample: Sample, name: str) -> float:
    """A run's one reward has no name among its scores."""
    value = sample.scores.get(name, sample.reward)
    return math.nan if value is None else value
