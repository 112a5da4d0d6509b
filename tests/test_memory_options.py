"""Settings that save memory: encoders that wait off the device, a quantised base, and what the doctor says of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from faults import tiny_run
from safetensors.torch import load_file
from torch import Tensor

from diffusionrl import TrainConfig, UserError, diagnose, load_policy, train
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
from diffusionrl.doctor import resources
from diffusionrl.doctor.costs import Cost
from diffusionrl.policies import check_quantization, load_pipeline, make_policy, put_export, quantization
from diffusionrl.policies.encoders import WaitingEncoders, encoders_of
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.policies.quantization import is_quantized
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy
from diffusionrl.runs.checkpoint import complete_steps
from diffusionrl.runs.folder import read_metrics

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
SAMPLING = SamplingConfig(num_steps=3, guidance=3.0, sampler="cps", eta=0.7, batch_size=2)


def sampling_of(name: str) -> SamplingConfig:
    if name == "sd1":
        return SAMPLING
    call = {key: value for key, value in tiny.call_of(name).items() if key not in tiny.SIZE}
    return replace(SAMPLING, call=tuple(f"{key}={json.dumps(value)}" for key, value in call.items()), **tiny.SIZE)


def prediction(policy: Any, guidance: float = 3.0) -> Tensor:
    levels = policy.grid(3).levels[torch.tensor([2, 2])]
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return torch.stack(policy.denoise(x, levels, PROMPTS, guidance))


# Encoders


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux2_klein"])
def test_text_encoders_are_on_the_device_only_while_prompts_are_embedded(name: str) -> None:
    """The CPU by its other name is the device; Stable Diffusion takes its own road."""
    pipeline, places = tiny.build(name), {}
    embedded, denoised, moves = [], [], []
    for key, encoder in encoders_of(pipeline.components).items():

        def move(place: Any, key: str = key, to: Callable[[Any], Any] = encoder.to) -> Any:
            moves.append(key)
            places[key] = str(place)
            return to(place)

        encoder.to = move  # type: ignore[method-assign,assignment]
        encoder.register_forward_pre_hook(lambda encoder, given, key=key: embedded.append(places[key]))
    network = pipeline.components["unet" if name == "sd1" else "transformer"]
    network.register_forward_pre_hook(lambda network, given: denoised.extend(places.values()))
    policy = make_policy(pipeline, sampling_of(name), device="cpu:0", offload_text_encoders=True)
    assert isinstance(policy, StableDiffusionPolicy) == (name == "sd1")
    found = [prediction(policy, 3.0), prediction(policy, 2.0)]
    assert len(embedded) >= 3 and set(embedded) == {"cpu:0"}, "the example or the empty prompt, a cat, and a dog"
    assert len(denoised) >= 2 and set(denoised) == {"cpu"} == set(places.values())
    known = len(embedded), len(moves)
    prediction(policy)
    assert (len(embedded), len(moves)) == known, "what is known is not embedded again"
    plain = make_policy(tiny.build(name), sampling_of(name))
    assert torch.equal(found[0], prediction(plain, 3.0)) and torch.equal(found[1], prediction(plain, 2.0))


def test_encoders_come_once_for_many_prompts_and_stay_where_they_are_called_otherwise() -> None:
    places: dict[str, list[str]] = {"text": [], "image": []}
    encoders = {name: torch.nn.Linear(1, 1) for name in places}
    for name, encoder in encoders.items():
        encoder.to = lambda place, name=name, to=encoder.to: (places[name].append(str(place)), to(place))[1]  # type: ignore
    waiting = WaitingEncoders(encoders, torch.device("cpu:0"))
    with waiting.together():
        for _ in range(3):
            with waiting.needed():
                encoders["text"](torch.ones(1))
    assert places == {"text": ["cpu", "cpu:0", "cpu"], "image": ["cpu", "cpu:0", "cpu"]}
    encoders["image"](torch.ones(1))
    with waiting.needed():
        pass
    assert places["image"] == ["cpu", "cpu:0", "cpu", "cpu:0"] and places["text"][3:] == ["cpu:0", "cpu"]


# A quantised base


@pytest.fixture
def installed(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The format, where its package is there; bitsandbytes runs on the CPU, where diffusers does not let it."""
    package = quantization.PACKAGES[request.param]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'diffusionrl[{request.param}]'")
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})
    return str(request.param)


every_format = pytest.mark.parametrize("installed", ["int8", "nf4"], indirect=True)
int8 = pytest.mark.parametrize("installed", ["int8"], indirect=True)


@every_format
@pytest.mark.parametrize(("name", "dtype"), [("sd1", "bfloat16"), ("sd3", "float32")])
def test_a_lora_on_a_quantised_base(name: str, dtype: str, installed: str, tmp_path: Path) -> None:
    """Stable Diffusion takes the general road; the base is close to what it was; the LoRA is float32 and learns everywhere."""
    tiny.build(name).save_pretrained(tmp_path)
    settings = {"dtype": getattr(torch, dtype)}
    pipeline = load_pipeline(str(tmp_path), settings["dtype"], quantization=installed)
    quantised = {key for key, part in pipeline.components.items() if is_quantized(part)}
    assert quantised == {"unet" if name == "sd1" else "transformer"}
    policy = make_policy(pipeline, sampling_of(name), **settings)
    assert isinstance(policy, PipelinePolicy)
    exact = prediction(PipelinePolicy(tiny.build(name), steps=3, guidance=3.0, arguments=sampling_of(name).arguments))
    base = prediction(policy)
    gap = (base - exact).abs().mean() / exact.abs().mean()
    assert 0 < gap < {"int8": 0.01, "nf4": 0.1}[installed] + (dtype == "bfloat16") * 0.03
    assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
    for index, (key, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in key:
            weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    moved = prediction(policy)
    moved.square().mean().backward()
    assert not [key for key, weight in policy.trainable().items() if weight.grad is None or not weight.grad.any()]
    with policy.reference():
        assert torch.equal(prediction(policy), base) and not torch.equal(moved, base)


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.flatten(1).mean(1)


def config_of(model: Path, run_dir: Path, **policy: Any) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        run_dir=run_dir,
        steps=2,
        prompts_per_step=2,
        samples_per_prompt=2,
        sampling=sampling_of("sd3"),
        policy=PolicyConfig(**policy),
        algorithm=DDPOConfig(updates_per_step=1, clip_range=1e3, normalisation="batch"),
        optimizer=OptimizerConfig(learning_rate=5e-2),
        evaluation=EvaluationConfig(every=0, num_samples=2, embeddings=CLIPScoreConfig(model="none")),
        checkpoint=CheckpointConfig(every=1),
    )


@int8
def test_a_run_on_a_quantised_base_resumes_and_its_lora_is_for_the_plain_model(installed: str, tmp_path: Path) -> None:
    model, straight, resumed = (tmp_path / name for name in ("model", "straight", "resumed"))
    tiny.build("sd3").save_pretrained(model)
    config, prompts = config_of(model, straight, quantization=installed), [prompt.text for prompt in PROMPTS]
    train(config, reward=brightness, prompts=prompts)
    shutil.copytree(straight, resumed)
    for left in ("checkpoints/step_000002", "export"):
        shutil.rmtree(resumed / left)
    (resumed / "finished.json").unlink()
    train(replace(config, run_dir=resumed), reward=brightness, prompts=prompts)
    files = [folder / "export" / "pytorch_lora_weights.safetensors" for folder in (straight, resumed)]
    first, second = map(load_file, files)
    assert all(torch.equal(weight, second[key]) for key, weight in first.items()) and len(first) == len(second) > 0
    learned = make_policy(load_pipeline(str(model), quantization=installed), sampling_of("sd3"), lora=files[0])
    plain = load_pipeline(str(model))
    base = prediction(make_policy(load_pipeline(str(model)), sampling_of("sd3"), lora_rank=None))
    put_export(plain, files[0].parent, "the run")
    exported = prediction(make_policy(plain, sampling_of("sd3"), lora_rank=None))
    change = (exported - base).abs().mean()
    assert change > 1e-3, "something was learned"
    assert (prediction(learned) - exported).abs().mean() < 0.1 * change


@int8
def test_the_doctor_tries_a_quantised_base(installed: str, tmp_path: Path) -> None:
    """Its export too, on the same base: all is well."""
    tiny.build("sd3").save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model", tmp_path / "run", quantization=installed, offload_text_encoders=True)
    found = list(diagnose(config, reward=brightness, prompts=["a cat", "a dog"]))
    passed = {each.check for each in found if each.verdict == "pass"}
    assert {"ratio", "gradient", "export", "memory"} <= passed, found


def test_a_quantised_base_is_refused_where_it_cannot_be(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"needs policy\.quantization none"):
        PolicyConfig(training="full", quantization="int8")
    monkeypatch.setattr(quantization, "find_spec", lambda package: None)
    run = ["train", "--model", str(tiny_folder), "--policy.quantization", "int8", "--run-dir", str(tmp_path / "run")]
    assert main(run) == 2
    assert "needs torchao: pip install 'diffusionrl[int8]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(quantization, "find_spec", lambda package: object())
    with pytest.raises(UserError, match="needs a GPU"):
        load_policy(str(tiny_folder), quantization="nf4", device="cpu")
    check_quantization("int8", "cpu")
    check_quantization("nf4", "cuda")


# What the doctor says


def test_the_doctor_says_what_would_save_memory() -> None:
    """Each option that is off and would help where the peak is, and how much; none that is on, or cannot be."""
    policy: Any = make_policy(tiny.build("sd3"), sampling_of("sd3"))
    parts = policy.pipeline.components
    policy.device = torch.device("cuda")  # nothing is computed
    encoders = sum(weight.nbytes for part in encoders_of(parts).values() for weight in part.parameters())
    costs = resources.Costs(*[Cost((0.0, 0.1), (2e6, slope), 8) for slope in (1e5, 5e5, 3e5)])

    def options(when: str, embedding: float = 0.0, **settings: Any) -> list[str]:
        trainer: Any = SimpleNamespace(policy=policy, config=TrainConfig(policy=PolicyConfig(**settings)))
        return resources._savings(trainer, costs, 6e6, when, embedding, 8)

    told = options("updates")
    assert [option.split(" (")[0] for option in told] == [
        "--policy.offload-text-encoders",
        "--policy.quantization nf4",
        "--policy.gradient-checkpointing",
    ]
    assert f"(some {encoders / 1e9:.2g} GB)" in told[0]
    assert not [each for each in options("updates", embedding=6e6) if "encoders" in each], "they are the peak, off or on"
    # Sampling peaks at decoding 8, 2e6 + 8 * 5e5 bytes; one by one, at denoising 8, 2e6 + 8 * 1e5.
    assert "--policy.vae-slicing (some 0.0032 GB)" in options("sampling")
    chosen = {"offload_text_encoders": True, "quantization": "nf4", "gradient_checkpointing": True, "vae_slicing": True}
    assert options("updates", **chosen) == options("sampling", **chosen) == []
    policy.device = torch.device("cpu")
    assert options("updates")[0].startswith("--policy.quantization int8")
    assert options("updates", training="full")[0].startswith("--policy.training lora")


# Too little of it


def test_a_run_that_is_out_of_memory_says_what_to_change_and_goes_on_with_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny_run(tiny_folder, tmp_path / "run"), "--algorithm.micro-batch-size", "6"]
    decode = StableDiffusionPolicy.decode

    def decode_some(policy: StableDiffusionPolicy, latents: Tensor, *more: Any) -> Tensor:
        if len(latents) > 2 and len(read_metrics(tmp_path / "run")) > 2:  # in the third step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(policy, latents, *more)

    monkeypatch.setattr(StableDiffusionPolicy, "decode", decode_some)
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "Tried to allocate" in said and "diffusionrl doctor" in said
    changes = (
        "--sampling.batch-size 2 --algorithm.micro-batch-size 3 --policy.gradient-checkpointing --checkpoint.allow-changes"
    )
    assert changes in said
    assert complete_steps(tmp_path / "run") == [2]
    assert main([*options, *changes.split()]) == 0
    assert complete_steps(tmp_path / "run")[-1] == 6
