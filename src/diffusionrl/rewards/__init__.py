"""Rewards: one file each. ``load_reward`` finds them by name."""

from diffusionrl.rewards import jpeg
from diffusionrl.rewards.base import REGISTRY, Reward, Scores, load_reward, register, score, try_reward

__all__ = ["REGISTRY", "Reward", "Scores", "jpeg", "load_reward", "register", "score", "try_reward"]
