"""Rewards: one file each. ``load_reward`` finds them by name."""

from diffusionrl.foreign.thread import within
from diffusionrl.rewards import (
    aesthetic,
    clip,
    composition,
    diffusion_classifier,
    emoji,
    human,
    jpeg,
    nearness,
    noise,
    parity,
    preference,
    vlm,
)
from diffusionrl.rewards.base import REGISTRY, Reward, Scores, differentiable, register, score, try_reward
from diffusionrl.rewards.gradient import require_gradient, try_gradient
from diffusionrl.rewards.loading import load_reward
from diffusionrl.rewards.mixture import Mixture, as_mixture, load_mixture, try_mixture
from diffusionrl.rewards.smooth import Smoothed
from diffusionrl.rewards.worker import RewardCall, RewardQueue

__all__ = [
    "REGISTRY",
    "Mixture",
    "Reward",
    "RewardCall",
    "RewardQueue",
    "Scores",
    "Smoothed",
    "aesthetic",
    "as_mixture",
    "clip",
    "composition",
    "differentiable",
    "diffusion_classifier",
    "emoji",
    "human",
    "jpeg",
    "load_mixture",
    "load_reward",
    "nearness",
    "noise",
    "parity",
    "preference",
    "register",
    "require_gradient",
    "score",
    "try_gradient",
    "try_mixture",
    "try_reward",
    "vlm",
    "within",
]
