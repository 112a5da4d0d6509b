"""Any pipeline as a policy, held against the pipeline's own call: grid, samples, gradient, export, resume."""

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep
from torch import Tensor

from diffusionrl import TrainConfig, seeds
from diffusionrl.algorithms import make_algorithm
from diffusionrl.config import DDPOConfig, OptimizerConfig, SamplingConfig
from diffusionrl.data.media import open_image
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies import load_pipeline, put_export
from diffusionrl.policies.memory import bytes_in
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.runs import checkpoint
from diffusionrl.sampling.rollout import denoise_step, draw_noise, sample_trajectories
from diffusionrl.training.trainer import Trainer
from diffusionrl.transitions import SamplerTable, cps, ddim, log_density, ode

STEPS, GUIDANCE = 3, 4.0
EVEN = 4  # steps that divide the schedules, which round otherwise


def prompts_for(name: str) -> list[Prompt]:
    return [Prompt(text, media=media) for text, media in zip(("a cat", "a dog"), tiny.examples(name), strict=True)]


def policy_of(name: str, **settings: Any) -> PipelinePolicy:
    arguments = {"steps": STEPS, "guidance": GUIDANCE, "arguments": tiny.call_of(name), **settings}
    return PipelinePolicy(tiny.build(name), prompts_for(name)[0], **arguments)


@functools.cache
def _made_once(name: str) -> tuple[PipelinePolicy, dict[str, Tensor]]:
    policy = policy_of(name)
    return policy, {key: weight.detach().clone() for key, weight in policy.trainable().items()}


def shared(name: str) -> PipelinePolicy:
    """Made once for all tests; its adapter, which is all that they change, as it began."""
    policy, began = _made_once(name)
    for key, weight in policy.trainable().items():
        weight.data.copy_(began[key])
        weight.grad = None
    return policy


def move_adapter(policy: PipelinePolicy, std: float = 0.1) -> None:
    """Off zero, so that it matters."""
    for index, (key, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in key:
            weight.data.normal_(std=std, generator=torch.Generator().manual_seed(index))


def plain_call(pipeline: Any, name: str, prompt: Prompt, draw: int, **more: Any) -> Tensor:
    """The pipeline's own samples."""
    call = {"prompt": prompt.text, "num_inference_steps": STEPS, "output_type": "pt", "return_dict": False}
    call |= {"guidance_scale": GUIDANCE, "generator": torch.Generator().manual_seed(draw), **tiny.call_of(name), **prompt.media}
    if name == "qwen_image":
        call |= {"true_cfg_scale": call.pop("guidance_scale"), "negative_prompt": " "}
    with torch.no_grad():
        return torch.as_tensor(pipeline(**call | more)[0])


def trajectories(policy: PipelinePolicy, table: SamplerTable, prompts: list[Prompt]) -> Any:
    start, noise = draw_noise(policy, table, prompts, 0, "test", 0, range(len(prompts)))
    return sample_trajectories(policy, table, prompts, start, noise, GUIDANCE)


@pytest.fixture(autouse=True)
def conditions_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline draws some conditions from the VAE's posterior, at another moment than the policy has it draw them."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(
        scheduling_cosine_dpmsolver_multistep, "BrownianTreeNoiseSampler", lambda *_, **__: lambda *_: torch.zeros(())
    )


def draw_own(policy: PipelinePolicy, name: str, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Latents and samples by our table."""
    # Stable Audio's scheduler is stochastic; with its draws at 0, a step of it is DDIM at eta 1.
    table = ddim(policy.grid(STEPS), 1.0) if name == "stable_audio" else ode(policy.grid(STEPS))
    start, noise = draw_noise(policy, table, prompts, 0, "test", 0, range(len(prompts)))
    if name == "inpaint4":  # which noises the known part as the start was, here by the prompt's own draws
        start = policy.asked.start(prompts, condition_draws(prompts), GUIDANCE)
    latents = sample_trajectories(policy, table, prompts, start, 0 * noise, GUIDANCE).latents
    return latents, policy.decode(latents[:, -1], prompts)


def draw_plain(pipeline: Any, name: str, prompts: list[Prompt]) -> Tensor:
    """The pipeline's own samples, from the same latents."""
    if name == "sd1":  # PNDM is of higher order: the pipeline's own call is that of DDIM on its grid
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    draws = [seeds.address(seeds.address(0, "test", 0, i), "start") for i in range(len(prompts))]
    draws = condition_draws(prompts) if name == "inpaint4" else draws
    return torch.cat([plain_call(pipeline, name, prompt, draw) for prompt, draw in zip(prompts, draws, strict=True)])


def condition_draws(prompts: list[Prompt]) -> list[int]:
    return [seeds.address(0, f"condition/{prompt.key}") for prompt in prompts]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_pipeline_is_asked_and_answers_as_its_own_call_does(name: str) -> None:
    """Sampling by our table and decoding are the pipeline's own, whatever it does beside."""
    prompts, policy, plain = prompts_for(name), shared(name), tiny.build(name)
    latents, ours = draw_own(policy, name, prompts)
    theirs = draw_plain(plain, name, prompts)
    if name == "sd1":  # whose grid it is, though not whose steps
        assert torch.equal(plain.scheduler.timesteps.float(), policy.grid(STEPS).timesteps)
    assert theirs.std() > 0.03, "or there is nothing to see"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.shape[1:] == policy.sample_shape and latents.shape[2:] == policy.latent_shape
    assert policy.edits == (name == "inpaint4")
    check_grid(policy)


def check_grid(policy: PipelinePolicy) -> None:
    """It is the scheduler's, or what the loop takes of it."""
    grid, native = policy.grid(EVEN), policy.asked.native
    count = len(grid)
    assert 1 <= count <= EVEN and (grid.sigma[1:] < grid.sigma[:-1]).all()
    torch.testing.assert_close(grid.alpha[1:], grid.alpha_next[:-1], rtol=0, atol=1e-6)
    if policy.asked.listener.schedule.kind == "flow":
        torch.testing.assert_close(grid.alpha, 1 - grid.sigma)
    else:
        torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(count))
    assert torch.equal(grid.timesteps, torch.unique_consecutive(native.timesteps).float()[-count:])
    assert len(policy.noise_levels) >= 100


@pytest.mark.parametrize("name", tiny.NAMES)
def test_ratio_gradient_and_reference(name: str) -> None:
    """Before the first update the ratio is 1 exactly where the update is cut as the rollout was; the gradient reaches every
    tensor of the adapter; without it, the policy is what it was, and a replay is equal to the bit."""
    prompts, policy = prompts_for(name), shared(name)
    table = cps(policy.grid(STEPS), 0.7)
    before = trajectories(policy, table, prompts)
    move_adapter(policy)
    drawn = trajectories(policy, table, prompts)
    assert not torch.equal(drawn.latents, before.latents), "the adapter must matter"
    with policy.reference():
        assert torch.equal(trajectories(policy, table, prompts).latents, before.latents)
    row = int((table.fresh > 0).nonzero()[0])
    rows = torch.full((2,), row)
    samples = torch.arange(2)
    mean, std = denoise_step(policy, table, drawn.latents[:, row], rows, prompts, GUIDANCE)
    following = drawn.latents[samples, rows + 1] if drawn.steps is None else drawn.steps[samples, rows]
    assert torch.equal(log_density(following, mean, std), drawn.log_probs[:, row])
    # At times of their own, in one call or in several, samples are what they are alone.
    apart = torch.tensor([0, len(table) - 1])
    together, _ = denoise_step(policy, table, drawn.latents[samples, apart], apart, prompts, GUIDANCE)
    for i in range(2):
        alone, _ = denoise_step(
            policy, table, drawn.latents[i : i + 1, apart[i]], apart[i : i + 1], prompts[i : i + 1], GUIDANCE
        )
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-4)
    (mean.square().mean() + together.square().mean()).backward()
    missed = [key for key, weight in policy.trainable().items() if weight.grad is None or not weight.grad.any()]
    assert not missed


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.flatten(1).mean(1)


CONFIG = TrainConfig(
    prompts_per_step=2,
    sampling=SamplingConfig(num_steps=STEPS, guidance=GUIDANCE, sampler="cps", eta=0.7, batch_size=2),
    algorithm=DDPOConfig(updates_per_step=1, clip_range=1e3, normalisation="batch", train_fraction=0.4),
    optimizer=OptimizerConfig(learning_rate=1e-2),
)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_step_is_the_same_after_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Whole runs that were killed are in test_any_model.py."""
    prompts, straight, resumed = prompts_for(name)[:1], shared(name), policy_of(name)
    trainers = [Trainer(each, brightness, prompts, make_algorithm(CONFIG), CONFIG) for each in (straight, resumed)]
    trainers[0].step(1)
    checkpoint.save(tmp_path, trainers[0].state.capture(1))
    trainers[1].state.restore(checkpoint.load(checkpoint.folder_of(tmp_path, 1)))
    for trainer in trainers:
        trainer.step(2)
    weights = straight.trainable()
    assert all(torch.equal(weight, weights[key]) for key, weight in resumed.trainable().items())
    assert any(weight.any() for key, weight in weights.items() if "lora_B" in key), "something was learned"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_export_draws_the_same(name: str, tmp_path: Path) -> None:
    """Loaded in a fresh pipeline, by its own call."""
    prompts, policy, plain = prompts_for(name)[:1], shared(name), tiny.build(name)
    before = draw_own(policy, name, prompts)[1]
    move_adapter(policy, 1.0)
    policy.export(tmp_path)
    put_export(plain, tmp_path, name)
    ours, theirs = draw_own(policy, name, prompts)[1], draw_plain(plain, name, prompts)
    learned = (ours - before).abs().max()
    assert learned > 1e-4, "the adapter must matter"
    assert (ours - theirs).abs().max() < 0.02 * learned


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "wan"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    prompts, found = prompts_for(name), []
    for policy in (shared(name), policy_of(name, gradient_checkpointing=True)):
        move_adapter(policy)
        table = cps(policy.grid(STEPS), 0.7)
        start = policy.start(prompts, [0, 1])
        denoise_step(policy, table, start, torch.tensor([0, 0]), prompts, GUIDANCE)[0].square().mean().backward()
        found.append({key: weight.grad for key, weight in policy.trainable().items()})
    for key, gradient in found[0].items():
        assert gradient is not None and found[1][key] is not None
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["inpaint4", "inpaint9", "sd1_img2img"])
def test_conditions_do_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn for a condition is the prompt's, whatever samples were drawn before and beside."""
    monkeypatch.undo()  # conditions are drawn
    prompts, policy = prompts_for(name), policy_of(name)
    table = cps(policy.grid(STEPS), 0.7)
    together = trajectories(policy, table, prompts).latents
    policy.start(prompts[1:], [13])
    for i in range(2):
        start, noise = draw_noise(policy, table, prompts[i : i + 1], 0, "test", 0, [i])
        alone = sample_trajectories(policy, table, prompts[i : i + 1], start, noise, GUIDANCE).latents
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_one_step_and_other_guidance() -> None:
    """A loop of one step is asked too; and what is kept of a prompt is kept for each way of asking."""
    assert policy_of("sd3", steps=1).networks == ["transformer"]
    policy, prompts = policy_of("z_image", guidance=0.0), prompts_for("z_image")
    levels = policy.grid(STEPS).levels[torch.tensor([1, 1])]
    x = policy.start(prompts, [0, 1])
    for guidance in (1.0, 0.0, 1.0):
        together = policy.denoise(x, levels, prompts, guidance)[0]
        for i in range(2):
            alone = policy.denoise(x[i : i + 1], levels[torch.tensor([i])], prompts[i : i + 1], guidance)[0]
            torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_that_nothing_takes() -> None:
    with pytest.raises(UserError, match="has no guidance that leads away"):
        policy_of("flux", negative_prompt="ugly")


@pytest.mark.parametrize(("name", "plain"), [("sdxl", 1.0), ("wan", 1.0), ("sana", 1.0), ("z_image", 0.0), ("flux", 3.0)])
def test_without_guidance(name: str, plain: float) -> None:
    """Where guidance is embedded there is no without: then it stays as it was in sampling."""
    policy = PipelinePolicy(tiny.build(name), None, 2, 3.0, tiny.call_of(name))
    x, levels = policy.start([policy.example], [0]), policy.grid(2).levels[:1]
    with torch.no_grad():
        alone, guided = (policy.denoise(x, levels, [policy.example], each)[0] for each in (None, 3.0))
        assert torch.equal(alone, policy.denoise(x, levels, [policy.example], plain)[0])
    assert torch.equal(alone, guided) == (plain == 3.0)


def test_what_is_kept_of_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and in bytes; what was dropped is made again, and is the same."""
    policy = policy_of("sd3")
    texts = [Prompt(text) for text in ("a cat", "a dog", "an owl", "a fox")]
    x, levels = policy.start([policy.example], [0]), policy.grid(STEPS).levels[:1]
    with torch.no_grad():
        first = [policy.denoise(x, levels, [prompt], GUIDANCE)[0] for prompt in texts]
        kept = policy.asked._kept
        size = bytes_in(kept["a fox"])
        assert len(kept) == 4 and size > 0
        monkeypatch.setattr("diffusionrl.policies.asking.REMEMBERED_BYTES", 2 * size)
        again = [policy.denoise(x, levels, [prompt], GUIDANCE)[0] for prompt in texts]
    assert list(kept) == ["an owl", "a fox"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in tiny.NAMES if tiny.examples(name)[0]]
    + [("controlnet", torch.float16), ("flux_kontext", torch.float16), ("hunyuan_video", torch.bfloat16)],
)
def test_images_in_prompts_and_few_bits(name: str, dtype: torch.dtype) -> None:
    """Networks in few bits, and an autoencoder that is not, take what a pipeline hands from one to the other; what can go in
    one call goes in one."""
    prompts, found, ways = prompts_for(name), [], []
    for policy in (shared(name), policy_of(name, dtype=dtype)):
        x, levels = policy.start(prompts, [0, 1]), policy.grid(STEPS).levels[torch.tensor([0, 0])]
        with torch.no_grad():
            found.append([x, *policy.denoise(x, levels, prompts, GUIDANCE), policy.decode(x, prompts)])
        ways.append(policy.about["calls"])
    assert ways[0] == ways[1]
    for exact, near in zip(*found, strict=True):
        assert near.dtype == torch.float32
        assert (near - exact).abs().mean() < 0.1 * exact.std()


def test_a_full_export_does_not_say_where_the_base_model_was(tmp_path: Path) -> None:
    tiny.build("sd3").save_pretrained(tmp_path / "secret")
    policy = PipelinePolicy(load_pipeline(str(tmp_path / "secret")), None, 2, 3.0, tiny.call_of("sd3"), lora_rank=None)
    policy.export(tmp_path / "export")
    files = list((tmp_path / "export").rglob("*.json"))
    assert files and not any("secret" in file.read_text() for file in files)


def test_an_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.picture(0).save(tmp_path / "cat.png")
    prompt, opened = Prompt("a cat", media={"image": tmp_path / "cat.png"}), []
    monkeypatch.setattr("diffusionrl.policies.asking.open_image", lambda medium: opened.append(medium) or open_image(medium))
    policy = PipelinePolicy(tiny.build("flux_kontext"), prompt, 2, 3.0, tiny.call_of("flux_kontext"))
    policy.decode(policy.start([prompt], [0]), [prompt])
    assert opened == [tmp_path / "cat.png"]
