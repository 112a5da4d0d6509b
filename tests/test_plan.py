"""The planner: what it says from shapes alone is what PyTorch holds, and what it proposes fits."""

import importlib.util
import itertools
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch

from diffusionrl import load_policy
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main, parse_train
from diffusionrl.config import DDPOConfig, DRaFTConfig, NFTConfig, PolicyConfig, TrainConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.doctor.needs import Needs, Work, _brightness, find_needs, make_up, works_of
from diffusionrl.doctor.plan import Card, make_plan, read_card
from diffusionrl.training.trainer import Trainer

GB = 1e9
ROWS = 6


def held_at_most(work: Callable[[int], object], n: int) -> float:
    """Bytes that PyTorch's allocator had come to hold on the CPU, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work(n)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda each: each.start_ns())))


def config_of(name: str, folder: Path, *options: str) -> TrainConfig:
    """Of an embedded model, or of a tiny pipeline at 64 x 64 pixels, where activations are most of what is held."""
    if not name.startswith("emoji"):
        tiny.build(name).save_pretrained(folder)
        sizes = ["64" if option.isdigit() else option for option in tiny.options_of(name)[:4]]
        options = (*tiny.QUICK, *sizes, *tiny.options_of(name)[4:], *options)
        name = str(folder)
    return parse_train(["--model", name, "--prompts-per-step", "4", "--samples-per-prompt", "4", *options])


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("emoji", False), ("ltx", False), ("sana", True)],
)
def test_what_is_planned_is_what_is_held(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """To 15 %, at the peak of a denoising step, of decoding and of an update."""
    options = ["--policy.device", "cpu", *(["--policy.gradient-checkpointing"] if checkpointing else [])]
    config = config_of(name, tmp_path, *options)
    needs = find_needs(config, on_card=False)
    prompts = load_prompts(config.prompts)
    policy: Any = load_policy(config.model, **asdict(config.policy), sampling=config.sampling, example=prompts[0])
    trainer = Trainer(policy, _brightness, prompts, make_algorithm(config), config)
    for what, work in works_of(trainer, *make_up(trainer)).items():
        work(ROWS)
        held, planned = held_at_most(work, ROWS), getattr(needs, what).peak(ROWS)
        assert planned == pytest.approx(held, rel=0.15), f"{what}: {planned / 1e6:.2f} MB planned, {held / 1e6:.2f} MB held"
    trained = sum(weight.nbytes for weight in policy.trainable().values())
    assert trained <= needs.trained <= 1.05 * trained, "what a run leaves out, which has no part in the loss"
    parts = {key: part for key, part in policy.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert set(parts) == set(needs.weights)
    whole = sum(each.nbytes for part in parts.values() for each in (*part.parameters(), *part.buffers()))
    assert sum(needs.weights.values()) + needs.trained == pytest.approx(whole, rel=0.01)


# What is proposed


def made_up(config: TrainConfig, on_card: bool) -> Needs:
    """2 GB of network, 5 of text encoders, and activations that each option lowers."""
    policy = config.policy
    half = 0.5 if policy.dtype == "bfloat16" else 1.0
    row, image = (0.5 if policy.gradient_checkpointing else 2.0), (0.05 if policy.vae_tiling else 0.15)
    lines = {
        name: Work((0.0, size * GB), (0.0, 1e12))
        for name, size in (("denoise", 0.2 * half), ("decode", image), ("update", row * half))
    }
    return Needs(
        weights={"transformer": 2 * GB * half, "text_encoder": 5 * GB * half},
        encoders=("text_encoder",),
        linear=(1.6 * GB * half, 0.1 * GB * half),
        trained=0.01 * GB,
        optimizer=0.06 * GB,
        **lines,
        embedding=0.1 * GB,
        latent=1e5,
        sample=1e6,
        evaluated=1e6,
        num_steps=10,
        rows=(64, 128),
        width=int(32 * half),
        about="Pipeline",
    )


CONFIG = TrainConfig(prompts_per_step=4, samples_per_prompt=4, algorithm=DDPOConfig(normalisation="group"))


@pytest.mark.parametrize("size", [5, 6, 8, 12, 24, 80])
def test_what_is_proposed_fits_keeps_a_step_and_can_be_pasted(size: int) -> None:
    plan = make_plan(CONFIG, read_card(f"{size} GB"), made_up)
    assert plan.fits and max(plan.peaks.values()) <= plan.card.usable < size * GB
    pasted = parse_train(["--prompts-per-step", "4", "--samples-per-prompt", "4", *plan.pasted.split()])
    assert (pasted.prompts_per_step, pasted.samples_per_prompt) == (4, 4)
    assert (pasted.sampling.batch_size, pasted.algorithm.micro_batch_size) == (plan.batch, plan.micro)
    for option in plan.options:
        assert getattr(pasted.policy, option.split()[0][9:].replace("-", "_")) in (True, option.split()[-1])
    doubled = plan.needs.peaks(plan.config, 2 * plan.batch, 2 * plan.micro)
    assert plan.batch == 16 or max(doubled["sampling"], doubled["an evaluation"]) > plan.card.usable, "the most that fits"
    assert plan.micro == 64 or doubled["updates"] > plan.card.usable


def test_no_more_options_than_it_takes() -> None:
    options = {size: make_plan(CONFIG, read_card(f"{size} GB"), made_up).options for size in (80, 12, 8)}
    assert options[80] == options[12] == () and "--policy.dtype bfloat16" in options[8]

    def large_images(config: TrainConfig, on_card: bool) -> Needs:
        size = 0.01 if config.policy.vae_slicing else 1.0
        return replace(made_up(config, on_card), decode=Work((0.1 * GB, size * GB), (0.0, 1e12)))

    sliced = make_plan(CONFIG, read_card("12 GB"), large_images)
    assert sliced.options == ("--policy.vae-slicing",) and sliced.batch == 8
    nothing = make_plan(CONFIG, read_card("3 GB"), made_up)
    assert not nothing.fits and "--policy.quantization nf4" in nothing.options, "even with everything"
    full = replace(CONFIG, policy=PolicyConfig(training="full"))
    assert not {"--policy.dtype bfloat16", "--policy.quantization nf4"} & set(
        make_plan(full, read_card("3 GB"), made_up).options
    )
    machine = make_plan(CONFIG, Card(3 * GB, own=False), made_up)
    assert not {"--policy.offload-text-encoders", "--policy.quantization nf4"} & set(machine.options), "not on a CPU"


def test_objectives_of_other_kinds(tiny_folder: Path) -> None:
    """Older copies of the weights count, and so does the decoder where the reward's gradient runs through it."""
    config = TrainConfig(str(tiny_folder), prompts_per_step=8, samples_per_prompt=2)
    usual, copied, decoded = (
        find_needs(replace(config, algorithm=algorithm), on_card=True)
        for algorithm in (config.algorithm, NFTConfig(updates_per_step=1), DRaFTConfig())
    )
    assert copied.optimizer > usual.optimizer == decoded.optimizer and copied.sample < usual.sample
    assert decoded.update.peak(1) > usual.update.peak(1) + decoded.decode.peak(1)


# The command line


def test_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights, and nothing is written."""
    folder = tmp_path / "settings"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    options = ["plan", "--model", str(folder)]
    assert main([*options, "--card", "8 GB", "--rate", "20"]) == 0
    printed = capsys.readouterr().out
    assert (
        "--sampling.batch-size 64" in printed and "nothing was measured" in printed and "at 20 TFLOP/s, as was given" in printed
    )
    assert main(options) == 0
    assert "TFLOP/s, as was given" not in capsys.readouterr().out, "no time without a rate"
    for wrong, said in (
        (["--card", "large"], "give its memory"),
        (["--rate", "-1"], "a positive number"),
        (["--preferences", "pairs", "--algorithm.name", "dpo", "--samples-per-prompt", "2"], "preferences from disk"),
    ):
        assert main([*options, *wrong]) == 2
        errors = capsys.readouterr().err
        assert said in errors and errors.count("error:") == 1
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [3]}')
    assert main(options) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["settings"]


# The shapes of the table


def test_the_models_of_the_table_have_the_published_sizes() -> None:
    spec = importlib.util.spec_from_file_location("shapes", Path(__file__).parent.parent / "benchmarks" / "shapes.py")
    assert spec is not None and spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    billions = {"sd15": 0.860, "sdxl": 2.567, "sd3-medium": 2.24, "flux-dev": 11.9, "z-image": 6.15, "wan-1.3b": 1.42}
    found = {name: shapes.parameters(name) / 1e9 for name in billions}  # and qwen-image, 20.4, which takes longer
    assert found == pytest.approx(billions, rel=0.005)
