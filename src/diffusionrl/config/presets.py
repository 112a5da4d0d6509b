"""Named configurations. Each is a function that returns a whole one; ``--preset NAME`` starts from it."""

import math
from collections.abc import Callable

from diffusionrl.config import (
    DDPOConfig,
    DiffusionRLConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    PretrainingConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.config.rewards import CLIPScoreConfig, RewardsConfig

# The paper's clip in units that do not depend on the model: clip_range * latent dimensions (4 * 64 * 64 at 512 pixels).
_CLIP_TIMES_DIMENSIONS = 1e-4 * 4 * 64 * 64


def emoji() -> TrainConfig:
    """DDPO on the embedded model and JPEG compressibility, minutes on two cores. docs/ddpo.md says how it was scaled, and why.

    In short: 64 samples a step for 256, as 16 prompts x 4; 16 denoising steps for 50 of which half are trained, weighted by the
    square of their fresh noise; guidance 3 for 5; a clip range that keeps clip * dimensions (8 x 8 x 16 latents); and a higher
    learning rate with a warm-up, because a run is two dozen steps long, not two hundred.
    """
    return TrainConfig(
        steps=24,
        prompts_per_step=16,
        samples_per_prompt=4,
        sampling=SamplingConfig(num_steps=16, guidance=3.0, batch_size=32),
        policy=PolicyConfig(lora_rank=16),
        algorithm=DDPOConfig(
            clip_range=_CLIP_TIMES_DIMENSIONS / (8 * 8 * 16),
            min_count=4,
            updates_per_step=2,
            train_fraction=0.5,
            step_weight_power=2.0,
            micro_batch_size=64,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup=10),
        evaluation=EvaluationConfig(every=0, num_samples=90),
    )


def emoji_flow() -> TrainConfig:
    """The clipped policy gradient on the embedded flow model and JPEG compressibility, minutes on two cores.

    Without guidance and with advantages by group the signal is far above the noise, so little is needed: 48 samples a step, as
    6 prompts x 8, on 8 steps of coefficients-preserving sampling. Steps are weighted by the square of their fresh noise: the
    grid's last step has hardly any, and its gradient would drown the others'.
    """
    return TrainConfig(
        model="emoji-flow",
        steps=15,
        prompts_per_step=6,
        samples_per_prompt=8,
        sampling=SamplingConfig(8, 1.0, "cps", 0.7, batch_size=48, call=("max_sequence_length=1",)),
        policy=PolicyConfig(lora_rank=16),
        algorithm=DDPOConfig(
            clip_range=1e-3, normalisation="group", updates_per_step=2, step_weight_power=2.0, micro_batch_size=48
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every=0, num_samples=90),
    )


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
        rewards=RewardsConfig(
            clip_score=CLIPScoreConfig(model="yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
        ),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "emoji": emoji,
    "emoji-flow": emoji_flow,
    "ddpo-lora": ddpo_lora,
    "ddpo-paper": ddpo_paper,
    "diffusionrl-paper": diffusionrl_paper,
}
