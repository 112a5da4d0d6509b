"""``diffusionrl export``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusionrl.cli.parsing import parse_run, quiet_libraries
from diffusionrl.errors import UserError
from diffusionrl.paths import expand, is_there


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights of one of a run's checkpoints as the run itself writes its last ones to export/."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    step: int | None = None
    """Of the checkpoint; by default the newest. How many are kept is --checkpoint.keep of train."""
    out: Path = Path("export")
    """Folder for them; it must not exist. sample and evaluate take a LoRA as --lora."""


def run(arguments: Sequence[str]) -> None:
    asked = tyro.cli(ExportConfig, args=arguments, prog="diffusionrl export")
    run_dir, out = expand(asked.run), expand(asked.out)
    config = parse_run(run_dir)
    if is_there(out):
        raise UserError(f"{out} exists: choose another --out")
    quiet_libraries()
    from diffusionrl.policies.trained import export_checkpoint

    step = export_checkpoint(run_dir, config, asked.step, out)
    print(f"weights of step {step}: {out}")
