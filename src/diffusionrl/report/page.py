"""What both pages share: the templates, the policy that shuts the network out, how numbers and prompts are shown."""

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffusionrl.evaluation.intervals import Estimate
from diffusionrl.report.curves import tick_label
from diffusionrl.report.record import Evaluated, Sample
from diffusionrl.report.thumbnails import data_uri, sound_uri
from diffusionrl.runs import checkpoint
from diffusionrl.runs.lines import PARTIAL

MAX_IMAGES = 500
"""In a page's scrubber."""
MAX_STOPS = 20
"""Of the scrubber's slider, but for the last evaluation, which is always one."""
MAX_TEXT = 240
"""Characters of a prompt that are shown."""


def render(template: str, **content: Any) -> str:
    """A page. The style sheet and the script are allowed by their hashes, images from the page itself, and nothing else."""
    here = Path(__file__).parent
    # Not escaped: they come with the package, and no word of a run is in them.
    style, script = (Markup((here / name).read_text()) for name in ("page.css", "page.js"))
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            "media-src data:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    about = {"version": version("diffusionrl"), "written": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    return _environment().get_template(template).render(style=style, script=script, policy=policy, **about, **content)


@cache  # a run writes its report at every evaluation, and a template is slow to compile
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("diffusionrl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "cut": cut, "plus_minus": plus_minus, "duration": duration}
    return environment


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def write_page(target: Path, page: str) -> None:
    """Whole or not at all.

    Raises:
        OSError: it cannot be written, or would leave the disk too little room for a run.
    """
    content = page.encode("utf-8", "replace")  # a prompt may hold half a surrogate pair
    free = checkpoint.free_bytes(target.parent)
    if free < 10 * len(content):
        raise OSError(f"only {free / 1e6:.0f} MB are free for a page of {len(content) / 1e6:.1f} MB")
    temporary = target.with_name(target.name + PARTIAL)
    try:
        temporary.write_bytes(content)
        temporary.rename(target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


_SOUND_BYTES = 16_000_000


@dataclass
class Pictures:
    """The images of a page, each of them in it once."""

    uris: list[str] = field(default_factory=list)
    sounds: dict[int, str] = field(default_factory=dict)
    """By the number of the picture of its wave; those that came first, as far as the page has room for them."""
    _numbers: dict[str, int] = field(default_factory=dict)
    _files: dict[Path, int] = field(default_factory=dict)

    def add(self, file: Path) -> int:
        """Its number; -1 where it cannot be read."""
        if file not in self._files:
            uri = data_uri(file)
            if uri is not None and uri not in self._numbers:
                self._numbers[uri] = len(self.uris)
                self.uris.append(uri)
                self._add_sound(file)
            self._files[file] = -1 if uri is None else self._numbers[uri]
        return self._files[file]

    def _add_sound(self, file: Path) -> None:
        sound = sound_uri(file)
        if sound is not None and sum(map(len, self.sounds.values())) + len(sound) <= _SOUND_BYTES:
            self.sounds[len(self.uris) - 1] = sound


@dataclass(frozen=True)
class Cell:
    """What a tile of the scrubber shows at one stop of the slider; ``image`` is a number of ``Pictures``."""

    image: int
    score: str
    change: str
    better: bool | None


def decimals(evaluations: Sequence[Evaluated]) -> int:
    """How many leave the largest reward four digits, so that the rewards of a page stand below each other."""
    largest = max((abs(s.reward) for each in evaluations for s in each.samples.values() if s.reward is not None), default=0.0)
    return 3 if largest <= 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))


def cell(sample: Sample | None, first: Sample | None, pictures: Pictures, places: int) -> Cell:
    """A sample beside what it was before training, to so many decimal places."""
    if sample is None:
        return Cell(-1, "", "", None)
    if sample.reward is None:
        return Cell(pictures.add(sample.image), "invalid", "", None)
    change = None if first is None or first is sample or first.reward is None else sample.reward - first.reward
    shown = "" if change is None else f"{change:+,.{places}f}".replace("-", "−")
    score = f"{sample.reward:,.{places}f}".replace("-", "−")
    return Cell(pictures.add(sample.image), score, shown, None if change is None else change >= 0)


def scrubber(pictures: Pictures, labels: Sequence[str], cells: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """The slider's stops, oldest first, and the cells of each; the page opens at the last. For the macros and the script."""
    shown = {each.image for each in cells[-1]} if cells else set()
    # What the page opens with is in its tiles; the script takes it from there.
    later = [None if index in shown else uri for index, uri in enumerate(pictures.uris)]
    data = {
        "labels": list(labels),
        "images": later,
        "sounds": pictures.sounds,
        "cells": [[[c.image, c.score, c.change, c.better] for c in s] for s in cells],
    }
    return {
        "labels": list(labels),
        "last": list(cells[-1]) if cells else [],
        "uris": pictures.uris,
        "sounds": pictures.sounds,
        "data": _json(data),
    }


def _json(data: Any) -> Markup:
    """JSON that cannot end the script element that it is in."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def thinned(evaluations: Sequence[Evaluated], limit: int = MAX_STOPS) -> list[Evaluated]:
    """At most ``limit`` evaluations, evenly, and the last. As a run goes on, those that were left out stay left out."""
    stride = 1
    while len(evaluations) > stride * limit:
        stride *= 2
    kept = list(evaluations[::stride])
    return kept if not kept or kept[-1] is evaluations[-1] else [*kept, evaluations[-1]]


def number(value: float | None, digits: int = 4) -> str:
    """1234.5 -> 1,234 and -0.52 -> −0.52; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "−")
    return tick_label(float(f"{value:.{digits}g}"))


def signed(value: float, digits: int = 3) -> str:
    return ("+" if value >= 0 else "") + number(value, digits)


def half_width(estimate: Estimate) -> float:
    """Of its interval; NaN where there is none."""
    return (estimate.high - estimate.low) / 2


def plus_minus(estimate: Estimate, sign: bool = False) -> str:
    """A mean and half the width of its interval, two digits of that and the mean to the same place."""
    if math.isnan(estimate.value):
        return "–"
    half = half_width(estimate)
    if not half > 0:
        return signed(estimate.value, 4) if sign else number(estimate.value)
    places = min(9, max(0, 1 - math.floor(math.log10(half))))
    return f"{estimate.value:{'+' if sign else ''},.{places}f} ± {half:,.{places}f}".replace("-", "−")


def cut(text: str, length: int = MAX_TEXT) -> str:
    """For display: a prompt may be megabytes long."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def duration(hours: float) -> str:
    """0.05 -> 3.0 min."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
