"""Last stage: measure the whole pipeline, and put float16 weights and figures into the package."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.classifier import SceneClassifier, name_subjects
from diffusionrl.emoji.recipe.flow_quality import load_flow, measure_flow
from diffusionrl.emoji.vocabulary import ANIMALS, SUBJECTS, with_article
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy
from diffusionrl.sampling.rollout import collect

WEIGHTS = Path(__file__).parent.parent / "weights"
STAGES = ("vae", "classifier", "skin-tones", "detector", "detector-judge", "clip", "preference", "diffusion", "flow")
NETWORKS = {
    "classifier": "classifier.safetensors",
    "skin-tones": "skin_tones.safetensors",
    "detector": "detector.safetensors",
    "detector-judge": "detector_judge.safetensors",
    "preference": "preference.safetensors",
}
"""Stages whose weights are one file."""


@dataclass(frozen=True)
class PublishConfig:
    """Measure and publish."""

    runs: Path = Path("runs/emoji")
    stages: tuple[str, ...] = STAGES
    """Whose weights and figures are published; those of the others stay as they are. "diffusion" brings the VAE along."""
    num_samples_per_subject: int = 5
    num_steps: int = 16
    guidance: float = 3.0
    eta: float = 1.0


def publish(config: PublishConfig) -> None:
    if "diffusion" in config.stages:
        _publish_pipeline(config.runs / "diffusion")
    if "flow" in config.stages:
        _publish_flow(config.runs / "flow")
    if "clip" in config.stages:
        _publish_clip(config.runs / "clip")
    for stage, file in NETWORKS.items():
        if stage in config.stages:
            weights = load_file(config.runs / stage / file)
            save_file({name: weight.half() for name, weight in weights.items()}, WEIGHTS / file)
    figures: dict[str, float] = json.loads((WEIGHTS / "figures.json").read_text())
    for stage in config.stages:
        figures |= json.loads((config.runs / stage / "figures.json").read_text())
        shutil.copy(config.runs / stage / "log.jsonl", WEIGHTS / f"{stage.replace('-', '_')}_log.jsonl")
    if {"diffusion", "classifier"} & set(config.stages):
        figures |= measure(config)
    if "flow" in config.stages:
        figures |= measure_flow(WEIGHTS, config.num_samples_per_subject)
    (WEIGHTS / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _publish_pipeline(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(WEIGHTS / "pipeline")
    for file in ("vocab.json", "merges.txt"):  # which transformers before 5 reads
        shutil.copy(folder / "tokenizer" / file, WEIGHTS / "pipeline" / "tokenizer" / file)


def _publish_flow(folder: Path) -> None:
    load_flow(folder / "pipeline").to(torch.float16).save_pretrained(WEIGHTS / "flow")
    for file in (WEIGHTS / "flow").rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)  # a folder of whoever trained it
        if file.parent.name.startswith("text_encoder"):
            content["dtype"] = "float32"  # or they load in half precision by default, and the other parts do not
        compact = (
            {"indent": None, "separators": (",", ":")} if file.name == "tokenizer.json" else {"indent": 2}
        )  # half the size
        file.write_text(json.dumps(content, ensure_ascii=False, **compact) + "\n", encoding="utf-8")


def _publish_clip(folder: Path) -> None:
    CLIPModel.from_pretrained(folder / "clip").half().save_pretrained(WEIGHTS / "clip")
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "clip" / file, WEIGHTS / "clip" / file)
    shutil.copy(folder / "aesthetic_head.safetensors", WEIGHTS / "aesthetic_head.safetensors")


def measure(config: PublishConfig) -> dict[str, float]:
    """How often the classifier names the prompted subject, on samples of the published weights."""
    policy = StableDiffusionPolicy(StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", safety_checker=None))
    classifier = SceneClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS / "classifier.safetensors").items()})
    names = [name for name in SUBJECTS for _ in range(config.num_samples_per_subject)]
    sampling = SamplingConfig(config.num_steps, config.guidance, "ddim", config.eta, batch_size=64)
    prompts = [Prompt(with_article(name)) for name in names]

    def right(images: torch.Tensor, asked: Sequence[str], metadata: object) -> list[float]:
        return [
            float(with_article(named) == text) for named, text in zip(name_subjects(classifier, images), asked, strict=True)
        ]

    values = collect(policy, right, prompts, sampling, 0, "quality", 0).scores.values
    animal = torch.tensor([name in ANIMALS for name in names])
    return {
        "subject_accuracy": round(values.mean().item(), 4),
        "animal_accuracy": round(values[animal].mean().item(), 4),
        "thing_accuracy": round(values[~animal].mean().item(), 4),
        "samples": len(names),
    }
