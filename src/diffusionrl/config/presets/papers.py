"""The papers' own runs, on the models that they had."""

import math

from diffusionrl.config import (
    DDPOConfig,
    DiffusionRLConfig,
    OptimizerConfig,
    PolicyConfig,
    PretrainingConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.config.judges import PICKSCORE
from diffusionrl.config.rewards import RewardsConfig


def ddpo_lora() -> TrainConfig:
    """The PyTorch release's recipe for JPEG compressibility: Stable Diffusion 1.4, LoRA, 100 steps of 256 samples.

    One deviation: bfloat16 for its float16.
    """
    return TrainConfig(
        model="CompVis/stable-diffusion-v1-4",
        prompts="imagenet-animals",
        steps=100,
        policy=PolicyConfig(dtype="bfloat16"),
        algorithm=DDPOConfig(buffer_size=16, micro_batch_size=8),
    )


def ddpo_paper() -> TrainConfig:
    """The paper's recipe for JPEG compressibility: Stable Diffusion 1.4, the whole UNet at 1e-5, 200 steps of 256 samples."""
    return TrainConfig(
        model="CompVis/stable-diffusion-v1-4",
        prompts="imagenet-animals",
        policy=PolicyConfig(training="full"),
        algorithm=DDPOConfig(advantage_clip=10.0, micro_batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )


def diffusionrl_paper() -> TrainConfig:
    """DiffusionRL's recipe for human preference: Stable Diffusion 2 base, the whole UNet at 2e-6, 2,048 samples a step.

    Deviations: PickScore stands in for ImageReward, ImageNet's animals for 1.5 million prompts of users of Stable Diffusion,
    which are to be given, as are the paper's 12 million images for the pretraining loss (``pretraining``).
    """
    return TrainConfig(
        model="stabilityai/stable-diffusion-2-base",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=1000,
        prompts_per_step=2048,
        sampling=SamplingConfig(guidance=7.0),
        policy=PolicyConfig(training="full"),
        algorithm=DiffusionRLConfig(micro_batch_size=4),
        # The code adds up the 16 samples of a GPU, we take the mean: an epsilon as much smaller makes the same step of AdamW.
        optimizer=OptimizerConfig(learning_rate=2e-6, weight_decay=1e-2, epsilon=1e-8 / 16, max_grad_norm=math.inf),
        pretraining=PretrainingConfig(batch_size=2048),  # 16 on each of 128 GPUs
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )
