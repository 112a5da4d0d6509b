"""The pretraining loss: the denoising loss on real pairs, beside the reward, and what happens to folders that are broken."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusionrl import Prompt, RunStopped, TrainConfig, UserError, processes, train
from diffusionrl.algorithms import RWR, make_algorithm
from diffusionrl.cli import main
from diffusionrl.config import (
    CheckpointConfig,
    DDPOConfig,
    EvaluationConfig,
    PretrainingConfig,
    RWRConfig,
    SamplingConfig,
    TaskConfig,
)
from diffusionrl.data.pairs import ScenePairs, load_pairs
from diffusionrl.emoji.scenes import draw_scene
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.trainer import Trainer

EMOJI = PretrainingConfig("emoji", batch_size=6, updates=2)


def bright(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def small(pretraining: PretrainingConfig, **settings: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "steps": 4,
            "prompts_per_step": 4,
            "sampling": SamplingConfig(num_steps=3, batch_size=8),
            "algorithm": DDPOConfig(updates_per_step=2, min_count=2),
            "evaluation": EvaluationConfig(every=0, num_samples=2),
            "checkpoint": CheckpointConfig(every=1),
            "pretraining": pretraining,
        }
        | settings
    )


def trainer_of(policy: Any, config: TrainConfig) -> Trainer:
    pairs = load_pairs(config.pretraining)
    return Trainer(policy, bright, [Prompt("a cat")], make_algorithm(config), config, pairs=pairs)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if "time/" not in key and key != "peak_memory_gb"}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_folder(folder: Path, count: int = 6, broken: Sequence[int] = (), suffix: str = ".jsonl") -> Path:
    """Noise of 40 x 50 pixels; those that are broken end half-way."""
    (folder / "deep").mkdir(parents=True)
    entries = [{"file_name": f"deep/{i}.png", "text": f"a cat,\nnumber {i}"} for i in range(count)]
    for i, entry in enumerate(entries):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / entry["file_name"])
        if i in broken:
            (folder / entry["file_name"]).write_bytes((folder / entry["file_name"]).read_bytes()[:900])
    with (folder / f"metadata{suffix}").open("w", newline="") as file:
        if suffix == ".csv":
            table = csv.DictWriter(file, ["file_name", "text"])
            table.writeheader()
            table.writerows(entries)
        else:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


# The loss


def test_it_is_rwrs_loss_on_the_same_draws(make_policy: Any) -> None:
    policy, config = make_policy(), small(replace(EMOJI, weight=3.0))
    pretraining = Pretraining(ScenePairs(), config, 4)
    batch = pretraining.batch(policy, 1, range(6))
    rows, weights = torch.stack([torch.arange(6), torch.arange(6) + 70], 1), torch.full((6,), 3.0)
    found, figures = pretraining.losses(policy, batch, rows, weights)
    expected, known = RWR(RWRConfig(train_guided=False), 7.0).losses(policy, batch, rows, weights)
    assert torch.equal(found, expected)
    torch.testing.assert_close(figures["pretraining/loss"], found.detach() / 3)
    assert torch.equal(figures["pretraining/loss"], known["policy/denoising_loss"])


def test_it_is_the_closed_form(make_policy: Any) -> None:
    """Against diffusers' own parts: VAE, scheduler, UNet and text encoder, on a pair that is drawn again by its address."""
    policy = make_policy(lora_rank=None)
    pretraining, pipeline = Pretraining(ScenePairs(), small(replace(EMOJI, drop_caption=0.0)), 4), policy.pipeline
    batch = pretraining.batch(policy, 1, range(3))
    with torch.no_grad():
        posterior = pipeline.vae.encode(2 * batch.images - 1).latent_dist
        clean = posterior.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(batch.latents[:, 0], clean)
    for i in range(3):
        generator = torch.Generator().manual_seed(90 + i)
        t = 999 - (1000 * torch.rand((), generator=generator)).long().view(1)  # 0 is the noisy end
        noise = torch.randn(1, *policy.latent_shape, generator=generator)
        x = pipeline.scheduler.add_noise(clean[i : i + 1], noise, t)
        with torch.no_grad():
            output = policy.unet(x, t, policy.embed([batch.prompts[i].text])).sample
        found, _ = pretraining.losses(policy, batch, torch.tensor([[i, 90 + i]]), torch.ones(1))
        assert found.item() == pytest.approx((output - noise).square().mean().item(), rel=1e-4)


def test_latents_decode_to_the_image() -> None:
    from diffusionrl.policies import load_policy

    policy = load_policy("emoji", device="cpu")
    image = torch.from_numpy(np.array(draw_scene(5, 0).image)).permute(2, 0, 1)[None].float() / 255
    latents = policy.encode(image)
    assert latents.shape == (1, *policy.latent_shape)
    error = (policy.decode(latents) - image).square().mean()
    assert error < 10**-2.2, "22 dB"
    assert 0.3 < latents.std() < 3, "scaled"


def test_pairs_depend_on_the_seed_the_step_and_the_index(make_policy: Any) -> None:
    policy, pretraining = make_policy(), Pretraining(ScenePairs(), small(EMOJI), 4)
    whole, part = pretraining.batch(policy, 2, range(6)), pretraining.batch(policy, 2, range(3, 6))
    assert torch.equal(whole.images[3:], part.images)
    assert whole.prompts[3:] == part.prompts
    assert not torch.equal(pretraining.batch(policy, 3, range(6)).images, whole.images)
    assert not torch.equal(Pretraining(ScenePairs(), small(EMOJI, seed=1), 4).batch(policy, 2, range(6)).images, whole.images)


@pytest.mark.parametrize(("share", "few", "many"), [(0.0, 0, 0), (0.25, 10, 50), (1.0, 100, 100)])
def test_captions_are_dropped_at_their_rate(make_policy: Any, share: float, few: int, many: int) -> None:
    pretraining = Pretraining(ScenePairs(), small(replace(EMOJI, drop_caption=share)), 4)
    dropped = [prompt.text for prompt in pretraining.batch(make_policy(), 1, range(100)).prompts].count("")
    assert few <= dropped <= many


# Training


def test_optimizer_steps_come_after_those_of_the_tasks(make_policy: Any) -> None:
    config = small(EMOJI)
    trainer = trainer_of(make_policy(), config)
    counted: list[int] = []
    trainer.state.optimization.adamw.register_step_post_hook(lambda *_: counted.append(1))
    metrics = trainer.step(1)
    assert len(counted) == 4 == trainer.state.optimization.updates
    assert metrics["pretraining/loss"] > 0 and metrics["time/pretraining"] > 0 and metrics["pretraining/broken"] == 0
    off = timeless(trainer_of(make_policy(), small(PretrainingConfig())).step(1))
    assert {key: metrics[key] for key in off} == off, "the tasks of the first step know nothing of it"
    assert not any(key.startswith("pretraining/") for key in off)


def test_it_falls(make_policy: Any) -> None:
    config = small(replace(EMOJI, updates=40), optimizer=replace(TrainConfig().optimizer, learning_rate=1e-2))
    policy = make_policy()
    pretraining = Pretraining(ScenePairs(), config, 8)
    held = pretraining.batch(policy, 99, range(32))
    rows = torch.stack([torch.arange(32), torch.arange(32)], 1)

    def loss() -> float:
        with torch.no_grad():
            return pretraining.losses(policy, held, rows, torch.ones(32))[0].mean().item()

    before = loss()
    pretraining.train(policy, trainer_of(policy, config).state.optimization, 1)
    assert loss() < 0.95 * before


def test_a_run_with_it_goes_on_exactly(make_policy: Any, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pairs", count=8, broken=(1, 2, 3))
    settings = PretrainingConfig(str(source), batch_size=2, max_broken=3)
    config = small(settings, steps=2, tasks=(TaskConfig("more", prompts_per_step=2),))
    given = {"reward": bright, "prompts": ["a cat", "a dog"]}
    train(replace(config, run_dir=tmp_path / "straight"), policy=make_policy(), **given)
    for steps in (1, 2):
        changed = replace(config, steps=steps, run_dir=tmp_path / "halves")
        train(changed, policy=make_policy(), **given)
    straight, halves = (lines(tmp_path / name) for name in ("straight", "halves"))
    shared = straight[0].keys() - {key for key in straight[0] if key.startswith(("eval/", "guard/"))}
    for one, other in zip(straight, halves, strict=True):
        keys = {key for key in one if not key.startswith(("eval/", "guard/"))} | shared
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    assert straight[-1]["eval/reward"] == halves[-1]["eval/reward"]
    assert straight[-1]["pretraining/broken"] > 0, "some were drawn"
    assert "pretraining" in (tmp_path / "halves" / "report.html").read_text()


def test_a_checkpoint_is_of_its_pairs(make_policy: Any, tmp_path: Path) -> None:
    config = small(PretrainingConfig(str(write_folder(tmp_path / "pairs"))))
    found = trainer_of(make_policy(), config).state.capture(1)
    (tmp_path / "pairs" / "metadata.jsonl").write_text('{"file_name": "deep/0.png", "text": "a dog"}\n')
    with pytest.raises(UserError, match="other captions or images than the run began with"):
        trainer_of(make_policy(), config).state.restore(found)


# Folders


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_images_of_a_folder_are_cropped_to_the_middle(make_policy: Any, tmp_path: Path, suffix: str) -> None:
    source = write_folder(tmp_path / "pairs", suffix=suffix)
    pairs = load_pairs(PretrainingConfig(str(source)))
    assert pairs is not None and pairs.draw(8)[1] == "a cat,\nnumber 2"
    image = Image.new("RGB", (80, 40), "white")
    image.paste("red", (16, 0, 64, 40))
    image.save(source / "deep" / "0.png")
    batch = Pretraining(pairs, small(PretrainingConfig(str(source))), 4).batch(make_policy(), 1, range(40))
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 32, 32)
    assert batch.images.shape == (40, 3, 32, 32)
    assert any(torch.allclose(image, red) for image in batch.images)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "PPM"])
def test_three_formats_are_decoded_and_no_others(tmp_path: Path, kind: str) -> None:
    """By what is in the file, whatever its name says."""
    source = write_folder(tmp_path / "pairs", count=1)
    Image.new("RGB", (40, 50), "red").save(source / "deep" / "0.png", format=kind)
    if kind in ("JPEG", "PNG", "WEBP"):
        assert load_pairs(PretrainingConfig(str(source)))
    else:
        with pytest.raises(UserError, match="do not decode as JPEG, PNG or WebP"):
            load_pairs(PretrainingConfig(str(source)))


def test_too_many_broken_images_on_one_process_stop_all(make_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(pretraining=PretrainingConfig("emoji", batch_size=2))
    loss = Pretraining(ScenePairs(), config, 2)
    monkeypatch.setattr(processes, "ask", lambda said: [said, "3 images do not decode"])
    with pytest.raises(RunStopped, match="3 images do not decode"):
        loss.batch(make_policy(), 1, range(2))


def test_broken_images_are_passed_over_up_to_a_limit(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pairs", broken=(2, 3))
    (source / "deep" / "4.png").unlink()
    pairs = load_pairs(PretrainingConfig(str(source), max_broken=3))
    assert pairs is not None and pairs.draw(2)[1].endswith("5") and sorted(pairs.broken) == [2, 3, 4]
    strict = load_pairs(PretrainingConfig(str(source), max_broken=1))
    assert strict is not None
    said = r"2 images do not decode as JPEG, PNG or WebP, more than pretraining.max_broken = 1: .*2\.png .*3\.png"
    with pytest.raises(RunStopped, match=said):
        strict.draw(2)
    none = write_folder(tmp_path / "none", count=2, broken=(0, 1))
    with pytest.raises(UserError, match=r"no image in .* decodes"):
        load_pairs(PretrainingConfig(str(none), max_broken=9))


def test_broken_images_of_all_processes_count_together(tmp_path: Path, monkeypatch: Any, make_policy: Any) -> None:
    """Each of two processes is within the limit, and the run is not."""
    folder = write_folder(tmp_path / "pairs", broken=(2,))
    config = small(PretrainingConfig(str(folder), batch_size=8, max_broken=1))
    trainer = trainer_of(make_policy(), config)
    original = processes.ask

    def ask(said: Any) -> list[Any]:
        pair = isinstance(said, list) and said and isinstance(said[0], tuple)
        return [said, [(5, "broken elsewhere")]] if pair else original(said)

    monkeypatch.setattr(processes, "ask", ask)
    with pytest.raises(RunStopped, match=r"2 images do not decode .*, more than pretraining.max_broken = 1: .*elsewhere"):
        trainer.pretraining.train(trainer.policy, trainer.state.optimization, 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere", None, "no such folder"),
        ("pairs", None, "has neither of metadata.jsonl and metadata.csv"),
        ("pairs", "", "holds no caption"),
        ("pairs", '{"file_name": "0.png"}', "jsonl:1 has no text"),
        ("pairs", '{"file_name": "0.png", "text": " "}', "jsonl:1 has no text"),
        ("pairs", '["0.png", "a cat"]', "jsonl:1 has no file_name"),
        ("pairs", "\na cat", "jsonl:2: Expecting value"),
        ("pairs", "[" * 100_000, "jsonl:1: maximum recursion depth"),
        ("pairs", '{"file_name": "../0.png", "text": "a cat"}', "is outside of the folder"),
        ("pairs", '{"file_name": "0.png", "text": "a cat"}', "pairs are not there, or no files"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: Any, capsys: Any, name: str, content: str | None, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    if content is not None:
        (tmp_path / "pairs" / "metadata.jsonl").write_text(content + "\n")
    assert main(["train", "--pretraining.source", name, "--run-dir", "run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 0.0), ("batch_size", 0), ("updates", 0), ("drop_caption", 1.5), ("max_broken", -1)]
)
def test_bad_settings(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"pretraining.{name} must"):
        PretrainingConfig(**{name: value})
