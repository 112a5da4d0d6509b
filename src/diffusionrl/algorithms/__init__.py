"""Algorithms: one file each."""

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.algorithms.ddpo import DDPO
from diffusionrl.algorithms.rwr import RWR
from diffusionrl.config import TrainConfig

__all__ = ["DDPO", "RWR", "Algorithm", "make_algorithm"]


def make_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm that a configuration names."""
    if config.algorithm.name == "rwr":
        return RWR(config.algorithm, config.sampling.guidance)
    return DDPO(config.algorithm, config.sampling.guidance)
