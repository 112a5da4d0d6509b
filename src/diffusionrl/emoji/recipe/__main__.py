"""``python -m diffusionrl.emoji.recipe STAGE``."""

import tyro

from diffusionrl.emoji.recipe.classifier import ClassifierConfig, train_classifier
from diffusionrl.emoji.recipe.diffusion import DiffusionConfig, train_diffusion
from diffusionrl.emoji.recipe.publish import PublishConfig, publish
from diffusionrl.emoji.recipe.vae import VAEConfig, train_vae

STAGES = {
    "vae": (VAEConfig, train_vae),
    "diffusion": (DiffusionConfig, train_diffusion),
    "classifier": (ClassifierConfig, train_classifier),
    "publish": (PublishConfig, publish),
}

if __name__ == "__main__":
    config = tyro.extras.subcommand_cli_from_dict({name: make for name, (make, _) in STAGES.items()})
    next(run for make, run in STAGES.values() if isinstance(config, make))(config)  # type: ignore[arg-type]
