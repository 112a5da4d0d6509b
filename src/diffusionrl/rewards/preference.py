"""The preference reward of the embedded world: a Bradley-Terry model of choices between images of one prompt.

In small what ImageReward (arXiv 2304.05977) is to DiffusionRL (arXiv 2401.12244, Sec. 4), with a rule in the place of raters
(``emoji/preference.py``), so that one can tell what the score is still worth once a policy has been trained towards it: the
rewards "emoji-gold" and "emoji-judge" are the two halves of the rule, for single subjects. Differentiable in the images.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.preference import load_preference_model
from diffusionrl.emoji.scenes import IMAGE_SIZE
from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Reward, differentiable, register
from diffusionrl.rewards.clip import CLIP


@register("preference")
def preference(config: RewardsConfig) -> Reward:
    """R(image, prompt), in units of utility; only differences within a prompt mean anything."""
    clip, model = CLIP("emoji"), load_preference_model().requires_grad_(False)

    @differentiable
    def preference(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"the reward preference sees images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not {tuple(images.shape[-2:])}: for "
                "other models than the embedded one take PickScore (clip-score) or ImageReward (docs/serve_reward.md)"
            )
        return model(images, clip.embed_images(images), clip.embed_texts(prompts))

    return preference
