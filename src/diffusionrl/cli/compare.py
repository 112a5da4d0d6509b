"""``diffusionrl compare``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusionrl.errors import require


@dataclass(frozen=True)
class CompareConfig:
    """Several runs on one page; those that differ in the seed alone are taken together."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Two run folders or more; with --control or --blind, one."""
    out: Path = Path("compare.html")
    """The page; one that is there is written over."""
    control: bool = False
    """Put a run beside its control: the same training on a reward of noise, in RUN-noise. It is trained first, where it is not
    there yet."""
    blind: bool = False
    """Put a run beside its blind control: the same training with one weight for every sample, in RUN-blind."""


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(CompareConfig, args=arguments, prog="diffusionrl compare")
    wanted = [kind for kind, asked in (("noise", config.control), ("blind", config.blind)) if asked]
    runs = [*config.runs, *(_controlled(config.runs, kind) for kind in wanted)]
    from diffusionrl.report.compare_page import write_comparison

    print(f"comparison: {write_comparison(runs, config.out)}")


def _controlled(runs: Sequence[Path], kind: str) -> Path:
    """The folder of a run's control, which is trained where it must be; what the reward did is printed."""
    option = "--blind" if kind == "blind" else "--control"
    require(len(runs) == 1, f"{option} takes one run folder, not {len(runs)}")
    from diffusionrl.cli.parsing import parse_run, quiet_libraries
    from diffusionrl.report.record import read_run

    folder = runs[0]
    target = folder.resolve().with_name(f"{folder.resolve().name}-{kind}")
    settings = parse_run(folder)
    quiet_libraries()
    from diffusionrl.api import train
    from diffusionrl.report.control import CONTROLS, effects, table

    train(CONTROLS[kind](settings, target))
    run, control = read_run(folder), read_run(target)
    print(f"\nchange of each score since before training, mean ± 95 %\n{table(effects(run, control), run, control)}")
    return target
