"""Reinforcement learning for diffusion and flow models: tune a model towards anything you can measure."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionrl.api import diagnose as diagnose
    from diffusionrl.api import train as train
    from diffusionrl.config import TrainConfig as TrainConfig
    from diffusionrl.data.prompts import Prompt as Prompt
    from diffusionrl.errors import RunStopped as RunStopped
    from diffusionrl.errors import UserError as UserError
    from diffusionrl.policies import NetworkPolicy as NetworkPolicy
    from diffusionrl.policies import load_policy as load_policy
    from diffusionrl.sampling.search import search as search

# huggingface_hub reports home even when it is asked for cached files only; it reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_PUBLIC = {
    "NetworkPolicy": "diffusionrl.policies",
    "Prompt": "diffusionrl.data.prompts",
    "RunStopped": "diffusionrl.errors",
    "TrainConfig": "diffusionrl.config",
    "UserError": "diffusionrl.errors",
    "diagnose": "diffusionrl.api",
    "load_policy": "diffusionrl.policies",
    "search": "diffusionrl.sampling.search",
    "train": "diffusionrl.api",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that the command line answers without torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffusionrl' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
