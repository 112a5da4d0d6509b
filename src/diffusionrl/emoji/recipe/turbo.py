"""``emoji-turbo``: a LoRA on ``emoji`` for four steps without guidance, by consistency distillation (LCM-LoRA, 2311.05556).

The student's f(x_t, t) is its estimate of x0. Wherever a trajectory of the teacher's ODE is asked, the answer is to be the same
(consistency models, arXiv 2303.01469): with x' at the next level, where the teacher's solver went from x_t with guidance w,

    L = huber(f(x_t, t) - f_average(x', t')),        huber(d) = sqrt(d^2 + c^2) - c

and at the last level the target is where the solver ends. So guidance is distilled into the weights, as in LCM (2310.04378).

Noisy scenes are at the four levels that are sampled, no others: consistency is asked four times, not fifty. From each level to
the next the teacher takes four steps of DDIM, its own sixteen altogether. These pairs are the teacher's alone: they are made
once, and passed over several times. LCM's boundary conditions are left out: at these levels they are 1 and 0 to 1e-7.

Samples are re-noised: x0 is estimated, and fresh noise of the next level added.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from diffusionrl import seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.emoji.classifier import load_classifier
from diffusionrl.emoji.recipe.flow_quality import (
    FIRST,
    draw_first,
    embed,
    fresh_scenes,
    kernel_distance,
    named_right,
    sharpness,
)
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import to_tensor
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.emoji.vocabulary import SUBJECTS, with_article
from diffusionrl.policies import EMBEDDED_MODEL
from diffusionrl.policies.adapters import add_lora, find_targets

NUM_STEPS = 4
SOLVER_STEPS = 4
"""Of the teacher, from one level to the next."""
HUBER = 1e-3
CHUNK = 256
"""Scenes of a file."""


@dataclass(frozen=True)
class TurboConfig(TrainingConfig):
    """Distil the first pipeline to four steps."""

    out: Path = Path("runs/emoji/turbo")
    pipeline: Path = EMBEDDED_MODEL
    """Which is distilled."""
    num_steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 5e-3
    num_scenes: int = 6144
    """Scenes with their trajectories, made once and passed over several times."""
    guidance: float = 3.0
    """Of the teacher."""
    lora_rank: int = 12
    save_every: int = 100
    log_every: int = 50


def few_step_scheduler(scheduler: DDIMScheduler) -> DDIMScheduler:
    """The same schedule; its few steps begin at the noisiest time and end at no noise."""
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)


class Levels:
    """The noise levels of the teacher's solver, the noisiest first, and no noise at all as the last."""

    def __init__(self, scheduler: DDIMScheduler, device: str) -> None:
        scheduler.set_timesteps(NUM_STEPS * SOLVER_STEPS)
        signal = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps].double(), torch.ones(1, dtype=torch.float64)])
        self.times = scheduler.timesteps.to(device)
        self.alpha, self.sigma = (each.sqrt().float().to(device) for each in (signal, 1 - signal))

    def at(self, place: int | Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, to broadcast over latents."""
        places = torch.as_tensor(place).view(-1, 1, 1, 1)
        return self.alpha[places], self.sigma[places]


def estimate(unet: UNet2DConditionModel, levels: Levels, x: Tensor, place: Tensor, text: Tensor) -> Tensor:
    """x0, (B, ...), of a network that predicts v."""
    alpha, sigma = levels.at(place)
    v = unet(x.contiguous(memory_format=torch.channels_last), levels.times[place], text).sample
    return alpha * x - sigma * v


@torch.no_grad()
def solve(
    unet: UNet2DConditionModel, levels: Levels, x: Tensor, place: int, text: Tensor, empty: Tensor, guidance: float
) -> Tensor:
    """Where the teacher goes from a level that is sampled to the next one."""
    texts = torch.cat([empty.expand_as(text), text])
    for row in range(place, place + SOLVER_STEPS):
        plain, told = estimate(unet, levels, x.repeat(2, 1, 1, 1), torch.full((2 * len(x),), row), texts).chunk(2)
        clean = plain + guidance * (told - plain)
        (alpha, sigma), (alpha_next, sigma_next) = levels.at(row), levels.at(row + 1)
        x = alpha_next * clean + sigma_next * (x - alpha * clean) / sigma
    return x


@torch.no_grad()
def make_pairs(config: TurboConfig, pipeline: StableDiffusionPipeline, levels: Levels, scenes: range) -> dict[str, Tensor]:
    """Noisy scenes, "noisy", and where the teacher goes from there, "next", with the "tokens" of their captions; scene i is at
    level i % 4."""
    images, drawn = draw_images(config.seed, scenes)
    clean = encode(pipeline.vae, to_tensor(images, config.device))
    noise = torch.randn(clean.shape, generator=seeds.torch_generator(config.seed, "turbo noise", scenes.start)).to(clean.device)
    tokens = tokenize(pipeline, [scene.caption for scene in drawn])
    text, empty = (pipeline.text_encoder(each)[0] for each in (tokens, tokenize(pipeline, [""])))
    place = torch.arange(len(clean)) % NUM_STEPS * SOLVER_STEPS
    alpha, sigma = levels.at(place)
    noisy, following = alpha * clean + sigma * noise, torch.zeros_like(clean)
    for row in range(0, NUM_STEPS * SOLVER_STEPS, SOLVER_STEPS):
        here = place == row
        following[here] = solve(pipeline.unet, levels, noisy[here], row, text[here], empty, config.guidance)
    found = {"noisy": noisy.half(), "next": following.half(), "tokens": tokens.to(torch.int16)}
    return {name: each.contiguous() for name, each in found.items()}


def load_pairs(config: TurboConfig, pipeline: StableDiffusionPipeline, levels: Levels) -> dict[str, Tensor]:
    """All pairs. In files, kept for the next start."""
    parts = []
    for first in range(0, config.num_scenes, CHUNK):
        file = config.out / "pairs" / f"{first:06d}.safetensors"
        if not file.exists():
            scenes = range(first, min(first + CHUNK, config.num_scenes))
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(make_pairs(config, pipeline, levels, scenes), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            print(f"{scenes.stop} of {config.num_scenes} scenes", flush=True)
        parts.append(load_file(file, device=config.device))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents: the means of the posterior."""
    return vae.encode(images).latent_dist.mean * vae.config.scaling_factor


def tokenize(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    tokens = pipeline.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return tokens.to(pipeline.device)


def train_turbo(config: TurboConfig) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(config.pipeline, safety_checker=None, dtype=torch.float32)
    pipeline.to(config.device)
    levels = Levels(few_step_scheduler(pipeline.scheduler), config.device)
    unet = pipeline.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    pairs = load_pairs(config, pipeline, levels)
    add_lora(unet, config.lora_rank, sorted(find_targets(unet, "all")), config.seed)
    average = copy.deepcopy(unet).requires_grad_(False).eval()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "turbo", step)
        level = torch.arange(config.batch_size) % NUM_STEPS
        chosen = torch.randint(len(pairs["noisy"]) // NUM_STEPS, (config.batch_size,), generator=draw) * NUM_STEPS + level
        place, following = level * SOLVER_STEPS, pairs["next"][chosen].float()
        with torch.no_grad():
            text = pipeline.text_encoder(pairs["tokens"][chosen].long())[0]
            on_the_way, target = level < NUM_STEPS - 1, following.clone()
            target[on_the_way] = estimate(
                average, levels, following[on_the_way], place[on_the_way] + SOLVER_STEPS, text[on_the_way]
            )
        gap = estimate(unet, levels, pairs["noisy"][chosen].float(), place, text) - target
        errors = ((gap.square() + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))
        return errors.mean(), {f"loss_{row}": errors[level == row].mean().item() for row in range(NUM_STEPS)}

    train_stage(unet, loss, config, average)
    weights = {f"unet.{name}": weight.half().contiguous() for name, weight in get_peft_model_state_dict(average).items()}
    save_file(weights, config.out / "pytorch_lora_weights.safetensors")
    average.fuse_lora()
    average.unload_lora()
    pipeline.register_modules(unet=average, scheduler=few_step_scheduler(pipeline.scheduler))
    pipeline.save_pretrained(config.out / "pipeline")
    figures: dict[str, float] = {"turbo_training_samples": config.num_steps * config.batch_size}
    figures |= measure_turbo(config.out / "pipeline", config.pipeline)
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def measure_turbo(folder: Path, teacher: Path, samples_per_subject: int = 5) -> dict[str, float]:
    """Figures of the distilled pipeline in four steps, and of its teacher in sixteen and in four: see ``flow_quality``."""
    names = [name for name in SUBJECTS for _ in range(samples_per_subject)]
    prompts, classifier = [with_article(name) for name in names], load_classifier()
    clip = CLIPModel.from_pretrained(EMBEDDED_MODEL.parent / "clip", dtype=torch.float32)
    scenes = embed(clip, fresh_scenes(2000))
    four = SamplingConfig(NUM_STEPS, 1.0, "renoise", 1.0, batch_size=64)
    figures = {}
    for name, source, sampling in (
        ("turbo", folder, four),
        ("teacher_16_steps", teacher, FIRST),
        ("teacher_4_steps", teacher, replace(FIRST, num_steps=NUM_STEPS)),
    ):
        images = draw_first(source, prompts, sampling)
        figures[f"{name}_subject_accuracy"] = round(named_right(classifier, images, names).mean().item(), 4)
        figures[f"{name}_kid"] = round(kernel_distance(embed(clip, images), scenes), 4)
        figures[f"{name}_sharpness"] = round(sharpness(images), 4)
    return figures
