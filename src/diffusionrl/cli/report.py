"""``diffusionrl report``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class ReportConfig:
    """Write a run's report.html again, from what is in its folder. A run does so itself as it goes on."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(ReportConfig, args=arguments, prog="diffusionrl report")
    from diffusionrl.report.run_page import write_report

    print(f"report: {write_report(config.run)}")
