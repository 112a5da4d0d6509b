"""A run that is taken up has the weights, the rewards and the images that it began with, or says so."""

import functools
import json
import operator
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffusionrl import Prompt, RunStopped, TrainConfig, UserError, train
from diffusionrl.algorithms import make_algorithm
from diffusionrl.config import CheckpointConfig, DDPOConfig, EvaluationConfig, PretrainingConfig, SamplingConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.pairs import load_pairs
from diffusionrl.policies.identity import fingerprint_of
from diffusionrl.rewards import as_mixture, try_mixture
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.training.trainer import Trainer

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


@settings(max_examples=examples(10))
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


# What a checkpoint says may be what somebody made of it


@pytest.fixture
def begun_trainer(make_policy: Any) -> tuple[Trainer, Checkpoint]:
    config = TrainConfig(
        steps=2,
        prompts_per_step=2,
        rewards=RewardsConfig(normalise=True),
        sampling=SamplingConfig(num_steps=2),
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        pretraining=PretrainingConfig(source="emoji", batch_size=1),
    )
    pairs = load_pairs(config.pretraining)
    trainer = Trainer(make_policy(), bright, [Prompt("a cat")], make_algorithm(config), config, pairs=pairs)
    trainer.step(1)
    return trainer, trainer.state.capture(1)


def bright(images: Any, prompts: Any, metadata: Any) -> Any:
    return images.mean((1, 2, 3))


def places_in(value: Any) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *place) for key, each in inner for place in places_in(each))]


anything = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.builds(list) | st.builds(dict)
)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_sealed_checkpoint_that_is_wrong_is_one_message_or_no_harm(
    begun_trainer: tuple[Trainer, Checkpoint], data: st.DataObject
) -> None:
    trainer, found = begun_trainer
    state, tensors = json.loads(json.dumps(found.state)), {file: dict(each) for file, each in found.tensors.items()}
    if data.draw(st.booleans()):
        *way, last = data.draw(st.sampled_from([place for place in places_in(state) if place]))
        owner = functools.reduce(operator.getitem, way, state)
        owner[last] = data.draw(anything)
    else:
        file = data.draw(st.sampled_from(sorted(tensors)))
        name = data.draw(st.sampled_from(sorted(tensors[file])))
        kind = data.draw(st.sampled_from(["gone", "half", "whole numbers", "longer", "another name", "no file"]))
        weight = tensors[file].pop(name)
        if kind == "no file":
            del tensors[file]
        elif kind != "gone":
            changed = {"half": weight.half(), "whole numbers": weight.to(torch.int8), "another name": weight}
            changed["longer"] = torch.cat([weight.flatten(), torch.ones(1)])
            tensors[file][name + "x" if kind == "another name" else name] = changed[kind]
    try:
        trainer.state.restore(Checkpoint(1, tensors, state))
        trainer.state.capture(1)
    except (UserError, RunStopped):
        pass
    finally:
        trainer.state.restore(found)
