"""The embedded models, in minutes on two cores."""

from dataclasses import replace

from diffusionrl.config import (
    DDPOConfig,
    EvaluationConfig,
    NFTConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    TrainConfig,
)

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


def emoji_forward() -> TrainConfig:
    """A forward-process objective on the embedded model and JPEG compressibility, minutes on two cores; any of them by
    --algorithm.name.

    48 samples a step, as 6 prompts x 8, of 12 steps of the ODE with guidance 3; the plain prediction is trained.
    """
    return TrainConfig(
        steps=15,
        prompts_per_step=6,
        samples_per_prompt=8,
        sampling=SamplingConfig(12, 3.0, "ode", 0.0, batch_size=48),
        policy=PolicyConfig(lora_rank=16),
        algorithm=NFTConfig(noisings=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every=0, num_samples=90),
    )


def emoji_flow_forward() -> TrainConfig:
    """The same on the embedded flow model: 8 steps of the ODE, without guidance."""
    sampling = SamplingConfig(8, 1.0, "ode", 0.0, batch_size=48, call=("max_sequence_length=1",))
    return replace(emoji_forward(), model="emoji-flow", sampling=sampling)
