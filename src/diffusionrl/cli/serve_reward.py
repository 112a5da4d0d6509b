"""``diffusionrl serve-reward``."""

from collections.abc import Sequence

import tyro

from diffusionrl.cli.parsing import check_reward
from diffusionrl.config.rewards import ServeConfig


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(ServeConfig, args=arguments, prog="diffusionrl serve-reward")
    check_reward(config.name)
    from diffusionrl.serving.server import serve  # which needs few of our dependencies: see docs/serve_reward.md

    serve(config)
