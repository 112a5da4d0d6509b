"""``diffusionrl push``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusionrl.errors import UserError


@dataclass(frozen=True)
class PushConfig:
    """Upload what a run exported to the Hugging Face hub. Log in first (hf auth login), or set HF_TOKEN."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME; the repository is made if it is not there."""
    private: bool = False
    """Make a new repository private."""


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(PushConfig, args=arguments, prog="diffusionrl push")
    export = config.run / "export"
    if not export.is_dir():
        raise UserError(f"{config.run} has no export folder: give the folder of a run that has trained")
    from diffusionrl.runs.hub import push

    print(f"pushed: {push(export, config.repo_id, config.private)}")
