"""The command line: help, bad input, and whole runs on the tiny and the embedded model."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusionrl import Prompt, RunStopped, TrainConfig, UserError, train
from diffusionrl.cli import main, parse_train
from diffusionrl.config import DDPOConfig, EvaluationConfig, SamplingConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.gallery import gallery
from diffusionrl.data.images import to_pil
from diffusionrl.data.prompts import load_prompts
from diffusionrl.evaluation.fixed_seed import evaluate
from diffusionrl.interruption import Interrupted
from diffusionrl.policies import StableDiffusionPolicy, load_pipeline
from diffusionrl.runs.checkpoint import complete_steps

SMALL = ["--steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "2", "--sampling.num-steps", "4"]
SMALL += ["--sampling.batch-size", "8"]
SMALL += ["--algorithm.updates-per-step", "2", "--evaluation.num-samples", "4", "--evaluation.every", "0"]
REQUIRED = {
    *("step", "queries", "reward/mean", "reward/std", "ratio/max_gap", "policy/clip_fraction", "policy/approx_kl"),
    *("grad_norm", "time/rollout", "time/reward", "time/update", "peak_memory_gb"),
}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "peak_memory_gb"} for line in metrics]


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image, int)


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


# Help and settings


def test_help_answers_in_under_a_second() -> None:
    best = 9.0
    for _ in range(6):  # until it does: a busy machine says nothing about the program
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "diffusionrl", "train", "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: other tests run beside this one
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 1.0:
            break
    assert "--algorithm.clip-range" in done.stdout
    assert best < 1.0


def test_help_does_not_import_torch() -> None:
    code = """
import sys, diffusionrl.cli
try:
    diffusionrl.cli.main(["train", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_options_win_over_yaml_which_wins_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nseed: 3\nalgorithm:\n  clip_range: 1e-2\n  variant: is\noptimizer:\n  betas: [0.8, 0.9]\n")
    config = parse_train(["--config", str(file), "--seed", "4", "--preset=ddpo-lora"])
    assert (config.steps, config.seed, config.algorithm.clip_range) == (7, 4, 1e-2)
    assert config.model == "CompVis/stable-diffusion-v1-4"
    assert config.optimizer.betas == (0.8, 0.9)


def test_switches_paths_and_lists_read_back(tmp_path: Path) -> None:
    from diffusionrl.config import to_yaml

    options = ["--reward", "aesthetic=2", "clip-score", "--rewards.normalise", "--evaluation.held-out", "emoji-gold"]
    options += ["--rewards.aesthetic.head", "head.safetensors", "--rewards.vlm.cache", "None"]
    config = parse_train(options)
    assert config.reward == ("aesthetic=2", "clip-score") and config.rewards.normalise
    assert config.rewards.aesthetic.head == Path("head.safetensors") and config.rewards.vlm.cache is None
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config
    assert not parse_train(["--config", str(tmp_path / "config.yaml"), "--rewards.no-normalise"]).rewards.normalise
    (tmp_path / "one.yaml").write_text("reward: incompressibility\n")
    assert parse_train(["--config", str(tmp_path / "one.yaml")]).reward == ("incompressibility",)


def test_another_algorithm_begins_at_its_defaults(tmp_path: Path) -> None:
    from diffusionrl.config import RWRConfig, to_yaml

    config = parse_train(["--algorithm.name", "rwr", "--algorithm.variant", "sparse", "--sampling.eta", "0"])
    assert config.algorithm == RWRConfig(variant="sparse")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config


def test_an_option_can_put_a_file_right(tmp_path: Path) -> None:
    (tmp_path / "sf.yaml").write_text("algorithm:\n  variant: sf\n")
    config = parse_train(["--config", str(tmp_path / "sf.yaml"), "--algorithm.updates-per-step", "1"])
    assert (config.algorithm.variant, config.algorithm.updates_per_step) == ("sf", 1)
    with pytest.raises(SystemExit, match="2"):
        parse_train(["--config", str(tmp_path / "sf.yaml")])


# Bad input: one clear error, exit code 2, before anything slow, nothing left behind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--algorithm.clip-rnage", "1"], "--algorithm.clip-range"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--algorithm.train-fraction", "2"], r"must lie in (0, 1]"),
        (["--sampling.eta", "0"], "needs fresh noise"),
        (["--algorithm.name", "ppo"], "unknown algorithm 'ppo'"),
        (["--algorithm.name", "rwr", "--algorithm.percentile", "90"], "must lie in [0, 1]"),
        (["--algorithm.name", "rwr", "--algorithm.clip-range", "1"], "--algorithm.clip-range"),
        (["--sampling.eta", "3"], "lower eta"),
        (["--sampling.num-steps", "2000"], "must lie between 1 and"),
        (["--sampling.sampler", "flow_grpo"], "linear flow"),
        (["--policy.training", "full", "--policy.dtype", "bfloat16"], "needs policy.dtype float32"),
        (["--optimizer.betas", "1", "1"], "must lie in [0, 1)"),
        (["--preset", "emojis"], "did you mean 'emoji'? There are ddpo-lora, ddpo-paper, diffusionrl-paper, emoji"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--config", "bad.yaml"], "--algorithm.clip-range"),
        (["--config", "list.yaml"], "must hold settings"),
        (["--prompts", "nowhere.txt"], "no such file"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--model", "empty"], "no model_index.json"),
        (["--model", "./nowhere"], "was not found"),
        (["--reward", "compresibility"], "unknown reward 'compresibility'; did you mean 'compressibility'?"),
        (["--algorithm.name", "rvr"], "did you mean 'rwr'?"),
        (["--reward", "aesthetic=2", "aesthetic"], "named twice"),
        (["--reward", "aesthetic=lots"], "the weight 'lots' is not a finite number"),
        (["--evaluation.held-out", "emoji-jugde"], "unknown reward 'emoji-jugde'"),
        (["--reward", "vlm-yes"], "rewards.vlm.model is needed"),
        (["--reward", "clip-score", "--rewards.clip-score.model", "./nowhere"], "was not found"),
        (["--reward", "clip-score", "--rewards.clip-score.model", "."], "could not be loaded"),
        (["--reward", "no_such_module:f"], "does not import"),
        (["--reward", "broken_reward:short"], "it returned a list of length 1"),
        (["--run-dir", "full"], "exists and is no run"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.yaml").write_text("algorithm:\n  clip_rnage: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken_reward.py").write_text("def short(images, prompts, metadata):\n    return [1.0]\n")
    before = set(tmp_path.rglob("*"))
    try:
        code = main(["train", *options])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    heard = capsys.readouterr()
    assert said in " ".join((heard.err + heard.out).replace("│", " ").split())
    assert "Traceback" not in heard.err
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_no_command_prints_the_usage(capsys: Any) -> None:
    assert main([]) == 2
    assert "usage: diffusionrl COMMAND" in capsys.readouterr().err
    assert main(["--help"]) == 0


# Whole runs


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``python -m diffusionrl train`` on the embedded model, and what it printed."""
    run_dir = tmp_path_factory.mktemp("embedded") / "run"
    command = [sys.executable, "-m", "diffusionrl", "train", *SMALL, "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return run_dir, done.stdout


def test_the_run_folder(embedded_run: tuple[Path, str]) -> None:
    run_dir, printed = embedded_run
    metrics = lines(run_dir)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for line in metrics[1:]:
        assert line.keys() >= REQUIRED
        assert line["ratio/max_gap"] < 1e-5
    assert metrics[-1]["queries"] == 16
    assert "eval/reward" in metrics[0] and "eval/reward" in metrics[-1]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["steps"] == 2
    assert json.loads((run_dir / "env.json").read_text())["versions"]["torch"] == torch.__version__
    for step in ("step_000000", "step_000002"):
        entries = [json.loads(line) for line in (run_dir / "samples" / step / "samples.jsonl").read_text().splitlines()]
        assert len(entries) == 4
        assert size_of(run_dir / "samples" / step / "00003.png") == (64, 64)
        assert size_of(run_dir / "samples" / step / "grid.png")[1] == 64
    assert (run_dir / "before_after.png").is_file()
    for said in ("before", "after", str(run_dir / "export"), str(run_dir / "before_after.png"), "left"):
        assert said in printed


def test_two_runs_with_one_seed_are_the_same_to_the_bit(embedded_run: tuple[Path, str], tmp_path: Path) -> None:
    """The second one beside whatever else the tests have done in this process."""
    first, second = embedded_run[0], tmp_path / "again"
    assert main(["train", *SMALL, "--run-dir", str(second)]) == 0
    assert without_times(lines(first)) == without_times(lines(second))
    weights = [load_file(run_dir / "export" / "pytorch_lora_weights.safetensors") for run_dir in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (first / "samples/step_000002/grid.png").read_bytes() == (second / "samples/step_000002/grid.png").read_bytes()


def test_the_export_draws_the_trainers_images_in_plain_diffusers(embedded_run: tuple[Path, str]) -> None:
    """To the pixel once the adapter is fused; beside its layers, but for single values that round to the next of 255 levels."""
    run_dir = embedded_run[0]
    config = parse_train(["--config", str(run_dir / "config.yaml")])
    kept = np.stack([pixels_of(run_dir / "samples" / "step_000002" / f"{i:05d}.png") for i in range(4)])

    def redraw(adapter: bool, fuse: bool = False) -> np.ndarray:
        pipeline = load_pipeline("emoji")
        if adapter:
            pipeline.load_lora_weights(run_dir / "export")
        if fuse:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        policy = StableDiffusionPolicy(pipeline, lora_rank=None)
        found = evaluate(policy, lambda i, p, m: [0.0] * len(i), load_prompts(config.prompts), 4, config.sampling, config.seed)
        return np.stack([np.asarray(to_pil(image), int) for image in found.rollout.images])

    assert np.array_equal(redraw(adapter=True, fuse=True), kept)
    difference = np.abs(redraw(adapter=True) - kept)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert np.abs(redraw(adapter=False) - kept).max() > 1


def test_sample_from_a_run(embedded_run: tuple[Path, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "images"
    options = ["--prompts", "a cat", "a dog", "--seeds", "0", "1", "2", "--sampling.num-steps", "2", "--out", str(out)]
    assert main(["sample", "--model", str(embedded_run[0]), *options]) == 0
    assert len(list(out.glob("0*.png"))) == 6
    assert size_of(out / "grid.png") == (3 * 64, 2 * 64)
    assert [(file.name, text) for file, text in gallery(out)][2:4] == [("00002.png", "a cat"), ("00003.png", "a dog")]
    assert main(["sample", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def small(run_dir: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        steps=1,
        prompts_per_step=4,
        run_dir=run_dir,
        sampling=SamplingConfig(num_steps=3),
        algorithm=DDPOConfig(updates_per_step=2),
        evaluation=EvaluationConfig(num_samples=2),
        **settings,
    )


def test_train_from_python(make_policy: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def red(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        seen.extend(zip(prompts, metadata, strict=True))
        return images[:, 0].mean((1, 2))

    policy = make_policy()
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    prompts = ["a cat", Prompt("a dog", {"colour": "red"})]
    result = train(small(tmp_path / "run"), policy=policy, reward=red, prompts=prompts)
    assert result.run_dir == tmp_path / "run"
    assert {(prompt, metadata.get("colour")) for prompt, metadata in seen} == {("a cat", None), ("a dog", "red")}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == policy.source
    assert any(not torch.equal(before[name], weight) for name, weight in policy.trainable().items())
    with pytest.raises(UserError, match="no prompt"):
        train(small(tmp_path / "other"), policy=policy, reward=red, prompts=[])


def test_full_fine_tuning_trains_and_exports_the_unet(make_policy: Any, tmp_path: Path) -> None:
    train(small(tmp_path / "run"), policy=make_policy(lora_rank=None), prompts=["a cat"])
    assert (tmp_path / "run" / "export" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_folder_of_ones_own(tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["train", "--model", str(tiny_folder), *SMALL, "--run-dir", str(tmp_path / "run")]) == 0
    assert len(lines(tmp_path / "run")) == 3


def test_some_failed_rewards_are_counted_and_many_stop_the_run(make_policy: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes(images: torch.Tensor, prompts: list[str], metadata: Any) -> list[float]:
        calls.append(len(images))
        return [float("nan") if i == 0 and len(images) == 4 else float(i) for i in range(len(images))]

    def fails_later(images: torch.Tensor, prompts: list[str], metadata: Any) -> list[float]:
        if len(images) == 4:
            raise TimeoutError("the scorer is gone")
        return [0.0] * len(images)

    train(small(tmp_path / "some"), policy=make_policy(), reward=sometimes, prompts=["a cat"])
    assert lines(tmp_path / "some")[1]["reward/invalid"] == 1
    config = dataclasses.replace(small(tmp_path / "many"), steps=3, rewards=RewardsConfig(invalid_window=2))
    with pytest.raises(RunStopped, match=r"8 of 8 samples of the last 2 steps .* TimeoutError: the scorer is gone"):
        train(config, policy=make_policy(), reward=fails_later, prompts=["a cat"])
    assert len(lines(tmp_path / "many")) == 2, "the first step without a score goes on, and changes nothing"


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(
    make_policy: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from diffusionrl.algorithms import DDPO

    policy = make_policy()
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    true_losses = DDPO.losses

    def broken(*arguments: Any) -> Any:
        losses, figures = true_losses(*arguments)
        return losses * float("nan"), figures

    monkeypatch.setattr(DDPO, "losses", broken)
    with pytest.raises(RunStopped, match="not finite"):
        train(small(tmp_path / "run"), policy=policy, prompts=["a cat"])
    assert all(torch.equal(before[name], weight) for name, weight in policy.trainable().items())


def test_an_interrupted_run_keeps_what_it_learned(make_policy: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupted(images: torch.Tensor, prompts: list[str], metadata: Any) -> list[int]:
        calls.append(1)
        if len(calls) == 4:  # the trial, the first evaluation, the first step, and now the second
            os.kill(os.getpid(), signal.SIGTERM)
        return list(range(len(images)))

    config = dataclasses.replace(small(tmp_path / "run"), steps=5)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(config, policy=make_policy(), reward=interrupted, prompts=["a cat"])
    assert complete_steps(tmp_path / "run") == [1]
    assert len(lines(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_the_module_returns_the_commands_exit_code() -> None:
    """``python -m diffusionrl`` is what torchrun starts."""
    command = [sys.executable, "-m", "diffusionrl", "train", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "steps must be at least 1" in done.stderr
