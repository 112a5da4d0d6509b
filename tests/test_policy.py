"""A policy is the pipeline: same images, same weights at home, and a sample that does not care about its batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionrl import seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.data.images import to_pil
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies import StableDiffusionPolicy, check_model, load_policy
from diffusionrl.policies.stable_diffusion import check_pipeline_folder
from diffusionrl.sampling.rollout import denoise_step, draw_noise, make_table, sample_trajectories

PROMPTS = ["a cat", "a dog and an apple"]


def sample(policy: StableDiffusionPolicy, indices: list[int], prompts: list[str], **settings: object) -> torch.Tensor:
    """Images, (B, 3, H, W), on fixed noise."""
    sampling = SamplingConfig(**({"num_steps": 5, "guidance": 3.0, "eta": 1.0} | settings))  # type: ignore[arg-type]
    table = make_table(policy, sampling)
    asked = [Prompt(prompt) for prompt in prompts]
    start, noise = draw_noise(policy, table, asked, 0, "test", 0, indices)
    drawn = sample_trajectories(policy, table, asked, start, noise, sampling.guidance)
    return policy.decode(drawn.latents[:, -1], asked)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_is_that_of_the_pipeline(make_policy, prediction: str, guidance: float) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy({"prediction_type": prediction}, lora_rank=None)
    ours = sample(policy, [0, 1], PROMPTS, guidance=guidance, sampler="ode", eta=0.0)
    start = seeds.normal(0, "test", 0, [0, 1], (6, *policy.latent_shape))[:, 0]
    theirs = policy.pipeline(PROMPTS, latents=start, num_inference_steps=5, guidance_scale=guidance, output_type="pt").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_export_draws_the_same_image_in_plain_diffusers(make_policy, load_tiny, tmp_path: Path, targets: str) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_targets=targets)
    policy.export(tmp_path)
    plain = load_tiny()
    plain.load_lora_weights(tmp_path)
    ours = sample(policy, [0, 1], PROMPTS, sampler="ode", eta=0.0)
    start = seeds.normal(0, "test", 0, [0, 1], (6, *policy.latent_shape))[:, 0]
    settings = {"latents": start, "num_inference_steps": 5, "guidance_scale": 3.0}
    theirs = plain(PROMPTS, **settings).images
    without = load_tiny()(PROMPTS, **settings).images
    for image, plain_image, base in zip(ours, theirs, without, strict=True):
        gap = np.abs(np.array(to_pil(image), dtype=int) - np.array(plain_image, dtype=int))
        assert gap.max() <= 1 and gap.mean() < 1e-3  # layer by layer instead of merged: a rounding goes the other way
        assert base.tobytes() != plain_image.tobytes(), "the adapter must matter, or this test shows nothing"


def test_full_export_loads_in_plain_diffusers(make_policy, load_tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_rank=None)
    next(iter(policy.trainable().values())).data.add_(0.1)
    policy.export(tmp_path)
    plain = load_tiny()
    plain.unet = type(plain.unet).from_pretrained(tmp_path / "unet")
    assert torch.equal(sample(policy, [0], ["a cat"]), sample(StableDiffusionPolicy(plain, lora_rank=None), [0], ["a cat"]))


def test_one_sample_is_the_same_in_any_batch(make_policy) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    together = sample(policy, [3, 4, 5], ["a cat", "a dog", "an ant"])
    for row, (index, prompt) in enumerate([(3, "a cat"), (4, "a dog"), (5, "an ant")]):
        torch.testing.assert_close(sample(policy, [index], [prompt])[0], together[row], rtol=0, atol=1e-5)


def test_adapter_in_weight_space_is_pefts_adapter(make_policy) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_targets="all")
    merged = sample(policy, [0], ["a cat"])
    policy._weight_space = False
    policy.unet.enable_adapters()
    torch.testing.assert_close(sample(policy, [0], ["a cat"]), merged, rtol=0, atol=1e-5)


def test_reference_is_the_model_before_training(make_policy, load_tiny) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    base = StableDiffusionPolicy(load_tiny(), lora_rank=None)
    with policy.reference():
        reference = sample(policy, [0], ["a cat"])
    assert torch.equal(reference, sample(base, [0], ["a cat"]))
    assert not torch.equal(reference, sample(policy, [0], ["a cat"]))
    with pytest.raises(UserError, match="full fine-tuning"), base.reference():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_within_the_reference_leaves_the_policy_whole(make_policy, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(dtype=dtype)
    before = sample(policy, [0], ["a cat"])
    with pytest.raises(KeyboardInterrupt), policy.reference():
        raise KeyboardInterrupt
    assert torch.equal(sample(policy, [0], ["a cat"]), before)


def test_new_adapter_changes_nothing_and_depends_on_the_seed_alone(load_tiny) -> None:  # type: ignore[no-untyped-def]
    state = torch.get_rng_state()
    first, second, other = (StableDiffusionPolicy(load_tiny(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    weights = [torch.cat([w.detach().flatten() for w in policy.trainable().values()]) for policy in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(
        sample(first, [0], ["a cat"]), sample(StableDiffusionPolicy(load_tiny(), lora_rank=None), [0], ["a cat"])
    )


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_gradient_reaches_every_adapter_weight(make_policy, targets: str) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_targets=targets)
    table = make_table(policy, SamplingConfig(num_steps=4))
    x = seeds.normal(0, "test", 0, [0], policy.latent_shape)
    mean, _ = denoise_step(policy, table, x, torch.tensor([1]), [Prompt("a cat")], 3.0)
    mean.square().sum().backward()
    for name, weight in policy.trainable().items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_bfloat16_network_keeps_float32_around_it(make_policy) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(dtype=torch.bfloat16)
    assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
    images = sample(policy, [0], ["a cat"])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, sample(make_policy(), [0], ["a cat"]), rtol=0, atol=0.1)
    with pytest.raises(UserError, match="float32"):
        make_policy(dtype=torch.bfloat16, lora_rank=None)


def test_a_prompt_that_is_cut_short_is_named(make_policy) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(UserWarning, match=r"reads 16 of the \d+ tokens of the prompt 'a cat and a cat"):
        make_policy().embed(["a cat " + "and a cat " * 10])


def test_the_shape_of_a_folder_is_told_without_its_weights(tiny_folder: Path, tmp_path: Path) -> None:
    assert check_pipeline_folder(tiny_folder) == (3, 32, 32)
    with pytest.raises(UserError, match=r"no complete diffusers pipeline: unet/config\.json"):
        check_pipeline_folder(tmp_path)
    with pytest.raises(UserError, match="was not found"):
        load_policy(str(tmp_path / "nowhere"))


def test_models_of_the_hub_are_checked_by_their_settings_alone(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, revision: None, filename: str, local_files_only: bool = False) -> str:
        if local_files_only or repository == "owner/gone":
            raise OSError("offline")
        asked.append(filename)
        return str(tiny_folder / filename)

    monkeypatch.setattr("diffusionrl.policies.files.hf_hub_download", download)
    monkeypatch.setattr("diffusionrl.runs.hub._reach_hub", lambda: None)
    assert check_model("owner/tiny") == (3, 32, 32)
    assert sorted(asked) == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
    with pytest.raises(UserError, match="hub did not give it: offline"):
        check_model("owner/gone")


def test_only_so_many_embeddings_are_remembered(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """There may be millions of prompts; one that is forgotten is embedded again, to the bit."""
    monkeypatch.setattr("diffusionrl.policies.stable_diffusion._REMEMBERED", 2)
    policy, texts = make_policy(), ["a cat", "a dog", "an ant", "a cat"]
    found = policy.embed(texts)
    assert found.shape[0] == 4 and torch.equal(found[0], found[3])
    assert list(policy._embeddings) == ["a dog", "an ant"]
    assert torch.equal(policy.embed(texts), found)
