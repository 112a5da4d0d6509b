"""Signal and noise of a run's updates: how much of what moves the weights would be the same with other samples.

An update's groups are cut into two halves, whose gradients are a and b (``training/optimization.py``). Of a true gradient g and
noise of variance s^2 / n from n groups, E[a.b] = |g|^2 and E|a|^2 = |g|^2 + 2 s^2 / n, so their cosine c estimates

    c = |g|^2 / (|g|^2 + 2 s^2 / n),        |g|^2 : s^2 / n  =  2 c / (1 - c)

the ratio of signal to noise of the update, in power. After k updates with the same g, what they moved along it has grown by k,
and what they moved at random by the root of k: the share of the squared displacement that is a random walk is
1 / (1 + k ratio).
One cosine says next to nothing, as there are many more weights than groups; their mean over a run does.

The estimate knows nothing of what the optimizer makes of a gradient, and what is common to the halves need not be the reward's
doing: the loss of a regression moves weights without any reward. A control run on ``--reward noise`` tells that apart.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

COSINE = "signal/cosine"
"""Of the two halves of a step's updates."""
UPDATES = "signal/updates"
"""That had two halves, in a step."""
SAMPLES = "signal/samples"
"""Of all these updates."""
_LEAST = 3
"""Steps, below which there is no standard error to speak of."""


@dataclass(frozen=True)
class Signal:
    """Of all updates so far.

    Attributes:
        cosine: mean over the steps.
        error: its standard error, from the differences between one step and the next: a trend is no noise.
        updates: their number.
        samples: in one update.
    """

    cosine: float
    error: float
    updates: int
    samples: float

    def walk(self, sigmas: float = 0.0) -> float:
        """The share of the squared displacement that is a random walk; at a cosine so many standard errors higher."""
        return 1 / (1 + self.updates * _ratio(self.cosine + sigmas * self.error))

    @property
    def is_seen(self) -> bool:
        """The halves agree beyond chance, by two standard errors."""
        return self.cosine > 2 * self.error

    @property
    def needed(self) -> float:
        """Samples in one update of which half would be signal; in many updates together too. Infinite where none is seen."""
        return self.samples / _ratio(self.cosine) if self.cosine > 0 else math.inf


def _ratio(cosine: float) -> float:
    """Of signal to noise, in power."""
    return 2 * cosine / (1 - cosine) if 0 < cosine < 1 else 0.0 if cosine <= 0 else math.inf


def signal_of(lines: Sequence[dict[str, Any]], task: str = "") -> Signal | None:
    """Of the lines of metrics.jsonl; None where too few say anything.

    Args:
        task: "NAME/" where the run has several.
    """
    said = [line for line in lines if line.get(f"{task}{COSINE}") is not None]
    if len(said) < _LEAST:
        return None
    cosines = [line[f"{task}{COSINE}"] for line in said]
    updates = sum(int(line[f"{task}{UPDATES}"]) for line in said)
    samples = sum(line[f"{task}{SAMPLES}"] for line in said)
    jumps = [(later - earlier) ** 2 for earlier, later in pairwise(cosines)]
    error = math.sqrt(sum(jumps) / (2 * len(jumps)) / len(cosines))
    return Signal(statistics.fmean(cosines), error, updates, samples / updates)
