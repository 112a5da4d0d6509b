"""The recipe that distils ``emoji`` to four steps: its teacher is the pipeline, and what it leaves is what diffusers loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusionrl import seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.recipe import turbo
from diffusionrl.emoji.recipe.training import update_average
from diffusionrl.emoji.recipe.turbo import TurboConfig, few_step_scheduler, train_turbo
from diffusionrl.policies import EMBEDDED_MODEL, load_policy
from diffusionrl.sampling.rollout import make_table


def load_emoji() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_the_teacher_goes_where_the_pipeline_goes_in_sixteen_steps() -> None:
    pipeline, prompts = load_emoji(), ["a cat", "a bus"]
    pipeline.scheduler = few_step_scheduler(pipeline.scheduler)
    start = seeds.normal(0, "test", 0, [0, 1], (16, 8, 8))
    drawn = pipeline(prompts, num_inference_steps=16, guidance_scale=3.0, latents=start, output_type="latent").images
    levels = turbo.Levels(few_step_scheduler(pipeline.scheduler), "cpu")
    text, empty = (pipeline.text_encoder(turbo.tokenize(pipeline, each))[0] for each in (prompts, [""]))
    x = start
    for place in range(0, 16, 4):
        x = turbo.solve(pipeline.unet, levels, x, place, text, empty, 3.0)
    assert (x - drawn).norm() < 0.02 * drawn.norm()  # the scheduler ends some steps one time beside where the next begins


def test_a_resumed_distillation_ends_alike_and_leaves_a_lora_and_a_pipeline_of_four_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turbo, "measure_turbo", lambda folder, teacher: {})

    def config(name: str) -> TurboConfig:
        sizes = {"num_scenes": 4, "batch_size": 4, "num_steps": 2, "lora_rank": 2}
        return TurboConfig(out=tmp_path / name, device="cpu", save_every=1, log_every=1, warmup_steps=1, **sizes)

    def update(average: torch.nn.Module, module: torch.nn.Module, step: int) -> None:
        if step == 1 and not (tmp_path / "parts" / "stopped").exists() and (tmp_path / "whole" / "figures.json").exists():
            (tmp_path / "parts" / "stopped").touch()
            raise KeyboardInterrupt
        update_average(average, module, step)

    monkeypatch.setattr("diffusionrl.emoji.recipe.training.update_average", update)
    train_turbo(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        train_turbo(config("parts"))
    train_turbo(config("parts"))
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((tmp_path / "parts" / "figures.json").read_text()) == {"turbo_training_samples": 8}

    policy = load_policy(str(tmp_path / "parts" / "pipeline"), device="cpu")
    table = make_table(policy, SamplingConfig(4, 1.0, "renoise", 1.0))
    assert table.grid.timesteps.tolist() == [999, 749, 499, 249] and table.fresh[-1] == 0
    plain = load_emoji()
    x, levels, prompts = torch.randn(2, 16, 8, 8), table.grid.levels[torch.tensor([1, 2])], [Prompt("a cat")] * 2
    with torch.no_grad():
        ours = policy.denoise(x, levels, prompts, None)[0]
        text = plain.text_encoder(turbo.tokenize(plain, ["a cat"] * 2))[0]
        alpha, sigma = levels.shaped(x)

        def x0() -> torch.Tensor:
            return alpha * x - sigma * plain.unet(x, levels.timesteps, text).sample

        before = x0()
        plain.load_lora_weights(str(files[1].parent), weight_name=files[1].name)
        torch.testing.assert_close(ours, x0(), rtol=1e-2, atol=2e-3)  # the file is in half precision
    assert (before - x0()).abs().max() > 1e-2, "it was trained"
