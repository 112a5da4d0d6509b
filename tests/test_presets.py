"""The presets: whole configurations that read back, and that their models' families accept, on tiny pipelines of these."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
from safetensors.torch import load_file

from diffusionrl.cli import main, parse_train
from diffusionrl.config import TrainConfig, to_yaml
from diffusionrl.config.presets import PRESETS

pytestmark = pytest.mark.usefixtures("no_picture")

FAMILIES = {
    "sd3.5-medium": "sd3",
    "sdxl": "sdxl",
    "flux.1-dev": "flux",
    "z-image": "z_image",
    "qwen-image": "qwen_image",
    "flux.2-klein-base": "flux2_klein",
    "wan2.1-1.3b": "wan",
}
BFLOAT16 = ("flux.1-dev", "flux.2-klein-base")
"""Those that are tried as they are; a ratio of exactly 1 is a matter of float32."""
ADAPTED = {
    "sd3.5-medium": ("attn.to_q", "attn.add_k_proj"),
    "sdxl": ("attn1.to_q", "attn2.to_out.0"),
    "flux.1-dev": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v"),
    "z-image": ("attention.to_q", "feed_forward.w3"),
    "qwen-image": ("attn.to_q", "img_mlp.net.2", "txt_mlp.net.0.proj"),
    "flux.2-klein-base": ("attn.to_q", "to_qkv_mlp_proj", "ff.linear_in"),
    "wan2.1-1.3b": ("attn1.to_q", "attn2.to_k"),
}
DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_config_reads_back(tmp_path: Path, preset: str) -> None:
    config = parse_train(["--preset", preset])
    assert config == PRESETS[preset]()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config


def sizes_of(config: TrainConfig, name: str) -> dict[str, Any]:
    """What is smaller on a tiny pipeline, and what its own call cannot do without."""
    size = {key: value for key, value in tiny.call_of(name).items() if key in ("height", "width", "num_frames")}
    given = {entry.partition("=")[0] for entry in config.sampling.call}
    needed = {key: value for key, value in tiny.CALLS[name].items() if key not in {*size, *given}}
    call = (*config.sampling.call, *(f"{key}={json.dumps(value)}" for key, value in needed.items()))
    return {"num_steps": 2, **size, "call": call}


@pytest.mark.parametrize("preset", FAMILIES)
def test_its_family_accepts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, preset: str) -> None:
    """Everything but sizes, model, prompts and reward is as the preset has it."""
    monkeypatch.chdir(tmp_path)
    name, config = FAMILIES[preset], PRESETS[preset]()
    tiny.build(name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    small = dataclasses.replace(
        config,
        model=str(tmp_path / "model"),
        reward=("compressibility",),
        prompts="prompts.txt",
        steps=1,
        prompts_per_step=2,
        samples_per_prompt=2,
        sampling=dataclasses.replace(config.sampling, **sizes_of(config, name)),
        policy=config.policy if preset in BFLOAT16 else dataclasses.replace(config.policy, dtype="float32"),
        evaluation=dataclasses.replace(config.evaluation, num_samples=2),
    )
    (tmp_path / "small.yaml").write_text(to_yaml(small))
    assert main(["train", "--config", "small.yaml", "--run-dir", "run"]) == 0, capsys.readouterr().err
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][-1]
    assert metrics["reward/invalid"] == 0 and metrics["grad_norm"] > 0
    assert metrics["ratio/max_gap"] < (1e-2 if preset in BFLOAT16 else 1e-5)
    layers = load_file("run/export/pytorch_lora_weights.safetensors")
    assert all(any(f".{end}.lora_A" in layer for layer in layers) for end in ADAPTED[preset]), list(layers)
    assert {weight.shape[0] for layer, weight in layers.items() if "lora_A" in layer} == {config.policy.lora_rank}


def test_a_folder_that_is_called_like_a_preset_is_a_folder() -> None:
    assert parse_train(["--model", "sdxl"]).sampling == PRESETS["emoji"]().sampling
    assert parse_train(["--model", "sdxl", "--preset", "sdxl"]).sampling == PRESETS["sdxl"]().sampling
    assert parse_train(["--preset", "z-image"]).model == "Tongyi-MAI/Z-Image"


def test_the_docs_name_every_preset() -> None:
    said = (DOCS / "models.md").read_text() + (DOCS / "runs.md").read_text()
    assert [preset for preset in PRESETS if f"`{preset}`" not in said] == []
