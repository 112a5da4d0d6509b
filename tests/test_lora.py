"""Going on from a LoRA that is there already: its rank and alpha are kept; the reference is the model with it or without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl import TrainConfig, UserError, load_policy, train
from diffusionrl.cli import main
from diffusionrl.config import (
    CheckpointConfig,
    CLIPScoreConfig,
    DDPOConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies import StableDiffusionPolicy, make_policy
from diffusionrl.policies.adapters import without_part

PROMPTS = [Prompt("a cat")]


def policy_of(name: str, **settings: Any) -> Any:
    arguments = {f"{key}={value}" for key, value in tiny.CALLS[name].items()} if name != "sd1" else ()
    sizes = {} if name == "sd1" else tiny.SIZE
    sampling = SamplingConfig(num_steps=3, guidance=3.0, call=tuple(arguments), **sizes)
    return make_policy(tiny.build(name), sampling, **settings)


def prediction(policy: Any) -> Tensor:
    levels = policy.grid(3).levels[torch.tensor([1])]
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoise(x, levels, PROMPTS, 3.0)[0]


def move(policy: Any, seed: int) -> None:
    for index, (name, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + index))


@pytest.fixture(params=["sd1", "sd3", "flux"])
def exported(request: Any, tmp_path: Path) -> tuple[str, Any, Path]:
    policy = policy_of(request.param, lora_rank=3)
    move(policy, 0)
    policy.export(tmp_path / "lora")
    return request.param, policy, tmp_path / "lora"


def test_a_lora_is_gone_on_from(exported: tuple[str, Any, Path]) -> None:
    name, trained, folder = exported
    base, learned = prediction(policy_of(name)), prediction(trained)
    assert isinstance(trained, StableDiffusionPolicy) == (name == "sd1")
    for reference, expected in (("start", learned), ("base", base)):
        policy = policy_of(name, lora=folder, reference=reference)
        assert [weight.shape for weight in policy.trainable().values()] == [w.shape for w in trained.trainable().values()]
        torch.testing.assert_close(prediction(policy), learned, rtol=1e-4, atol=1e-5)
        move(policy, 100)
        assert not torch.allclose(prediction(policy), learned, atol=1e-3)
        with policy.reference():
            torch.testing.assert_close(prediction(policy), expected, rtol=1e-4, atol=1e-5)


def test_rank_and_alpha_are_those_of_the_file(tmp_path: Path) -> None:
    """Also under kohya's names, in the file for other interfaces."""
    pipeline = tiny.build("sd1")
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    for index, (name, weight) in enumerate(pipeline.unet.named_parameters()):
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)) / 10
    layers = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(pipeline.unet).items()}
    settings = {
        key: sorted(v) if isinstance(v, set) else v for key, v in pipeline.unet.peft_config["default"].to_dict().items()
    }
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    first = policy_of("sd1", lora=tmp_path)
    shapes = {weight.shape[0] for name, weight in first.trainable().items() if "lora_A" in name}
    assert shapes == {2}
    first.export(tmp_path / "again")
    for file in (tmp_path / "again", tmp_path / "again" / "comfyui.safetensors"):
        second = policy_of("sd1", lora=file)
        assert {layer.scaling["default"] for layer in second._adapted.values()} == {3.0}
        torch.testing.assert_close(prediction(second), prediction(first), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prediction(first), prediction(policy_of("sd1")), atol=1e-3)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_alpha_multiplies_what_the_adapter_adds(name: str, tmp_path: Path) -> None:
    """By alpha / rank, in the run and in what it exports; and the adapter begins at nothing all the same."""
    strong, weak = policy_of(name, lora_rank=2, lora_alpha=6.0), policy_of(name, lora_rank=2)
    torch.testing.assert_close(prediction(strong), prediction(weak))
    assert strong.settings.lora_alpha == 6.0
    move(strong, 0)
    move(weak, 0)
    for key, weight in weak.trainable().items():
        if "lora_B" in key:
            weight.data *= 3
    torch.testing.assert_close(prediction(strong), prediction(weak), rtol=1e-4, atol=1e-5)
    strong.export(tmp_path / "lora")
    torch.testing.assert_close(prediction(policy_of(name, lora=tmp_path / "lora")), prediction(strong), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"lora_alpha is of a new adapter"):
        PolicyConfig(lora=tmp_path / "lora", lora_alpha=2.0)


def test_files_that_are_no_lora_of_this_model(exported: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, folder = exported
    file = folder / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    other = {"sd1": "flux", "sd3": "sd1", "flux": "sd1"}[name]
    with pytest.raises(UserError, match="LoRA"):
        policy_of(other, lora=file)
    save_file(
        {key: torch.zeros(*weight.shape[:-1], weight.shape[-1] + 1) for key, weight in weights.items()},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="could not be loaded"):
        policy_of(name, lora=tmp_path / "a.safetensors")
    prefix = next(iter(weights)).split(".")[0]
    stray = {f"{prefix}.nowhere.to_q.lora_{side}.weight": torch.zeros(3, 3) for side in "AB"}
    save_file(weights | stray, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"is it a LoRA of another model|could not be loaded"):
        policy_of(name, lora=tmp_path / "b.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="LoRA"):
        policy_of(name, lora=tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="was not found"):
        policy_of(name, lora=tmp_path / "nowhere.safetensors")


def test_keys_have_a_part() -> None:
    """Attention does not see what all keys are shifted by alike; that must not be taken for a layer without a part."""
    keys, idle = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.nn.init.eye_(keys.weight)
    torch.nn.init.zeros_(keys.bias)
    tokens, query, values = torch.eye(2)[None], torch.ones(2), torch.tensor([1.0, 3.0])

    def run() -> Tensor:
        idle(tokens)
        return torch.softmax(keys(tokens) @ query, -1) @ values

    assert without_part({"keys": keys, "idle": idle}, run) == ["idle"]


def test_a_run_notices_another_lora_in_the_place_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    first = load_policy(str(tiny_folder), lora_rank=2)
    first.export(tmp_path / "lora")
    config = TrainConfig(
        model=str(tiny_folder),
        run_dir=tmp_path / "run",
        steps=1,
        prompts_per_step=1,
        samples_per_prompt=2,
        sampling=SamplingConfig(num_steps=2),
        evaluation=EvaluationConfig(num_samples=2, embeddings=CLIPScoreConfig(model="none")),
        algorithm=DDPOConfig(updates_per_step=1, normalisation="group"),
        policy=PolicyConfig(lora=tmp_path / "lora"),
    )

    def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return images.mean((1, 2, 3))

    train(config, reward=brightness, prompts=["a cat"])
    move(first, 0)
    first.export(tmp_path / "lora")
    longer = replace(config, steps=2)
    with pytest.raises(UserError, match=r"the file of policy\.lora: not what the run began with"):
        train(longer, reward=brightness, prompts=["a cat"])
    train(replace(longer, checkpoint=CheckpointConfig(allow_changes=True)), reward=brightness, prompts=["a cat"])


def test_the_weights_of_an_earlier_checkpoint_are_exported(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """And of a run that keeps an average, its average, as the run does itself."""
    for average in (0.0, 0.5):
        config = TrainConfig(
            model=str(tiny_folder),
            run_dir=tmp_path / f"run{average}",
            steps=3,
            prompts_per_step=2,
            sampling=SamplingConfig(num_steps=2),
            evaluation=EvaluationConfig(every=0, num_samples=2, embeddings=CLIPScoreConfig(model="none")),
            algorithm=DDPOConfig(updates_per_step=1, min_count=1),
            optimizer=OptimizerConfig(learning_rate=0.1, average=average),
            checkpoint=CheckpointConfig(every=1, keep=3),
        )
        train(config, reward=lambda images, prompts, metadata: images.mean((1, 2, 3)), prompts=["a cat"])
        assert config.run_dir is not None
        files = {}
        for step in (2, 3):
            out = tmp_path / f"{average} {step}"
            assert main(["export", str(config.run_dir), "--step", str(step), "--out", str(out)]) == 0
            files[step] = load_file(out / "pytorch_lora_weights.safetensors")
        own = load_file(config.run_dir / "export" / "pytorch_lora_weights.safetensors")
        assert all(torch.equal(files[3][name], own[name]) for name in own)
        assert not all(torch.equal(files[2][name], own[name]) for name in own)
    for given, said in (
        ([str(config.run_dir), "--step", "7"], "no checkpoint of step 7: there are 1, 2, 3"),
        ([str(config.run_dir), "--out", str(tmp_path)], "exists"),
        ([str(tmp_path)], "is no run"),
    ):
        assert main(["export", *given]) == 2
        assert said in capsys.readouterr().err
