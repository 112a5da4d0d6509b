"""What ``diffusionrl evaluate`` reports: rewards with intervals, overall and by prompt; pair by pair against a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import RunStopped
from diffusionrl.evaluation.fixed_seed import by_group, evaluate, finite_or_none
from diffusionrl.evaluation.intervals import LEVEL, Estimate, by_prompt, differences, mean_interval, overall, win_rate
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture

_SHOWN = 5  # prompts at either end of the table


@dataclass(frozen=True)
class Sheet:
    """What rewards say of one model.

    Attributes:
        name: the model's.
        prompts: N texts.
        scores: by reward, N numbers, NaN where invalid.
        error: why scores are invalid, where some are.
        group_sizes: by reward that looks at whole groups, how many samples in a row share a score.
    """

    name: str
    prompts: list[str]
    scores: dict[str, list[float]]
    error: str | None = None
    group_sizes: Mapping[str, int] = field(default_factory=dict)


def score_model(
    name: str,
    policy: Policy,
    rewards: Mixture,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    sampling: SamplingConfig,
    seed: int,
    timeout: float = 600.0,
    num_samples: int | None = None,
) -> Sheet:
    """Score the images that a run with this seed makes in its own evaluations, and further ones of the same prompts: prompt
    after prompt where a reward looks at whole groups, all the prompts over and over otherwise.

    Args:
        timeout: seconds for one call of the rewards.
        num_samples: images; by default, ``samples_per_prompt`` of every prompt.

    Raises:
        RunStopped: nothing was scored.
    """
    in_a_row = samples_per_prompt if rewards.grouped else 1
    count = num_samples or len(prompts) * samples_per_prompt
    found = evaluate(policy, rewards, prompts, count, sampling, seed, timeout=timeout, samples_per_prompt=in_a_row)
    scores = found.rollout.scores
    if not any(values.isfinite().any() for values in scores.parts.values()):
        raise RunStopped(f"no image of {name} has a valid score; the last error: {scores.error}")
    parts = {reward: values.tolist() for reward, values in scores.parts.items()}
    return Sheet(name, [prompt.text for prompt in found.rollout.prompts], parts, scores.error, found.group_sizes)


def report(model: Sheet, baseline: Sheet | None = None) -> dict[str, Any]:
    """For JSON, where what is not finite is null. ``baseline`` must be of the same prompts and rewards."""
    sheets = {"model": model} | ({"baseline": baseline} if baseline else {})
    return {
        **{side: sheet.name for side, sheet in sheets.items()},
        "level": LEVEL,
        "errors": {side: sheet.error for side, sheet in sheets.items() if sheet.error},
        "rewards": {reward: _of_reward(reward, sheets) for reward in model.scores},
        "samples": [
            {"prompt": prompt}
            | {side: {name: finite_or_none(of[i]) for name, of in sheet.scores.items()} for side, sheet in sheets.items()}
            for i, prompt in enumerate(model.prompts)
        ],
    }


def _of_reward(reward: str, sheets: dict[str, Sheet]) -> dict[str, Any]:
    size = sheets["model"].group_sizes.get(reward, 1)
    prompts = sheets["model"].prompts[::size]
    columns = {side: torch.tensor(sheet.scores[reward], dtype=torch.float64) for side, sheet in sheets.items()}
    values = {side: by_group(column, size).tolist() for side, column in columns.items()}
    unit = {"unit": "groups"} if size > 1 and len(set(prompts)) == len(prompts) else {}
    found = {side: _plain(overall(each, prompts)) | unit for side, each in values.items()}
    for side, column in columns.items():
        found[side]["invalid"] = int(column.isnan().sum())
    single: dict[str, dict[str, Any]] = {prompt: {} for prompt in prompts}
    for side, each in values.items():
        for prompt, group in by_prompt(each, prompts).items():
            single[prompt][side] = _plain(mean_interval(group))
    if "baseline" in values:
        gaps = differences(values["model"], values["baseline"])
        groups = by_prompt(gaps, prompts)
        found["difference"] = _plain(overall(gaps, prompts))
        found["win_rate"] = _plain(win_rate([gap for group in groups.values() for gap in group]))
        for prompt, group in groups.items():
            single[prompt] |= {"difference": _plain(mean_interval(group, "pairs")), "win_rate": _plain(win_rate(group))}
    return found | {"prompts": single}


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {key: finite_or_none(value) if isinstance(value, float) else value for key, value in asdict(estimate).items()}


def table(found: dict[str, Any]) -> str:
    """A report for the eye: each reward overall, then the prompts at either end."""
    names = {side: found[side] for side in ("model", "baseline") if side in found} | {"difference": "difference"}
    width = max(len(name) for name in names.values())
    lines = []
    for reward, each in found["rewards"].items():
        lines.append(
            f"\n{reward}, mean and {100 * found['level']:g} % interval over {each['model']['units']} {each['model']['unit']}"
        )
        for side, name in names.items():
            if side in each:
                invalid = each[side].get("invalid", 0)
                lines.append(f"  {name:{width}}  {_interval(each[side])}" + (f"  {invalid} invalid" if invalid else ""))
        if "win_rate" in each:
            lines.append(f"  {'wins':{width}}  {_percentage(each['win_rate'])}")
        lines += _ends(each["prompts"], "difference" if "difference" in each else "model")
    return "\n".join(lines).lstrip("\n")


def _ends(prompts: dict[str, dict[str, Any]], key: str) -> list[str]:
    """The prompts with the highest and the lowest figure."""
    ranked = sorted((one for one in prompts.items() if one[1][key]["value"] is not None), key=lambda one: -one[1][key]["value"])
    if len(prompts) < 2:
        return []
    shown = ranked if len(ranked) <= 2 * _SHOWN else [*ranked[:_SHOWN], None, *ranked[-_SHOWN:]]
    lines = [f"  by prompt, {'difference' if key == 'difference' else 'mean'}:"]
    for entry in shown:
        if entry is None:
            lines.append(f"    ... {len(ranked) - 2 * _SHOWN} more")
            continue
        prompt, each = entry
        wins = f"  wins {100 * each['win_rate']['value']:3.0f} %" if "win_rate" in each else ""
        lines.append(f"    {_interval(each[key])}{wins}  {prompt[:60]!r}")
    return lines


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "no valid score"
    interval = "" if estimate["low"] is None else f"  [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:9.3f}{interval}"


def _percentage(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "no valid pair"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:7.1f} %  [{low:.1f}, {high:.1f}]  of {estimate['units']} pairs"
