"""Named configurations. Each is a function that returns a whole one; ``--preset NAME`` starts from it."""

from collections.abc import Callable

from diffusionrl.config import TrainConfig
from diffusionrl.config.presets.embedded import emoji, emoji_flow, emoji_flow_forward, emoji_forward
from diffusionrl.config.presets.models import flux1_dev, flux2_klein_base, qwen_image, sd35_medium, sdxl, wan21, z_image
from diffusionrl.config.presets.papers import ddpo_lora, ddpo_paper, diffusionrl_paper

__all__ = [
    "PRESETS",
    "ddpo_lora",
    "ddpo_paper",
    "diffusionrl_paper",
    "emoji",
    "emoji_flow",
    "emoji_flow_forward",
    "emoji_forward",
    "flux1_dev",
    "flux2_klein_base",
    "qwen_image",
    "sd35_medium",
    "sdxl",
    "wan21",
    "z_image",
]

PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "emoji": emoji,
    "emoji-flow": emoji_flow,
    "emoji-forward": emoji_forward,
    "emoji-flow-forward": emoji_flow_forward,
    "ddpo-lora": ddpo_lora,
    "ddpo-paper": ddpo_paper,
    "diffusionrl-paper": diffusionrl_paper,
    "sd3.5-medium": sd35_medium,
    "sdxl": sdxl,
    "flux.1-dev": flux1_dev,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "flux.2-klein-base": flux2_klein_base,
    "wan2.1-1.3b": wan21,
}
