"""``compare.html``: several runs on one page."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError
from diffusionrl.report.curves import COLOURS, Chart, Line, draw
from diffusionrl.report.intervals import Interval, interval
from diffusionrl.report.page import (
    MAX_IMAGES,
    Cell,
    Pictures,
    cell,
    cut,
    decimals,
    duration,
    plus_minus,
    render,
    scrubber,
    write_page,
)
from diffusionrl.report.record import Evaluated, Run, read_run, time_unit
from diffusionrl.report.run_page import gains
from diffusionrl.tracking import flat

MAX_SHOWN = 8  # runs whose images stand side by side
MAX_PROMPTS = 24
MAX_STOPS = 10
_ASIDE = ("seed", "name", "run_dir", "track")  # and checkpoint.*: no reason to compare runs

Values = dict[int, float | None]  # by step


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone."""

    label: str
    colour: int
    runs: list[Run]

    def mean(self, values: Callable[[Run], Values]) -> dict[int, Interval | None]:
        """Over the runs, at the steps that all of them have."""
        found = [values(run) for run in self.runs]
        steps = sorted(set.intersection(*(set(each) for each in found)))
        return {step: interval([each[step] for each in found]) for step in steps}


def write_comparison(folders: Sequence[Path], target: Path) -> Path:
    """Write a page about several runs. Returns its path.

    Raises:
        UserError: fewer than two runs, a folder that is none or that has no evaluation yet, one that is named twice, or
            nowhere to write to.
    """
    if len(folders) < 2:
        raise UserError("name at least two run folders to compare")
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UserError(f"{folder} is named twice")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.evaluations:
            raise UserError(f"{run.folder} has no evaluation yet: compare it once it has begun to train")
    try:
        write_page(target, render("compare.html.jinja", **_content(runs)))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}; choose another --out") from error
    return target


def _content(runs: list[Run]) -> dict[str, Any]:
    groups = _grouped(runs)
    kl, kl_note = _kl_of(runs)
    names = _held_out(runs)
    return {
        "groups": groups,
        "num_runs": len(runs),
        "notices": _notices(groups),
        "columns": names,
        "rows": [_row(group, names) for group in groups],
        "charts": _charts(groups, names, kl, kl_note),
        "differences": _differences(groups),
        **_side_by_side(groups),
    }


def _grouped(runs: list[Run]) -> list[Group]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in flat(run.config).items() if k not in _ASIDE and not k.startswith("checkpoint.")}
        key = str(sorted((name, str(value)) for name, value in settings.items()))
        again = 0  # one seed twice is no second seed
        while any(other.config.get("seed") == run.config.get("seed") for other in found.get((key, again), [])):
            again += 1
        found.setdefault((key, again), []).append(run)
    labels = _labels(list(found.values()), runs)
    return [Group(label, i % COLOURS, members) for i, (label, members) in enumerate(zip(labels, found.values(), strict=True))]


def _labels(groups: list[list[Run]], runs: list[Run]) -> list[str]:
    """What the paths of a group's runs have in common and the others' have not."""
    top = os.path.commonpath([run.folder.resolve().parent for run in runs])
    labels = []
    for members in groups:
        names = [os.path.relpath(run.folder.resolve(), top) for run in members]
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = "".join(letters[0] for letters in alike)
        shared = re.sub(r"[/_.-]*(seed)?[/_.-]*$", "", shared) if len(names) > 1 else shared
        labels.append(shared or " + ".join(names))
    taken = [cut(label, 60) for label in labels]
    return [label if taken.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(taken)]


def _values(run: Run, key: str) -> Values:
    lines, values = run.column(key)
    return {int(line["step"]): value for line, value in zip(lines, values, strict=True)}


def _queries(run: Run) -> Values:
    return _values(run, "queries")


def _hours(run: Run) -> Values:
    return _values(run, "hours")


def _kl_of(runs: list[Run]) -> tuple[Callable[[Run], Values], str]:
    """How far each run's policy has moved, at each step; and what that number is."""
    keys = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    for key in keys:
        measured = not key.startswith("policy/") and re.search(r"(^|[/_])kl($|[/_])", key)
        if measured and all(any(value is not None for value in run.column(key)[1]) for run in runs):
            return partial(_values, key=key), f"{key}, as measured at the evaluations"
    return (
        _summed_kl,
        "policy/approx_kl summed over the steps; not the distance from the reference",
    )


def _summed_kl(run: Run) -> Values:
    lines, values = run.column("policy/approx_kl")
    if not any(values):
        return {}
    summed: Values = {0: 0.0}
    for line, total in zip(lines, itertools.accumulate(value or 0.0 for value in values), strict=True):
        summed[int(line["step"])] = total
    return summed


def _held_out(runs: list[Run]) -> list[str]:
    """Scores beside the reward that all runs have at their evaluations."""
    keys = [{key for line in run.metrics for key in line if key.startswith("eval/")} for run in runs]
    shared = set.intersection(*keys)
    return [
        key
        for key in dict.fromkeys(key for line in runs[0].metrics for key in line)
        if key in shared and key not in ("eval/reward", "eval/invalid") and not key.endswith("_se")
    ]


def _notices(groups: list[Group]) -> list[str]:
    notices = []
    for key, what in (("reward", "the reward"), ("prompts", "the prompts")):
        if len({str(run.config.get(key)) for group in groups for run in group.runs}) > 1:
            notices.append(f"The runs differ in {what}, so their rewards are not of one kind: look at scores that they share.")
    for group in groups:
        for run in group.runs:
            if run.ending.kind != "finished":
                notices.append(f"{cut(str(run.folder))}: {run.ending.kind}, {cut(run.ending.text)}")
    return notices


def _row(group: Group, names: list[str]) -> dict[str, Any]:
    """Over the seeds where there are several; else over the samples of the last evaluation."""
    last = [run.evaluations[-1] for run in group.runs]
    hours = interval([run.metrics[-1]["hours"] for run in group.runs])
    several = len(group.runs) > 1
    found = [gains(run) for run in group.runs]
    gain = interval([each.mean for one in found if (each := interval(one))]) if several else interval(found[0])
    rewards = [run.last("eval/reward") for run in group.runs]
    samples = last[0].samples.values()
    reward = interval(rewards) if several else interval([sample.reward for sample in samples])
    scores = []
    for name in names:
        of_samples = [sample.scores.get(name.removeprefix("eval/")) for sample in samples]
        whole = interval([run.last(name) for run in group.runs])
        scores.append(plus_minus(whole if several else interval(of_samples) or whole))
    return {
        "label": group.label,
        "colour": f"c{group.colour}",
        "over": f"{len(group.runs)} seeds" if several else f"{len(samples)} samples",
        "queries": " / ".join(dict.fromkeys(f"{run.metrics[-1]['queries']:,}" for run in group.runs)),
        "hours": duration(hours.mean if hours else 0.0),
        "reward": plus_minus(reward),
        "gain": plus_minus(gain, sign=True),
        "scores": scores,
    }


def _charts(groups: list[Group], names: list[str], kl: Callable[[Run], Values], kl_note: str) -> list[Chart]:
    unit, scale = time_unit([run for group in groups for run in group.runs])

    def lines(key: str, x: Callable[[Run], Values], per: float = 1.0, training: bool = False) -> list[Line]:
        drawn = []
        for group in groups:
            places = {step: at.mean * per for step, at in group.mean(x).items() if at is not None}
            for one, dots in ((("reward/mean", False),) if training else ()) + ((key, True),):
                means = {s: v for s, v in group.mean(lambda run, one=one: _values(run, one)).items() if s in places}  # type: ignore[misc]
                y = [None if v is None else v.mean for v in means.values()]
                spread = [v.half if dots and v is not None else 0.0 for v in means.values()]
                name = group.label if dots else ""
                shift = 3.0 * (group.colour - (len(groups) - 1) / 2) * dots
                drawn.append(Line(name, [places[s] for s in means], y, spread, group.colour, dots, not dots, shift))
        return drawn

    charts = [
        draw("reward against queries", "queries", lines("eval/reward", _queries, training=True)),
        draw("reward against time", f"{unit} of training", lines("eval/reward", _hours, scale, training=True)),
        draw("reward against KL", "KL", lines("eval/reward", kl), kl_note),
    ]
    charts += [draw(name.removeprefix("eval/"), "queries", lines(name, _queries)) for name in names]
    return [chart for chart in charts if chart is not None]


def _differences(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """The settings in which the groups differ, and their seeds."""
    settings = [flat(group.runs[0].config) for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each if key not in _ASIDE)
    rows = [(key, [cut(str(each[key]), 120) if key in each else "–" for each in settings]) for key in keys]
    seeds = ("seed", [", ".join(str(run.config.get("seed")) for run in group.runs) for group in groups])
    return [seeds, *(row for row in rows if len(set(row[1])) > 1)]


def _side_by_side(groups: list[Group]) -> dict[str, Any]:
    """One run a group, with a seed that the groups share, at the slider's stops: each at its newest evaluation until then."""
    shown = _shown(groups)
    stops = _stops([run for _, run in shown])
    prompts = _shared_prompts([run for _, run in shown])
    used = {(run.folder, _at(run, stop).step) for _, run in shown for stop in stops}
    prompts = prompts[: min(MAX_PROMPTS, max(1, MAX_IMAGES // len(used)))]
    pictures = Pictures()
    places = decimals([run.evaluations[-1] for _, run in shown])
    cells: list[list[Cell]] = []
    for stop in stops:
        at = [(run, _at(run, stop).samples) for _, run in shown]
        cells.append([cell(s.get(i), run.evaluations[0].samples.get(i), pictures, places) for i in prompts for run, s in at])
    first = shown[0][1].evaluations[0].samples
    return {
        "shown": [{"label": _name(group, run), "colour": f"c{group.colour}"} for group, run in shown],
        "prompts": [cut(first[i].prompt) for i in prompts],
        "seeds": sorted({str(run.config.get("seed")) for _, run in shown}),
        "scrubber": scrubber(pictures, [f"{stop:,} queries" if stop else "before training" for stop in stops], cells),
    }


def _shown(groups: list[Group]) -> list[tuple[Group, Run]]:
    if len(groups) == 1:
        return [(groups[0], run) for run in groups[0].runs[:MAX_SHOWN]]
    counts = [run.config.get("seed") for group in groups for run in group.runs]
    best = max(counts, key=lambda seed: (counts.count(seed), -counts.index(seed)))
    chosen = [(g, next((run for run in g.runs if run.config.get("seed") == best), g.runs[0])) for g in groups]
    return chosen[:MAX_SHOWN]


def _name(group: Group, run: Run) -> str:
    return f"{group.label}, seed {run.config.get('seed')}" if len(group.runs) > 1 else group.label


def _stops(runs: list[Run]) -> list[int]:
    """The queries at which a run was evaluated, thinned evenly; the last is kept."""
    every = sorted({each.queries for run in runs for each in run.evaluations})
    stride = -(-len(every) // MAX_STOPS)
    return sorted({*every[::stride], every[-1]})


def _at(run: Run, queries: int) -> Evaluated:
    return next(each for each in reversed(run.evaluations) if each.queries <= queries or each is run.evaluations[0])


def _shared_prompts(runs: list[Run]) -> list[int]:
    """Indices of the samples whose prompt is the same in all runs."""
    samples = [run.evaluations[0].samples for run in runs]
    return [i for i, s in sorted(samples[0].items()) if all(i in o and o[i].prompt == s.prompt for o in samples)]
