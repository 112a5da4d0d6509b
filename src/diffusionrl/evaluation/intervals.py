"""How sure a mean and a win rate are: 95 % intervals, and two sets of scores compared pair by pair. Plain Python.

A mean has Student's t interval. Its units are the samples; where there are several samples a prompt, the prompts, each with the
mean of its samples, because samples of one prompt resemble each other. A win rate has Wilson's interval over the pairs, a tie
counting half. A score that is NaN is invalid, and leaves both sides of its pair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value: NaN where there is nothing to estimate from.
        low, high: NaN where there is too little to say.
        units: how many things it was estimated from.
        unit: what they are: "samples", "prompts" or "pairs".
    """

    value: float
    low: float
    high: float
    units: int
    unit: str


def student_t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with ``degrees`` degrees of freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(odd + 1, degrees, 2):  # the term of cos ** (k - 1)
        total += term
        term *= math.cos(theta) ** 2 * k / (k + 1)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def student_t_quantile(level: float, degrees: int) -> float:
    """The t that |T| does not exceed with probability ``level``, by bisection."""
    low, high = 0.0, 1.0
    while student_t_probability(high, degrees) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_probability(middle, degrees) < level else (low, middle)
    return high


def mean_interval(values: Sequence[float], unit: str = "samples") -> Estimate:
    """The mean of finite values, and Student's t interval."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, unit)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1, unit)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = student_t_quantile(LEVEL, count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count, unit)


def win_rate(differences: Sequence[float]) -> Estimate:
    """The share of differences above 0, those of 0 counting half, and Wilson's interval (Wilson, 1927)."""
    count = len(differences)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "pairs")
    rate = sum((difference > 0) + (difference == 0) / 2 for difference in differences) / count
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half), count, "pairs")


def by_prompt(values: Sequence[float], prompts: Sequence[str]) -> dict[str, list[float]]:
    """The valid values of each prompt, in the order in which prompts first come."""
    groups: dict[str, list[float]] = {prompt: [] for prompt in prompts}
    for prompt, value in zip(prompts, values, strict=True):
        if math.isfinite(value):
            groups[prompt].append(value)
    return groups


def overall(values: Sequence[float], prompts: Sequence[str]) -> Estimate:
    """The mean over samples, or over prompts where there are several samples a prompt."""
    groups = [group for group in by_prompt(values, prompts).values() if group]
    if len(groups) > 1 and len(set(prompts)) < len(prompts):
        return mean_interval([math.fsum(group) / len(group) for group in groups], "prompts")
    return mean_interval([value for group in groups for value in group])


def differences(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Of each pair; NaN where either side is invalid."""
    return [one - other if math.isfinite(one - other) else math.nan for one, other in zip(values, baseline, strict=True)]
