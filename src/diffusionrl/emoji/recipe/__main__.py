"""``python -m diffusionrl.emoji.recipe STAGE``."""

from collections.abc import Callable
from typing import Any

import tyro

from diffusionrl.emoji.recipe.classifier import ClassifierConfig, train_classifier
from diffusionrl.emoji.recipe.clip import CLIPTrainingConfig, train_clip
from diffusionrl.emoji.recipe.detector import DetectorConfig, DetectorJudgeConfig, train_detector
from diffusionrl.emoji.recipe.diffusion import DiffusionConfig, train_diffusion
from diffusionrl.emoji.recipe.flow import FlowConfig, train_flow
from diffusionrl.emoji.recipe.preference import PreferenceConfig, train_preference
from diffusionrl.emoji.recipe.publish import PublishConfig, publish
from diffusionrl.emoji.recipe.skin_tones import SkinTonesConfig, train_skin_tones
from diffusionrl.emoji.recipe.turbo import TurboConfig, train_turbo
from diffusionrl.emoji.recipe.vae import VAEConfig, train_vae

STAGES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "vae": (VAEConfig, train_vae),
    "classifier": (ClassifierConfig, train_classifier),
    "skin-tones": (SkinTonesConfig, train_skin_tones),
    "detector": (DetectorConfig, train_detector),
    "detector-judge": (DetectorJudgeConfig, train_detector),
    "clip": (CLIPTrainingConfig, train_clip),
    "preference": (PreferenceConfig, train_preference),
    "diffusion": (DiffusionConfig, train_diffusion),
    "flow": (FlowConfig, train_flow),
    "turbo": (TurboConfig, train_turbo),
    "publish": (PublishConfig, publish),
}

if __name__ == "__main__":
    chosen: Any = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in STAGES.items()})
    dict(STAGES.values())[type(chosen)](chosen)
