"""Algorithms: one file each; what several share is in ``policy_gradient.py`` and ``denoising.py``."""

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.algorithms.ddpo import DDPO
from diffusionrl.algorithms.diffusionrl import DiffusionRL
from diffusionrl.algorithms.rwr import RWR
from diffusionrl.config import DiffusionRLConfig, RWRConfig, TrainConfig

__all__ = ["DDPO", "RWR", "Algorithm", "DiffusionRL", "make_algorithm"]


def make_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm that a configuration names."""
    settings, guidance = config.algorithm, config.sampling.guidance
    if isinstance(settings, RWRConfig):
        return RWR(settings, guidance)
    return DiffusionRL(settings, guidance) if isinstance(settings, DiffusionRLConfig) else DDPO(settings, guidance)
