"""A model folder is whole, understood and sound, or it is refused in one message, before anything slow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffusionrl import load_policy
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies import StableDiffusionPolicy, load_trained
from diffusionrl.policies.loading import make_policy
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.policies.stable_diffusion import understood
from diffusionrl.sampling.rollout import make_table, sample_trajectories

FEW = SamplingConfig(num_steps=2)
NO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ASKED = ["class_embed_type", "addition_embed_type", "time_cond_proj_dim"]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_sound_folder_takes_the_fast_road(folder: Path) -> None:
    assert isinstance(load_policy(str(folder), device="cpu", sampling=FEW), StableDiffusionPolicy)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("unet/config.json", {"sample_size": [4, 4]}),
        ("unet/config.json", {"sample_size": [4, 6]}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("scheduler/scheduler_config.json", {"thresholding": True}),
    ],
)
def test_what_the_fast_road_does_not_follow_is_asked_of_the_pipeline(folder: Path, file: str, settings: Any) -> None:
    change(folder, file, **settings)
    if "_class_name" in settings:
        change(folder, "model_index.json", scheduler=["diffusers", settings["_class_name"]])
    policy = load_policy(str(folder), device="cpu", sampling=FEW)
    assert isinstance(policy, PipelinePolicy)
    if settings.get("sample_size") == [4, 6]:
        assert policy.sample_shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "its steps are none of a flow"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "zero terminal SNR",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 64}, "fails when it is asked"),
        ("unet/config.json", {"num_class_embeds": 3}, "class_labels|lacks weights|has no place"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_message(folder: Path, file: str, settings: Any, said: str) -> None:
    change(folder, file, **settings)
    with pytest.raises(UserError, match=said):
        load_policy(str(folder), device="cpu", sampling=FEW)


def test_weights_that_are_not_finite_are_named_by_part(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="weights of unet are not finite"):
        load_policy(str(folder), device="cpu", sampling=FEW)


def test_a_tokenizer_without_its_vocabulary_is_found_out(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"whatever the prompt|could not be loaded|fails when it is asked"):
        load_policy(str(folder), device="cpu", sampling=FEW)


def test_words_that_the_text_encoder_has_not_are_named(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<mycat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    for load in (load_policy, load_trained):
        with pytest.raises(UserError, match=r"its text encoder knows .*: <mycat> would be none"):
            load(str(folder))


def test_parts_that_do_not_fit_are_one_message_in_every_command(folder: Path) -> None:
    """Found while a policy is made, before it can be asked; of a model as it is, and of one that was trained."""
    change(folder, "model_index.json", _class_name="StableDiffusionXLPipeline")
    for load in (load_policy, load_trained):
        with pytest.raises(UserError, match="was loaded, and fails when it is asked: AttributeError"):
            load(str(folder))


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"convert_to_safetensors.py diffusion_pytorch_model.bin diffusion_pytorch_model.safe"):
        load_policy(str(folder))


def test_a_live_pipeline_with_adapters_or_fused_projections_is_refused(
    load_tiny: Callable[..., StableDiffusionPipeline],
) -> None:
    from peft import LoraConfig

    pipeline = load_tiny()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="unet has an adapter \\(default\\)"):
        make_policy(pipeline)
    fused = load_tiny()
    fused.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        make_policy(fused)


PLAIN_UNET = {"in_channels": 4, "out_channels": 4, "sample_size": 64}
PLAIN_VAE = {"latent_channels": 4, "block_out_channels": [1, 2, 3, 4]}


@given(
    st.dictionaries(
        st.sampled_from(["class_embed_type", "addition_embed_type", "time_cond_proj_dim"]), st.just("x"), min_size=1
    )
)
def test_no_setting_that_changes_what_is_asked_is_passed_over(extra: dict[str, str]) -> None:
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
    assert understood(PLAIN_UNET, PLAIN_VAE, scheduler) == (3, 512, 512)
    assert understood(PLAIN_UNET | extra, PLAIN_VAE, scheduler) is None


@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_damaged_file_is_one_message_or_no_harm(tiny_folder: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Cut, emptied, or with one byte changed: a policy that gives finite numbers, or a UserError; never another error."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("damaged") / "model"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "empty", "flip"]))
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "flip" and content:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes({"cut": content[:place], "empty": b"", "flip": bytes(content)}[kind])
    try:
        policy = load_policy(str(folder), device="cpu", sampling=FEW)
    except UserError:
        return
    assert policy.decode(torch.zeros(1, *policy.latent_shape), []).isfinite().all()


CONFIGURATIONS = (
    *("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
    *("tokenizer/tokenizer_config.json", "unet/config.json", "vae/config.json"),
)
WORDS = (
    "linear",
    "squaredcos_cap_v2",
    "trailing",
    "linspace",
    "v_prediction",
    "sample",
    "gelu",
    "DDPMScheduler",
    "UNet2DModel",
    "",
)


def other_than(value: Any) -> st.SearchStrategy[Any]:
    """What somebody may have put in its place."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from([0, 1, 2, 3, -1, value + 1, 2 * value, value / 2, None, str(value), [value]])
    if isinstance(value, str):
        return st.sampled_from([*WORDS, None, 3])
    if isinstance(value, list):
        return st.sampled_from([[], value[:-1], [*value, *value], value[::-1], None, "x"])
    return st.sampled_from([0, 1, 0.5, True, "x", [1], {}])


@torch.no_grad()
def drawn_by(policy: StableDiffusionPolicy, start: torch.Tensor) -> torch.Tensor:
    sampling = SamplingConfig(num_steps=2, sampler="ode", eta=0.0)
    drawn = sample_trajectories(policy, make_table(policy, sampling), [Prompt("a cat")], start, torch.zeros(1, 2), 3.0)
    return policy.decode(drawn.latents[:, -1])


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_configuration_with_one_field_changed_is_followed_or_refused(
    tiny_folder: Path, tmp_path_factory: Any, data: st.DataObject
) -> None:
    """What loads by the fast road draws what the pipeline itself draws; nothing ends in another error than ours."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("changed") / "model"))
    file = folder / data.draw(st.sampled_from(CONFIGURATIONS))
    content = json.loads(file.read_text())
    known = sorted({*content, *(["num_class_embeds", "thresholding"] if file.parent != folder else ["feature_extractor"])})
    key = data.draw(st.sampled_from(known))
    if data.draw(st.booleans()) and key in content:
        del content[key]
    else:
        content[key] = data.draw(other_than(content.get(key)))
    file.write_text(json.dumps(content))
    try:
        policy = load_policy(str(folder), device="cpu", sampling=FEW)
    except UserError:
        return
    finally:
        kept = {path.relative_to(folder): path for path in folder.rglob("*.safetensors")}
        assert len(kept) == 3, "nothing was written"
    if isinstance(policy, StableDiffusionPolicy):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        start = policy.start([Prompt("a cat")], [0])
        given = {"latents": start, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
        torch.testing.assert_close(drawn_by(policy, start), pipeline("a cat", **given).images, rtol=1e-3, atol=1e-3)
    shutil.rmtree(folder)
