"""Means with 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 2e-4: a table, then Fisher's expansion (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values; ``half`` is half the width of its 95 % interval (Student's t), None for a single value."""

    mean: float
    half: float | None
    count: int


def interval(values: Sequence[float | None]) -> Interval | None:
    """Of the values that are there; None where there is none."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    half = None
    if len(there) > 1:
        half = student_t(len(there) - 1) * statistics.stdev(there) / math.sqrt(len(there))
    return Interval(statistics.fmean(there), half, len(there))
