"""``diffusionrl compare``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class CompareConfig:
    """Several runs on one page; those that differ in the seed alone are taken together."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Two run folders or more."""
    out: Path = Path("compare.html")
    """The page; one that is there is written over."""


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(CompareConfig, args=arguments, prog="diffusionrl compare")
    from diffusionrl.report.compare_page import write_comparison

    print(f"comparison: {write_comparison(config.runs, config.out)}")
