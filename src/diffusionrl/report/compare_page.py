"""``compare.html``: several runs on one page."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from diffusionrl.errors import UserError
from diffusionrl.evaluation.intervals import Estimate, mean_interval, overall
from diffusionrl.report.curves import COLOURS, Chart, Line, draw
from diffusionrl.report.page import (
    MAX_IMAGES,
    Cell,
    Pictures,
    cell,
    cut,
    decimals,
    duration,
    half_width,
    plus_minus,
    render,
    scrubber,
    write_page,
)
from diffusionrl.report.record import Evaluated, Run, Sample, read_run, time_unit
from diffusionrl.report.run_page import gains
from diffusionrl.runs.places import flat

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

    def mean(self, values: Callable[[Run], Values]) -> dict[int, Estimate]:
        """Over the runs, at the steps that all of them have; NaN where none has a number."""
        found = [values(run) for run in self.runs]
        steps = sorted(set.intersection(*(set(each) for each in found)))
        return {step: _over_seeds([each[step] for each in found]) for step in steps}


def _over_seeds(values: Sequence[float | None]) -> Estimate:
    return mean_interval([value for value in values if value is not None], "seeds")


def _over_samples(samples: Iterable[Sample], score: Callable[[Sample], float | None]) -> Estimate:
    scored = [(value, sample.prompt) for sample in samples if (value := score(sample)) is not None]
    return overall([value for value, _ in scored], [prompt for _, prompt in scored])


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
    names = [name for name in runs[0].scores() if all(name in run.scores() for run in runs)]
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
        measured = key.startswith("eval/") and re.search(r"(^|[/_])kl($|[/_])", key)
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
    """Over the seeds where there are several; else over the samples of the last evaluation, or their prompts."""
    runs = group.runs
    if len(runs) > 1:
        reward = _over_seeds([run.last("eval/reward") for run in runs])
        gain = _over_seeds([overall(*found).value for run in runs if (found := gains(run))[0]])
        scores = [_over_seeds([run.last(name) for run in runs]) for name in names]
    else:
        samples = runs[0].evaluations[-1].samples.values()
        reward, gain = _over_samples(samples, lambda sample: sample.reward), overall(*gains(runs[0]))
        scores = [_over_samples(samples, partial(_score, name=name.removeprefix("eval/"))) for name in names]
        whole = [_over_seeds([runs[0].last(name)]) for name in names]  # what no single sample has, such as the diversity
        scores = [one if one.units else other for one, other in zip(scores, whole, strict=True)]
    return {
        "label": group.label,
        "colour": f"c{group.colour}",
        "over": f"{reward.units} {reward.unit}",
        "queries": " / ".join(dict.fromkeys(f"{run.metrics[-1]['queries']:,}" for run in runs)),
        "hours": duration(fmean(run.metrics[-1]["hours"] for run in runs)),
        "reward": plus_minus(reward),
        "gain": plus_minus(gain, sign=True),
        "scores": [plus_minus(score) for score in scores],
    }


def _score(sample: Sample, name: str) -> float | None:
    return sample.scores.get(name)


def _charts(groups: list[Group], names: list[str], kl: Callable[[Run], Values], kl_note: str) -> list[Chart]:
    unit, scale = time_unit([run for group in groups for run in group.runs])

    def lines(key: str, x: Callable[[Run], Values], per: float = 1.0, training: bool = False) -> list[Line]:
        drawn = []
        for group in groups:
            places = {step: at.value * per for step, at in group.mean(x).items() if at.units}
            for one, dots in ((("reward/mean", False),) if training else ()) + ((key, True),):
                means = {s: v for s, v in group.mean(lambda run, one=one: _values(run, one)).items() if s in places}  # type: ignore[misc]
                y = [v.value if v.units else None for v in means.values()]
                spread = [half_width(v) if dots and v.units > 1 else 0.0 for v in means.values()]
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
