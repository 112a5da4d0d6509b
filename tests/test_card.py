"""The model card, the names that ComfyUI reads, and the way to the hub."""

import html
import json
import re
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from diffusionrl import Prompt, TrainConfig, train
from diffusionrl.cli import main
from diffusionrl.config import DDPOConfig, EvaluationConfig, SamplingConfig, to_yaml
from diffusionrl.data.images import to_pil
from diffusionrl.policies import StableDiffusionPolicy, load_trained
from diffusionrl.runs import card
from diffusionrl.runs.card import make_card

VERSIONS = {"diffusionrl": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"}
ENVIRONMENT = {"command": ["/opt/bin/diffusionrl", "train", "--steps", "2"], "versions": VERSIONS}
METRICS = [
    {"step": 0, "queries": 0, "eval/reward": 1.0, "eval/reward_se": 0.1, "eval/gold": 5.0, "eval/gold_se": 0.2},
    {"step": 2, "queries": 1600, "eval/reward": 2.0, "eval/reward_se": 0.1, "eval/gold": None, "eval/gold_se": None},
]


def config_of(**settings: Any) -> dict[str, Any]:
    return yaml.safe_load(to_yaml(TrainConfig(**settings)))


def darkness(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    return 1 - images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on the tiny model, in a folder whose name nobody should learn."""
    run_dir = tmp_path_factory.mktemp("secret-folder") / "run"
    options = ["--model", str(tiny_folder), "--steps", "2", "--prompts-per-step", "2", "--samples-per-prompt", "2"]
    options += ["--sampling.num-steps", "3", "--evaluation.num-samples", "6", "--evaluation.held-out", "incompressibility"]
    options += ["--policy.lora-targets", "all", "--optimizer.learning-rate", "0.05", "--algorithm.micro-batch-size", "8"]
    command = ["train", *options, "--run-dir", str(run_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/home/somebody/bin/diffusionrl", *command])
        assert main(command) == 0
    return run_dir


# The card


def test_the_card_of_a_run(run: Path) -> None:
    export = run / "export"
    found = ModelCard.load(export / "README.md")
    data, text = found.data.to_dict(), found.text
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "text-to-image", "template:sd-lora"} <= set(data["tags"])
    assert "license" not in data and "base_model" not in data, "a folder of one's own has none that is known"
    asked = [json.loads(line) for line in (run / "samples" / "step_000002" / "samples.jsonl").read_text().splitlines()]
    assert [entry["text"] for entry in data["widget"]] == [entry["prompt"] for entry in asked[:4]]
    shown = [entry["output"]["url"] for entry in data["widget"]] + re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(shown) == 4 + 8
    for name in shown:
        with Image.open(export / name) as image:
            assert image.size == (32, 32)
    assert (export / "images" / "before_1.png").read_bytes() == (run / "samples" / "step_000000" / "00001.png").read_bytes()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (metrics[0], metrics[-1]):
        for name in ("eval/reward", "eval/incompressibility"):
            assert f"{line[name]:.4g} ± " in text
    for said in ("8 reward queries", "incompressibility, held out", "diffusionrl train --model pipeline --steps 2", "0.1.0"):
        assert said in text
    assert "learning_rate: 0.05" in text


def test_nothing_of_the_machine_is_in_the_card(run: Path, tiny_folder: Path) -> None:
    said = (run / "export" / "README.md").read_text()
    for private in (str(run), run.parent.name, str(tiny_folder), str(Path.home()), "somebody", "run-dir"):
        assert private not in said


def test_nothing_of_the_machine_is_in_an_exported_unet(load_tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    StableDiffusionPolicy(load_tiny(), lora_rank=None).export(tmp_path)
    assert str(tiny_folder) not in (tmp_path / "unet" / "config.json").read_text()
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.sample_size == 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["/home/bob/.venv/bin/diffusionrl", "train", "--prompts", "/home/bob/secret/p.txt"],
            "diffusionrl train --prompts p.txt",
        ),
        (
            ["/x/diffusionrl/__main__.py", "train", "--prompts=~/secret/p.txt", "--steps", "3"],
            "train --prompts=p.txt --steps 3",
        ),
        (["diffusionrl", "train", "--name", "secret", "--run-dir=/secret", "--seed", "1"], "    diffusionrl train --seed 1\n"),
        (
            [r"C:\Users\bob\diffusionrl.exe", "train", "--model", r"C:\Users\bob\my model"],
            "diffusionrl train --model 'my model'",
        ),
        (["diffusionrl", "train", "--rewards.vlm.url", "http://bob:pass@10.0.0.7/v1"], "--rewards.vlm.url URL"),
        (["diffusionrl", "train", "--model", "CompVis/stable-diffusion-v1-4"], "--model CompVis/stable-diffusion-v1-4"),
        (["diffusionrl", "train", "--reward", "m:redness", "x\n</details><b>"], "--reward m:redness 'x\n    </details><b>'"),
        (["/home/bob/train.py", "secret"], "Trained from Python."),
    ],
)
def test_the_command_in_the_card(command: list[str], said: str) -> None:
    text = make_card(config_of(), ENVIRONMENT | {"command": command}, METRICS, ["a cat"], full=False)
    assert said in text
    assert not any(private in text for private in ("bob", "secret", "10.0.0.7"))


def test_paths_in_settings_lose_their_folders() -> None:
    config = config_of(model="/home/bob/models/mine", prompts="../bob/prompts.txt")
    text = make_card(config, ENVIRONMENT, METRICS, [], full=True)
    assert "bob" not in text and "model: mine" in text and "prompts: prompts.txt" in text and "pipe.unet = " in text


@cache
def plain_card(num_prompts: int) -> str:
    return make_card(config_of(), ENVIRONMENT, METRICS, ["a cat"] * num_prompts, full=False)


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_no_prompt_can_break_the_card(prompts: list[str]) -> None:
    plain = plain_card(len(prompts))
    text = make_card(config_of(), ENVIRONMENT, METRICS, prompts, full=False)
    data = ModelCard(text).data.to_dict()
    assert data.keys() == ModelCard(plain).data.to_dict().keys()
    for entry, prompt in zip(data["widget"], prompts, strict=True):
        assert entry["text"] == card._clean(prompt)
    assert text.count("\n") == plain.count("\n"), "no prompt makes a line of its own"
    rows = [line for line in text.splitlines() if "images/before_" in line]
    for row, prompt in zip(rows, prompts, strict=True):
        assert html.unescape(row).startswith(f"| {card._clean(prompt)} | ![before]")
        assert row.count("|") == 4 and not set(row.split("![")[0]) & set("<>[]()`*_\\!~")


def test_markup_in_prompts_and_names_is_text() -> None:
    nasty = [
        "<script>alert(1)</script>",
        "x\n---\nlicense: evil\n",
        '"]}: &a *a !!python/object',
        "\u202etac a",
        "[a](javascript:b)",
    ]
    rewards = ("m:<img src=x>=1", "http://bob:8000=2")
    text = make_card(config_of(reward=rewards), ENVIRONMENT, METRICS, nasty[:4], full=False)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert set(re.findall(r"<[^>]*>", body)) == {"<Gallery />", "<details>", "<summary>", "</summary>", "</details>"}
    assert ModelCard(text).data.to_dict()["license"] == "apache-2.0"
    assert "bob" not in text
    assert not any(unicodedata.bidirectional(character) in ("RLO", "LRO", "RLE", "LRE") for character in text)


@pytest.mark.parametrize(("front", "known"), [("license: openrail++", "openrail++"), ("tags: [x]", None), ("license: [", None)])
def test_the_licence_is_that_of_the_base_models_own_card(tmp_path: Path, front: str, known: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    text = make_card(config_of(model=str(tmp_path)), ENVIRONMENT, METRICS, [], full=False)
    assert ModelCard(text).data.to_dict().get("license") == known
    assert ("That of the base model" if known else "Not known here") in text


def test_a_base_model_of_the_hub_is_named() -> None:
    text = make_card(config_of(model="CompVis/stable-diffusion-v1-4"), ENVIRONMENT, METRICS, ["a cat"], full=False)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("CompVis/stable-diffusion-v1-4", "adapter")
    assert "gold" not in text and "no valid score" not in text, "what was not asked for is not in the table"
    held_out = config_of(evaluation=EvaluationConfig(held_out=("gold",)))
    assert "| gold, held out | 5 ± 0.2 | no valid score |" in make_card(held_out, ENVIRONMENT, METRICS, [], full=False)


def test_the_five_lines_draw_an_image(run: Path, tiny_folder: Path) -> None:
    text = (run / "export" / "README.md").read_text()
    code = re.search(r"## Use\n\n((?:    .*\n)+)", text)
    assert code is not None
    lines = [line.removeprefix("    ") for line in code[1].splitlines()]
    assert len(lines) == 5
    program = "\n".join(lines).replace("this repository or folder", str(run / "export"))
    found: dict[str, Any] = {}
    exec(program.replace("folder of the base model", str(tiny_folder)), found)
    assert found["image"].size == (32, 32) and found["pipe"].get_active_adapters()


def quick(run_dir: Path) -> TrainConfig:
    return TrainConfig(
        steps=1,
        prompts_per_step=2,
        run_dir=run_dir,
        sampling=SamplingConfig(num_steps=2, guidance=1.0),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2),
    )


def test_a_card_that_cannot_be_written_loses_nothing(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> str:
        raise RuntimeError("out of ink")

    monkeypatch.setattr(card, "make_card", broken)
    train(quick(tmp_path / "run"), policy=make_policy(), reward=darkness, prompts=["a cat"])
    assert "warning: the model card could not be written: RuntimeError: out of ink" in capsys.readouterr().err
    assert (tmp_path / "run" / "finished.json").is_file()
    assert load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")


def test_full_fine_tuning_and_prompts_with_control_characters_have_a_card(make_policy: Any, tmp_path: Path) -> None:
    prompts = [Prompt("a cat"), Prompt("a c\x00t\x1b[2J")]
    train(quick(tmp_path / "run"), policy=make_policy(lora_rank=None), reward=darkness, prompts=prompts)
    data = ModelCard.load(tmp_path / "run" / "export" / "README.md").data.to_dict()
    assert "lora" not in data["tags"] and [entry["text"] for entry in data["widget"]] == ["a cat", "a ct[2J"]


# ComfyUI


def sd15_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet, block for block, with narrow layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=2,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )


def names_for_comfyui() -> set[str]:
    """The layers of Stable Diffusion 1.x that a LoRA can be on, under kohya's names, written down from their published list."""
    inner = [f"attn{i}_to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    places = [f"down_blocks_{b}_attentions_{i}" for b in (0, 1, 2) for i in (0, 1)]
    places += [f"up_blocks_{b}_attentions_{i}" for b in (1, 2, 3) for i in (0, 1, 2)] + ["mid_block_attentions_0"]
    names = {f"{place}_transformer_blocks_0_{part}" for place in places for part in inner}
    names |= {f"{place}_{part}" for place in places for part in ("proj_in", "proj_out")}
    residual = [f"down_blocks_{b}_resnets_{i}" for b in range(4) for i in (0, 1)]
    residual += [f"up_blocks_{b}_resnets_{i}" for b in range(4) for i in range(3)] + [f"mid_block_resnets_{i}" for i in (0, 1)]
    names |= {f"{place}_{part}" for place in residual for part in ("conv1", "conv2", "time_emb_proj")}
    widening = ["down_blocks_1_resnets_0", *(f"up_blocks_{b}_resnets_{i}" for b in range(4) for i in range(3))]
    names |= {f"{place}_conv_shortcut" for place in widening}
    names |= {f"down_blocks_{b}_downsamplers_0_conv" for b in range(3)} | {f"up_blocks_{b}_upsamplers_0_conv" for b in range(3)}
    return {f"lora_unet_{name}" for name in names}


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_names_are_those_that_comfyui_knows(load_tiny: Any, tmp_path: Path, targets: str) -> None:
    pipeline = load_tiny()
    pipeline.unet = sd15_unet()
    StableDiffusionPolicy(pipeline, lora_rank=3, lora_targets=targets).export(tmp_path)
    found = load_file(tmp_path / "comfyui.safetensors")
    layers = {name.partition(".")[0] for name in found}
    known = names_for_comfyui()
    assert layers == (known if targets == "all" else {name for name in known if "_attn" in name})
    assert len(layers) == (16 * 8 if targets == "attention" else len(known))
    for layer in layers:
        assert found[f"{layer}.alpha"].item() == 3 == len(found[f"{layer}.lora_down.weight"])
    assert len(found) == 3 * len(layers)


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    policy = StableDiffusionPolicy(pipeline, lora_rank=None)
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    steps = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline("a cat", latents=latents, **steps).images[0]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_both_files_draw_the_same_image(make_policy: Any, load_tiny: Any, tmp_path: Path, targets: str) -> None:
    make_policy(lora_targets=targets).export(tmp_path)
    images = []
    for name in (None, "pytorch_lora_weights.safetensors", "comfyui.safetensors"):
        pipeline = load_tiny()
        if name:
            pipeline.load_lora_weights(tmp_path, weight_name=name)
            assert len(pipeline.unet.peft_config) == 1
        images.append(draw(pipeline))
    assert torch.equal(images[1], images[2])
    assert not torch.equal(images[0], images[1])


def test_the_folder_alone_still_loads_diffusers_own_file(make_policy: Any, load_tiny: Any, tmp_path: Path) -> None:
    make_policy().export(tmp_path)
    pipeline = load_tiny()
    pipeline.load_lora_weights(tmp_path)
    named = load_tiny()
    named.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(draw(pipeline), draw(named))


# The hub


def test_push_uploads_the_export(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: HfApi, repo_id: str, **keywords: Any) -> str:
        calls.append(("create", {"repo_id": repo_id, **keywords}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self: HfApi, **keywords: Any) -> None:
        calls.append(("upload", keywords))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert main(["push", str(run), "someone/dark", "--private"]) == 0
    assert "https://huggingface.co/someone/dark" in capsys.readouterr().out
    assert calls[0] == ("create", {"repo_id": "someone/dark", "private": True, "exist_ok": True})
    assert calls[1][0] == "upload" and calls[1][1]["repo_id"] == "someone/dark"
    assert Path(calls[1][1]["folder_path"]) == run / "export"


def test_a_run_pushes_when_it_is_finished_if_asked(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a private repository; a hub that refuses does the run no harm, and the command that pushes later is said."""
    calls: list[dict[str, Any]] = []

    def create_repo(self: HfApi, repo_id: str, **keywords: Any) -> str:
        calls.append(keywords)
        if len(calls) == 1:
            raise ConnectionError("no way there")
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **keywords: calls.append(keywords))
    command = ["train", "--config", str(run / "config.yaml"), "--run-dir", str(run.parent / "pushed"), "--steps", "1"]
    command += ["--push-to-hub", "someone/dark"]
    assert main(command) == 1, "which a scheduler sees"
    said = capsys.readouterr().err
    assert "no way there" in said and f"diffusionrl push {run.parent / 'pushed'} someone/dark --private" in said
    assert (run.parent / "pushed" / "finished.json").is_file()
    assert main(command) == 0, "and the same command tries again"
    assert "pushed: https://huggingface.co/someone/dark" in capsys.readouterr().out
    assert [call.get("private") for call in calls] == [True, True, None]
    assert calls[2]["folder_path"] == run.parent / "pushed" / "export"
    assert "push_to_hub: null" in (run.parent / "pushed" / "config.yaml").read_text(), "not for who runs it again"
    assert "someone/dark" not in (run.parent / "pushed" / "export" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["train", "--push-to-hub", "https://huggingface.co/someone/dark"])


def test_push_without_network_or_run_says_so(run: Path, tmp_path: Path) -> None:
    """In a process of its own, whose hub is a port where nobody listens."""
    program = "from diffusionrl.cli import entry; entry()"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""}
    environment["PYTHONPATH"] = str(Path(card.__file__).parent.parent)
    command = [sys.executable, "-c", program, "push", str(run), "someone/dark"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 2
    assert "the hub did not take someone/dark" in done.stderr and "Everything is still in" in done.stderr
    assert "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert main(["push", str(tmp_path / "nowhere"), "someone/dark"]) == 2


def test_a_run_with_its_lora_is_the_model_with_that_lora(run: Path, tiny_folder: Path) -> None:
    images = [draw(load_trained(*model).pipeline) for model in ((str(run),), (str(tiny_folder), run / "export"))]
    images.append(draw(load_trained(str(tiny_folder), run / "export" / "comfyui.safetensors").pipeline))
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    assert to_pil(images[0]).tobytes() != to_pil(draw(load_trained(str(tiny_folder)).pipeline)).tobytes()
