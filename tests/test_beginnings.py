"""A run that is taken up has the weights, the rewards and the images that it began with, or says so."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffusionrl import TrainConfig, UserError, train
from diffusionrl.config import CheckpointConfig, DDPOConfig, EvaluationConfig, PretrainingConfig, SamplingConfig
from diffusionrl.policies.identity import fingerprint_of
from diffusionrl.rewards import as_mixture, try_mixture

REWARD = """
def helped(value): return value
def bright(images, prompts, metadata):
    return helped(images.mean((1, 2, 3)))
"""


@pytest.fixture
def begun(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run of one step on a model, a reward and images that may be changed; called, it is taken up for one more."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "pairs").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pairs" / "0.png")
    (tmp_path / "pairs" / "0.txt").write_text("a cat")
    (tmp_path / "changing.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        model="model",
        reward=("changing:bright",),
        run_dir=tmp_path / "run",
        steps=1,
        prompts_per_step=2,
        sampling=SamplingConfig(num_steps=2),
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        evaluation=EvaluationConfig(every=0, num_samples=2),
        pretraining=PretrainingConfig(source="pairs", batch_size=1),
    )

    def go(steps: int, **changes: Any) -> None:
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        train(replace(config, steps=steps, **changes))

    go(1)
    return go


def heavier(file: Path, factor: float) -> None:
    weights = load_file(file)
    save_file({name: factor * weight for name, weight in weights.items()}, file, {"format": "pt"})


def test_what_changed_is_named_and_refused_and_taken_where_that_is_allowed(begun: Callable[..., None]) -> None:
    model, reward, image = Path("model/unet/diffusion_pytorch_model.safetensors"), Path("changing.py"), Path("pairs/0.png")
    for file, change, said in (
        (
            reward,
            lambda file: file.write_text(REWARD.replace("return helped", "return -helped")),
            "code of the reward changing",
        ),
        (image, lambda file: Image.new("RGB", (64, 9), "blue").save(file), "holds other captions or images"),
        (model, lambda file: heavier(file, 1.5), "the base model: not what the run began with"),
    ):
        kept = file.read_bytes()
        change(file)
        with pytest.raises(UserError, match=said):
            begun(2)
        if file != model:
            file.write_bytes(kept)
    begun(2, checkpoint=CheckpointConfig(allow_changes=True))
    begun(3)  # from what it has now
    heavier(model, 1.5)
    with pytest.raises(UserError, match="the base model"):
        begun(4)


def test_what_may_have_changed_is_said(begun: Callable[..., None], capsys: Any) -> None:
    Path("changing.py").write_text(REWARD.replace("value): return value", "value): return 3 * value"))
    begun(2)
    said = capsys.readouterr().err
    assert "the file of the reward changing:bright has changed" in said
    assert "gives a grey image 1.5, and 0.5 when the run began" in said
    begun(3)
    assert "changing:bright" not in capsys.readouterr().err


def test_a_score_that_does_not_repeat_itself_is_not_compared() -> None:
    drawn = iter(range(100))
    mixture = as_mixture(lambda images, prompts, metadata: [float(next(drawn)) for _ in prompts])
    assert try_mixture(mixture, (3, 8, 8), ["a", "b"], [{}, {}]) == list(mixture.rewards)
    assert mixture.tried == {}


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 7),
    st.integers(0),
    st.integers(0),
)
def test_a_fingerprint_is_of_every_weight_and_of_nothing_else(dtype: torch.dtype, size: int, which: int, bit: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(size, 3, 3), nn.Linear(3, size)).to(dtype)
    before = fingerprint_of({"unet": network, "tokenizer": object()})
    assert fingerprint_of({"unet": network.to(memory_format=torch.channels_last)}) == before
    weight = list(network.to(memory_format=torch.contiguous_format).parameters())[which % 4]
    bits = weight.data.view(-1).view(torch.uint8)
    bits[bit % len(bits)] ^= 1 << bit % 8
    assert fingerprint_of({"unet": network}) != before
