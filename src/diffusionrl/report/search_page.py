"""``report.html`` of a search: before and after on the same seeds, and the reward against the queries."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError
from diffusionrl.evaluation.intervals import differences, overall
from diffusionrl.report.curves import Chart, Line, draw
from diffusionrl.report.page import (
    MAX_IMAGES,
    Pictures,
    cell,
    cut,
    decimals,
    half_width,
    plus_minus,
    render,
    scrubber,
    write_page,
)
from diffusionrl.report.record import Evaluated, Sample
from diffusionrl.runs.places import flat
from diffusionrl.runs.work import read_settings
from diffusionrl.sampling.search_folder import KIND, SIDES, read_images


def write_search_page(folder: Path) -> Path:
    """Write the page into a folder of a search. Returns its path.

    Raises:
        UserError: nothing has been found yet, or the folder cannot be read or written to.
    """
    entries = read_images(folder)
    if not entries:
        raise UserError(f"{folder} has no image yet")
    page = render("search.html.jinja", **_content(folder, entries, read_settings(folder, KIND)))
    try:
        write_page(folder / "report.html", page)
    except OSError as error:
        raise UserError(f"{folder / 'report.html'} cannot be written: {error}") from error
    return folder / "report.html"


def _content(folder: Path, entries: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    shown = entries[: MAX_IMAGES // len(SIDES)]
    samples = {side: {each["index"]: _sample(folder, each, side) for each in shown} for side in SIDES}
    places = decimals([Evaluated(0, 0, each) for each in samples.values()])
    pictures = Pictures()
    cells = [
        cell(samples[side][each["index"]], samples["before"][each["index"]], pictures, places)
        for each in shown
        for side in SIDES
    ]
    return {
        "search": settings["search"]["name"],
        "model": settings["model"],
        "reward": " + ".join(settings["reward"]),
        "num_images": len(entries),
        "num_asked": len(settings["prompts"]) * len(settings["seeds"]),
        "captions": [f"{cut(each['prompt'])} · seed {each['seed']}" for each in shown],
        "rows": _rows(entries),
        "spent": _spent(entries),
        "chart": _chart(entries),
        "settings": [(key, _said(value)) for key, value in flat(settings).items() if _tells(key, value)],
        "scrubber": scrubber(pictures, ["after"], [cells]),
    }


def _sample(folder: Path, entry: dict[str, Any], side: str) -> Sample:
    image = folder / side / f"{entry['index']:05d}.png"
    return Sample(entry["index"], entry["prompt"], entry[side]["reward"], {}, image)


def _rows(entries: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each score: means with intervals, and the paired gain."""
    prompts = [each["prompt"] for each in entries]
    rows = []
    for name in entries[0]["before"]:
        before, after = ([_number(each[side].get(name)) for each in entries] for side in SIDES)
        found = {"before": overall(before, prompts), "after": overall(after, prompts)}
        gain = overall(differences(after, before), prompts)
        rows.append({"name": name, "gain": plus_minus(gain, sign=True)} | {side: plus_minus(found[side]) for side in SIDES})
    return rows


def _spent(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """On an image, on average; and invalid scores altogether."""
    mean = {key: sum(each["spent"][key] for each in entries) / len(entries) for key in ("queries", "denoisings", "seconds")}
    return mean | {"invalid": sum(each["spent"]["invalid"] for each in entries)}


def _chart(entries: Sequence[dict[str, Any]]) -> Chart | None:
    """Means over the images: of the candidates of each round, of the best so far, and of the images before and after."""
    rounds = max(len(each["rounds"]) for each in entries)
    queries, means, best = [], [], []
    for number in range(rounds):
        there = [each["rounds"][: number + 1] for each in entries if number < len(each["rounds"])]
        queries.append(_mean([each[-1]["queries"] for each in there]))
        means.append(_mean([value for each in there for value in each[-1]["values"]]))
        best.append(_mean([_best(each) for each in there]))
    prompts = [each["prompt"] for each in entries]
    ends = [[each[side]["reward"] for each in entries] for side in SIDES]
    spent = _mean([each["spent"]["queries"] for each in entries])
    half = half_width(overall(differences([_number(each) for each in ends[1]], [_number(each) for each in ends[0]]), prompts))
    spreads = [0.0, 0.0 if math.isnan(half) else half]
    lines = [
        Line("best candidate so far", queries, best, colour=2),
        Line("candidates of a round", queries, means, colour=4),
        Line("the image, before and after", [0, spent], [_mean(each) for each in ends], spreads, colour=1, dots=True),
    ]
    return draw("reward against queries", "queries an image", lines, "means over the images; the bar is the gain's")


def _best(rounds: Sequence[dict[str, Any]]) -> float | None:
    return max((value for each in rounds for value in each["values"] if value is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tells(key: str, value: Any) -> bool:
    """Whether a setting is shown: search.json has them all."""
    return value is not None and value != [] and not key.startswith(("prompts", "rewards."))


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
