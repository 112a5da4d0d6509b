"""The guard: a rule on a run's evaluations that says when a held-out score has fallen. docs/guard.md explains it.

It reads nothing but lines of metrics.jsonl, so it can be replayed on any run, and a resumed run needs no state for it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionrl.config import GuardConfig

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the guard says after an evaluation.

    Attributes:
        fallen: the watched scores that are below their peak beyond noise, and by so much that it matters.
        streak: evaluations in a row, until this one, with a score that is below its peak beyond noise.
        best: step of the evaluation with the highest reward among those where no score had fallen; None before there is one.
        stop: the run should end here.
        alarm: the kind of the alarm that is due at this evaluation, or None: "reward-hacking" where the reward has risen since
            the peak of the score that fell, "held-out-falls" where it has not.
        message: what is wrong, where a score has fallen and the streak is long enough.
    """

    fallen: tuple[str, ...] = ()
    streak: int = 0
    best: int | None = None
    stop: bool = False
    alarm: str | None = None
    message: str = ""


def judge(lines: Sequence[Line], watched: Sequence[str], config: GuardConfig, kept: Collection[int] | None = None) -> Verdict:
    """The verdict at the newest evaluation among lines of metrics.jsonl.

    A score is below its peak beyond noise where its paired difference from it (``eval/NAME_from_peak``; see
    ``training/monitor.py``) is below 0 by more than ``config.noise`` standard errors (``eval/NAME_from_peak_se``); and has
    fallen where that is also more than ``config.drop`` standard deviations between images (``eval/NAME_peak_std``). An
    evaluation without a valid watched score is passed over, and one with images that are not finite is never the best.

    Args:
        kept: steps whose weights there are, of which one can be the best; None: all.
    """
    evaluations = [line for line in lines if any(line.get(f"eval/{name}") is not None for name in watched)]
    fallen: tuple[str, ...] = ()
    streak, best, told = 0, None, False
    for line in evaluations:
        told = streak >= config.patience and (told or bool(fallen))  # in this streak, before this evaluation
        below = [name for name in watched if _is_below(line, name, config.noise)]
        fallen = tuple(name for name in below if line[f"eval/{name}_from_peak"] < -config.drop * line[f"eval/{name}_peak_std"])
        streak = streak + 1 if below else 0
        able = (kept is None or line["step"] in kept) and not line.get("eval/broken_images")
        reward = line.get("eval/reward") if able else None
        if not fallen and reward is not None and (best is None or reward > best["eval/reward"]):
            best = line
    best_step = best["step"] if best else None
    if streak < config.patience or not fallen:
        return Verdict(fallen, streak, best_step)
    risen, message = _describe(evaluations, fallen[0], best_step, config)
    kind = "reward-hacking" if risen else "held-out-falls"
    due = not told and evaluations[-1] is lines[-1]
    return Verdict(fallen, streak, best_step, config.stop, kind if due else None, message)


def _is_below(line: Line, name: str, noise: float) -> bool:
    difference, error = line.get(f"eval/{name}_from_peak"), line.get(f"eval/{name}_from_peak_se")
    return difference is not None and error is not None and difference < -noise * error


def peak_of(evaluations: Sequence[Line], name: str) -> Line | None:
    """The first evaluation with the highest score."""
    scored = [line for line in evaluations if line.get(f"eval/{name}") is not None]
    return max(scored, key=lambda line: line[f"eval/{name}"], default=None)


def _describe(evaluations: Sequence[Line], name: str, best: int | None, config: GuardConfig) -> tuple[bool, str]:
    """Whether the reward has risen since the peak of the score that fell; and the alarm in words."""
    now, peak = evaluations[-1], peak_of(evaluations[:-1], name)
    assert peak is not None  # nothing falls before it was up
    then, here = peak.get("eval/reward"), now.get("eval/reward")
    risen = then is not None and here is not None and here > then
    reward = "unknown" if then is None or here is None else f"{then:.4g} then and {here:.4g} now"
    rows = f" in {config.patience} evaluations in a row" if config.patience > 1 else ""
    hacked = "the reward may be hacked, or the learning rate too high: look at the samples"
    advice = hacked if risen else "the run is losing what it was not asked to lose"
    kept = "" if best is None else f". Best before: step {best}"
    return risen, (
        f"{name} is below its peak of step {peak['step']} by more than {config.noise:g} standard errors{rows}, and by "
        f"{-now[f'eval/{name}_from_peak']:.3g} ± {now[f'eval/{name}_from_peak_se']:.2g} now, more than "
        f"{config.drop:g} standard deviations between images, while the reward was {reward}; "
        f"{advice}{kept}"
    )
