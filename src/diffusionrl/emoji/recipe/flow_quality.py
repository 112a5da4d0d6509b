"""How good the published flow pipeline is, and the first one beside it, where it was not measured before.

All samples are those of the plain pipeline call, 16 steps, with one row of zeros after the text unless it is said otherwise.
Sample i begins with the noise of (seed 0, "flow quality", i), so any cut into batches gives the same.

The classifier is lenient, blotches of the right colours satisfy it. So there is also a distance to fresh scenes: the kernel
distance (KID, Binkowski et al., arXiv 1801.01401) between the image embeddings of the world's CLIP.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from diffusionrl import seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.classifier import (
    CLASSES,
    SceneClassifier,
    detect_subjects,
    load_classifier,
    load_detector,
    name_subjects,
)
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.emoji.vocabulary import ANIMALS, SUBJECTS, prompt_sets, with_article
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy
from diffusionrl.rewards.composition import split_prompt
from diffusionrl.sampling.rollout import collect

NUM_STEPS = 16
GUIDANCE = 3.0


def load_flow(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in float32, without progress bars. That there is no T5 has to be said, although the folder says it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_samples(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    guidance: float = GUIDANCE,
    zero_rows: int = 1,
    batch_size: int = 64,
) -> Tensor:
    """One image a prompt, (N, 3, 64, 64) in [0, 1]."""
    images = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        latents = seeds.normal(0, "flow quality", 0, list(range(first, first + len(part))), (16, 8, 8))
        drawn = pipeline(
            part,
            latents=latents.to(pipeline.device),
            num_inference_steps=NUM_STEPS,
            guidance_scale=guidance,
            max_sequence_length=zero_rows,
            output_type="pt",
        )
        images.append(drawn.images.float().cpu())
    return torch.cat(images)


def named_right(classifier: SceneClassifier, images: Tensor, names: Sequence[str]) -> Tensor:
    """Whether the classifier names each image's subject, as 0 or 1."""
    return torch.tensor([found == name for found, name in zip(name_subjects(classifier, images), names, strict=True)]).float()


def composition(detector: SceneClassifier, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward "composition" of each image."""
    sure = detect_subjects(detector, images)
    wanted = [[CLASSES.index(name) for name in split_prompt(prompt)] for prompt in prompts]
    return torch.stack([row[columns].mean() for row, columns in zip(sure, wanted, strict=True)])


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy of two sets of features, kernel (x y / dimensions + 1)^3."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1)) for a in (first.double(), second.double())]
    return (within[0] + within[1] - 2 * kernel(first.double(), second.double()).mean()).item()


@torch.no_grad()
def embed(clip: CLIPModel, images: Tensor) -> Tensor:
    """Image embeddings of (N, 3, 64, 64) in [0, 1]."""
    return torch.cat([clip.get_image_features(part * 2 - 1).pooler_output for part in torch.split(images, 500)])


def sharpness(images: Tensor) -> float:
    """Mean absolute difference of a pixel from the mean of its four neighbours, on a scale of 0 to 255."""
    inner = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return 255 * (inner - around / 4).abs().mean().item()


def measure_flow(weights: Path, samples_per_subject: int = 5) -> dict[str, float]:
    """Figures of ``weights/flow``, and the distances of both pipelines' samples to fresh scenes."""
    pipeline, classifier = load_flow(weights / "flow"), load_classifier()
    names = [name for name in SUBJECTS for _ in range(samples_per_subject)]
    prompts = [with_article(name) for name in names]
    guided, plain = draw_samples(pipeline, prompts), draw_samples(pipeline, prompts, guidance=1.0)
    right = named_right(classifier, guided, names)
    animal = torch.tensor([name in ANIMALS for name in names])
    once = draw_samples(pipeline, prompts[::samples_per_subject], zero_rows=256)
    pairs = prompt_sets()["thing-pairs"]
    drawn_pairs = draw_samples(pipeline, pairs)
    figures = {
        "flow_subject_accuracy": right.mean().item(),
        "flow_animal_accuracy": right[animal].mean().item(),
        "flow_thing_accuracy": right[~animal].mean().item(),
        "flow_subject_accuracy_unguided": named_right(classifier, plain, names).mean().item(),
        "flow_subject_accuracy_256_zero_rows": named_right(classifier, once, list(SUBJECTS)).mean().item(),
        "flow_samples": len(names),
        "flow_pairs_composition": composition(load_detector(), drawn_pairs, pairs).mean().item(),
        "flow_pairs_composition_judge": composition(load_detector("detector_judge"), drawn_pairs, pairs).mean().item(),
    }
    fresh = fresh_scenes(4000)
    clip = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32)
    scenes = embed(clip, fresh[:2000])
    drawn = {
        "emoji": draw_first(weights / "pipeline", prompts),
        "flow": guided,
        "flow_unguided": plain,
        "scenes": fresh[2000 : 2000 + len(names)],
    }
    for name, images in drawn.items():
        figures[f"{name}_kid"] = kernel_distance(embed(clip, images), scenes)
        figures[f"{name}_sharpness"] = sharpness(images)
    return {name: round(value, 4) for name, value in figures.items()}


def fresh_scenes(count: int) -> Tensor:
    """(N, 3, 64, 64) in [0, 1], of single subjects that no stage has seen."""
    return torch.from_numpy(draw_images(EVALUATION_SEED, range(count), "subject")[0]).permute(0, 3, 1, 2).float() / 255


FIRST = SamplingConfig(NUM_STEPS, GUIDANCE, "ddim", 1.0, batch_size=64)
"""How the figures of ``emoji`` are taken."""


def draw_first(folder: Path, prompts: Sequence[str], sampling: SamplingConfig = FIRST) -> Tensor:
    """Samples of ``emoji``, or of a pipeline like it, one a prompt."""
    policy = StableDiffusionPolicy(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32))

    def nothing(images: Tensor, texts: Sequence[str], metadata: object) -> list[float]:
        return [0.0] * len(images)

    return collect(policy, nothing, [Prompt(text) for text in prompts], sampling, 0, "quality", 0).images
