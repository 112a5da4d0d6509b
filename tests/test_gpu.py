"""What must hold on a GPU: ``python -m pytest -m gpu``. On a machine without one the same tests run on the CPU, so that they
cannot rot; what only a card can show is skipped there."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
import tyro
from faults import finish_together, tiny_run, what_it_made
from torch import Tensor

from diffusionrl import TrainConfig, devices, diagnose, train
from diffusionrl.cli import main
from diffusionrl.config import CLIPScoreConfig, DDPOConfig, EvaluationConfig, PolicyConfig, SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies import make_policy
from diffusionrl.sampling.rollout import collect, denoise_step
from diffusionrl.training.trainer import Trainer
from diffusionrl.transitions import log_density

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it starts
DEVICE = devices.choose()
PROMPTS = [Prompt("a cat"), Prompt("a dog")] * 2
SAMPLING = SamplingConfig(num_steps=3, guidance=2.0, sampler="cps", eta=0.7, batch_size=4)
MODELS = ["sd1", "sd3"]
pytestmark = pytest.mark.gpu
on_a_card = pytest.mark.skipif(DEVICE != "cuda", reason="a card alone shows it")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.flatten(1).mean(1)


def sizes_of(name: str) -> dict[str, Any]:
    """The smallest that it takes."""
    return {"height": 8, "width": 8, "call": () if name == "sd1" else ("max_sequence_length=16",)}


def policy_of(name: str, dtype: str = "float32", **more: Any) -> Any:
    """Its adapter is moved off zero, so that it matters."""
    settings = replace(SAMPLING, **sizes_of(name))
    policy: Any = make_policy(tiny.build(name), settings, device=DEVICE, dtype=getattr(torch, dtype), **more)
    for index, (key, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in key:
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
            weight.data.copy_(0.05 * drawn)
    return policy


def replayed(policy: Any, rollout: Any) -> Tensor:
    """Log-probabilities of the rollout's latents, in batches as it had them; (B, T)."""
    found = []
    for step in range(len(rollout.table)):
        rows = torch.full((len(PROMPTS),), step, device=policy.device)
        mean, std = denoise_step(policy, rollout.table, rollout.latents[:, step], rows, PROMPTS, SAMPLING.guidance)
        found.append(log_density(rollout.latents[:, step + 1], mean, std, "mean"))
    return torch.stack(found, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_ratio_begins_at_one(name: str, dtype: str) -> None:
    """Of float32 latents and log-probabilities, whatever the network runs in."""
    if dtype == "float16" and DEVICE == "cpu":
        pytest.skip("float16 is for GPUs")
    policy = policy_of(name, dtype)
    with torch.no_grad():
        rollout = collect(policy, brightness, PROMPTS, SAMPLING, 0, "test", 0)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    gap = (replayed(policy, rollout) - rollout.log_probs)[:, :-1].abs().max()  # the last step is deterministic
    assert gap < 1e-5
    gap.backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in policy.trainable().values())


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for saved in (False, True):
        policy = policy_of(name, gradient_checkpointing=saved)
        x = policy.start(PROMPTS, range(len(PROMPTS)))
        levels = policy.grid(3).levels[torch.tensor([1, 1, 2, 2])]
        x0, _ = policy.denoise(x, levels, PROMPTS, 2.0)
        x0.square().mean().backward()
        gradients.append({key: weight.grad for key, weight in policy.trainable().items()})
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("deterministic", "no_picture")
def test_a_run_and_its_resume_are_the_same_twice(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's deterministic mode, to the bit; the second one stops half way and goes on."""
    whole, stopped, step = tmp_path / "whole", tmp_path / "stopped", Trainer.step
    short = ["--steps", "2", "--evaluation.every", "0"]
    assert main(tiny_run(tiny_folder, whole, *short)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", lambda trainer, number, *more: step(trainer, number, *more) if number < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(tiny_run(tiny_folder, stopped, *short))
    assert main(tiny_run(tiny_folder, stopped, *short)) == 0
    assert what_it_made(stopped) == what_it_made(whole)


@pytest.mark.parametrize("name", MODELS)
def test_the_export_draws_what_the_trainer_draws(name: str, tmp_path: Path) -> None:
    tiny.build(name).save_pretrained(tmp_path / "model")
    config = TrainConfig(
        model=str(tmp_path / "model"),
        prompts_per_step=2,
        samples_per_prompt=2,
        policy=PolicyConfig(device=DEVICE),
        sampling=replace(SAMPLING, **sizes_of(name)),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2, embeddings=CLIPScoreConfig(model="none")),
    )
    found = next(each for each in diagnose(config, reward=brightness, prompts=["a cat"]) if each.check == "export")
    assert found.verdict == "pass", found.said


@on_a_card
def test_two_processes_share_one_card(tiny_folder: Path, tmp_path: Path) -> None:
    options = tiny_run(tiny_folder, Path("run"), "--policy.device", DEVICE)
    finish_together(options, tmp_path, 2)
    assert (tmp_path / "run" / "export").is_dir()


@on_a_card
def test_memory_is_what_the_doctor_foretold(tmp_path: Path) -> None:
    """Within 15 %, of a run of the embedded model."""
    config = TrainConfig(
        steps=2,
        prompts_per_step=16,
        samples_per_prompt=2,
        run_dir=tmp_path / "run",
        policy=PolicyConfig(device="cuda"),
        sampling=SamplingConfig(num_steps=4, guidance=3.0, batch_size=32),
        algorithm=DDPOConfig(updates_per_step=1, micro_batch_size=64),
        evaluation=EvaluationConfig(every=0, num_samples=16, embeddings=CLIPScoreConfig(model="none")),
    )
    said = next(each.said for each in diagnose(config, reward=brightness) if each.check == "memory")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(config, reward=brightness)
    assert float(said.split()[0]) * 1e9 == pytest.approx(torch.cuda.max_memory_reserved(), rel=0.15)


@on_a_card
def test_too_little_memory_is_said(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny_run(tiny_folder, tmp_path / "run", "--sampling.batch-size", "4096", "--prompts-per-step", "4096")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        assert main(options) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "--sampling.batch-size 2048" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE != "cpu", reason="it is for machines without a card")
@pytest.mark.filterwarnings("ignore")  # of the peers' ways
def test_the_benchmark_runs_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its workers in this process; what is there already is not measured again, what failed is."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gpu

    asked: list[list[str]] = []

    def worker(script: str, options: list[str], seconds: float, python: str = sys.executable) -> dict[str, Any]:
        asked.append([script, *options])
        module = importlib.import_module(script.removesuffix(".py"))
        capsys.readouterr()
        module.main(tyro.cli(module.Config, args=options))
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    monkeypatch.setattr(gpu, "worker", worker)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which would stay for all tests after this one
    parts = [
        "rate",
        "sd15/fused AdamW",
        "sd15/TRL, as documented",
        "sd3-medium",
        "sd3-medium/rebuilt loop of flow_grpo, batch 8",
    ]
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.PARTS[name] for name in parts})
    config = gpu.Config(out=tmp_path, toy=True)
    gpu.main(config)
    results = json.loads((tmp_path / "toy.json").read_text())
    assert set(results) == {"versions", *parts}
    assert "trl" in results.pop("sd15/TRL, as documented")["error"]
    assert all("error" not in found for found in results.values()), results
    measured = len(asked)
    gpu.main(config)
    assert [script for script, *_ in asked[measured:]] == ["throughput_trl.py"]
    assert "| sd3-medium/rebuilt loop of flow_grpo, batch 8 |" in capsys.readouterr().out
