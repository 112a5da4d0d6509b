"""Algorithms: one file each."""

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.algorithms.ddpo import DDPO

__all__ = ["DDPO", "Algorithm"]
