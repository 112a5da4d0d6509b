"""Models as the field tunes them: published policy-gradient recipes towards PickScore, as far as DDPO's clipped ratio goes.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), DDPO (2305.13301), Flow-Factory (2602.12529), with the settings
of their released configurations. Their log-probabilities are means over the latent dimensions, as ours are, so clip ranges are
taken as they are. Where every recipe here departs from its source:

- a LoRA's alpha is its rank, where theirs is twice that: at the same learning rate it moves half as far;
- weights are not averaged over training steps;
- trained denoising steps are drawn for each sample among those with fresh noise, the last one too, which Flow-GRPO and
  DanceGRPO leave out: where it has so little that its gradient would drown the others', steps count in proportion to theirs,
  as in TempFlow-GRPO;
- grids are those of the pipeline's own scheduler, whatever shift the source has;
- ImageNet's animals stand in for the source's prompts (Pick-a-Pic, HPD and others), which are to be given;
- the number of steps is ours where the source leaves it open.

``batch_size``, ``micro_batch_size`` and memory options are ours: they change memory and speed, not results. None of these was
run at full size.
"""

from diffusionrl.config import DDPOConfig, EvaluationConfig, OptimizerConfig, PolicyConfig, SamplingConfig, TrainConfig
from diffusionrl.config.judges import PICKSCORE
from diffusionrl.config.rewards import RewardsConfig


def sd35_medium() -> TrainConfig:
    """Flow-GRPO on Stable Diffusion 3.5 Medium: 48 prompts x 24 at 512 pixels, on 10 steps of its SDE of which 9 are trained.

    Deviations: no KL to the model before training (0.01 there); rewards in units of the deviation of a prompt's samples, not of
    the step's; bfloat16 for its float16.
    """
    return TrainConfig(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=1000,
        prompts_per_step=48,
        samples_per_prompt=24,
        sampling=SamplingConfig(
            num_steps=10,
            guidance=4.5,
            sampler="flow_grpo",
            eta=0.7,
            batch_size=8,
            height=512,
            width=512,
            call=("max_sequence_length=128",),
        ),
        policy=PolicyConfig(lora_rank=32, gradient_checkpointing=True, vae_slicing=True, dtype="bfloat16"),
        algorithm=DDPOConfig(
            normalisation="group", updates_per_step=2, train_fraction=0.9, step_weight_power=1.0, micro_batch_size=8
        ),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def sdxl() -> TrainConfig:
    """DDPO's PyTorch release, moved from Stable Diffusion 1.4 to SDXL: 256 samples on 50 ancestral steps, 2 updates, 200 steps.

    We know of no policy gradient on SDXL with published results. Deviations: PickScore for the aesthetic reward; 16 samples of
    each of 16 prompts, compared within the prompt, for a memory of each prompt's rewards, so that prompts without number will
    do; 1024 pixels, with a clip range that keeps clip * dimensions (4 x 128 x 128 latents); bfloat16 for its float16. Its own
    alpha is the rank too.
    """
    return TrainConfig(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=200,
        prompts_per_step=16,
        samples_per_prompt=16,
        sampling=SamplingConfig(num_steps=50, guidance=5.0, sampler="ddim", eta=1.0, batch_size=4, height=1024, width=1024),
        policy=PolicyConfig(lora_rank=4, gradient_checkpointing=True, vae_slicing=True, dtype="bfloat16"),
        algorithm=DDPOConfig(clip_range=2.5e-5, normalisation="group", updates_per_step=2, micro_batch_size=4),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def flux1_dev() -> TrainConfig:
    """DanceGRPO's LoRA recipe on FLUX.1-dev: 16 prompts x 12 at 720 pixels, on 12 steps of its SDE of which 0.6 are trained.

    Deviations: PickScore, which it offers, for HPSv2.1; a prompt's samples begin at noise of their own (there, at the same);
    the fresh noise of the last step stays in the image. Guidance is embedded.
    """
    return TrainConfig(
        model="black-forest-labs/FLUX.1-dev",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=300,
        prompts_per_step=16,
        samples_per_prompt=12,
        sampling=SamplingConfig(num_steps=12, guidance=3.5, sampler="dance_grpo", eta=0.3, batch_size=2, height=720, width=720),
        policy=PolicyConfig(
            lora_rank=128,
            lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
            gradient_checkpointing=True,
            vae_slicing=True,
            dtype="bfloat16",
        ),
        algorithm=DDPOConfig(normalisation="group", updates_per_step=2, train_fraction=0.6, micro_batch_size=2),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def z_image() -> TrainConfig:
    """Flow-Factory's GRPO on Z-Image (the base, not Turbo): 48 prompts x 16 at 512 pixels, on 10 steps.

    Deviations: there, one of the second to fourth steps is an SDE (0.7) and the others an ODE; here all have fresh noise, of
    coefficients-preserving sampling (arXiv 2509.05952) at 0.8, which leaves none in the image, and 0.6 of them are trained;
    frozen weights in bfloat16 (there, float32). Guidance counts from 0: this 4 is what others call 5.
    """
    return TrainConfig(
        model="Tongyi-MAI/Z-Image",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=300,
        prompts_per_step=48,
        samples_per_prompt=16,
        sampling=SamplingConfig(num_steps=10, guidance=4.0, sampler="cps", eta=0.8, batch_size=4, height=512, width=512),
        policy=PolicyConfig(
            lora_rank=64,
            lora_targets=("attention", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            gradient_checkpointing=True,
            vae_slicing=True,
            dtype="bfloat16",
        ),
        algorithm=DDPOConfig(
            normalisation="group", updates_per_step=2, train_fraction=0.6, step_weight_power=1.0, micro_batch_size=4
        ),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def qwen_image() -> TrainConfig:
    """Flow-GRPO on Qwen-Image: 32 prompts x 16 at 512 pixels, on 10 steps with guidance 4.

    Deviations: there, two steps in a row of the first 5 are an SDE (1.2) and the others an ODE; here all have fresh noise, as
    in ``z_image``; rewards in units of the deviation of a prompt's samples, not of the step's.
    """
    return TrainConfig(
        model="Qwen/Qwen-Image",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=300,
        prompts_per_step=32,
        samples_per_prompt=16,
        sampling=SamplingConfig(num_steps=10, guidance=4.0, sampler="cps", eta=0.8, batch_size=2, height=512, width=512),
        policy=PolicyConfig(
            lora_rank=64,
            lora_targets=("attention", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
            gradient_checkpointing=True,
            vae_slicing=True,
            dtype="bfloat16",
        ),
        algorithm=DDPOConfig(
            normalisation="group", updates_per_step=2, train_fraction=0.6, step_weight_power=1.0, micro_batch_size=2
        ),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def flux2_klein_base() -> TrainConfig:
    """Flow-Factory's GRPO on FLUX.2-klein-base (4B, not the distilled one): 48 prompts x 16 at 384 pixels, on 8 steps.

    Deviations: a clip range of 1e-5 (1e-4 there, for 9B): its author saw 4B collapse at 1e-4, and later at 1e-5 too; fresh
    noise in all steps, as in ``z_image`` (there, 0.7 in one of the second to fourth).
    """
    return TrainConfig(
        model="black-forest-labs/FLUX.2-klein-base-4B",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=300,
        prompts_per_step=48,
        samples_per_prompt=16,
        sampling=SamplingConfig(num_steps=8, guidance=4.0, sampler="cps", eta=0.8, batch_size=4, height=384, width=384),
        policy=PolicyConfig(
            lora_rank=64,
            lora_targets=("attention", "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
            gradient_checkpointing=True,
            vae_slicing=True,
            dtype="bfloat16",
        ),
        algorithm=DDPOConfig(
            clip_range=1e-5, normalisation="group", updates_per_step=2, train_fraction=0.6, micro_batch_size=4
        ),
        rewards=RewardsConfig(clip_score=PICKSCORE),
    )


def wan21() -> TrainConfig:
    """Flow-GRPO on Wan 2.1 T2V 1.3B: videos of 33 frames of 240 x 416 pixels, in groups of 4, on 20 steps with guidance 4.5.

    Deviations: PickScore on every fourth frame, for how well text in them can be read; the SDE of the paper (0.7), where the
    code has one of its own for this model, whose diffusion is about s; no KL to the model before training (0.004 there). 32
    prompts are ours: the code has 16 videos for each GPU, and does not say how many of them.
    """
    return TrainConfig(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        reward=("clip-score",),
        prompts="imagenet-animals",
        steps=300,
        prompts_per_step=32,
        samples_per_prompt=4,
        sampling=SamplingConfig(
            num_steps=20,
            guidance=4.5,
            sampler="flow_grpo",
            eta=0.7,
            batch_size=2,
            height=240,
            width=416,
            num_frames=33,
        ),
        policy=PolicyConfig(lora_rank=32, gradient_checkpointing=True, vae_slicing=True, dtype="bfloat16"),
        algorithm=DDPOConfig(
            clip_range=1e-3,
            normalisation="group",
            updates_per_step=2,
            train_fraction=0.95,
            step_weight_power=1.0,
            micro_batch_size=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        evaluation=EvaluationConfig(num_samples=16),
        rewards=RewardsConfig(frames=9, clip_score=PICKSCORE),
    )
