"""A tiny random pipeline that the tests share: 32 x 32 pixels, 4 x 4 latents, attention in one block, built in a second.

Where it runs on several processes, every weight costs time, and where it runs on one, every layer.
"""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from transformers import CLIPTextConfig, CLIPTextModel

from diffusionrl.emoji.recipe.tokenizer import train_tokenizer
from diffusionrl.policies import StableDiffusionPolicy

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it again and again takes a twentieth of the time."""
    gc.freeze()


def build_tiny_pipeline(folder: Path) -> StableDiffusionPipeline:
    tokenizer = train_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_pipeline(folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    """As it is loaded; to be copied, which takes a tenth of the time."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def load_tiny(tiny_pipeline: StableDiffusionPipeline) -> Callable[..., StableDiffusionPipeline]:
    def load(**scheduler_settings: object) -> StableDiffusionPipeline:
        pipeline = copy.deepcopy(tiny_pipeline)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler_settings)
        return pipeline

    return load


@pytest.fixture(scope="session")
def make_policy(load_tiny: Callable[..., StableDiffusionPipeline]) -> Callable[..., StableDiffusionPolicy]:
    """A tiny policy; its adapter is moved off zero, so that it matters."""

    def make(scheduler: dict[str, object] | None = None, **settings: object) -> StableDiffusionPolicy:
        policy = StableDiffusionPolicy(load_tiny(**(scheduler or {})), **settings)  # type: ignore[arg-type]
        for index, (name, weight) in enumerate(policy.trainable().items()):
            if "lora_B" in name:
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
        return policy

    return make


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line draws none at the end of a run, which takes longer than a tiny run itself."""
    monkeypatch.setattr("diffusionrl.report.picture.draw_before_after", lambda run_dir: run_dir)


LOUDNESS = """
def loudness(sounds, prompts, metadata):
    assert sounds.ndim == 3 and all(each["sampling_rate"] == 4 for each in metadata)
    return sounds.square().mean((1, 2)).sqrt()
"""


@pytest.fixture
def model(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved pipeline, a file of prompts beside it, and a reward for sound; the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.build(request.param).save_pretrained(tmp_path / "model")
    media = tiny.examples(request.param)
    lines = []
    for text, images in zip(("a cat", "a dog"), media, strict=True):
        named = {key: f"{text[2:]}_{key}.png" for key in images}
        for key, image in images.items():
            image.save(tmp_path / named[key])
        lines.append(json.dumps({"prompt": text, **named}) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "sounds.py").write_text(LOUDNESS)
    return tmp_path / "model"
