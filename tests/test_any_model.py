"""The command line on models of other families, saved as a user has them: train, sample, evaluate, doctor."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusionrl import TrainConfig, diagnose
from diffusionrl.cli import main
from diffusionrl.config import DDPOConfig, SamplingConfig
from diffusionrl.errors import UserError
from diffusionrl.policies import check_model, load_policy
from diffusionrl.policies.pipeline import PipelinePolicy

TRAINED = [
    *("--steps", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2", "--evaluation.num-samples", "2"),
    *("--algorithm.updates-per-step", "1", "--algorithm.train-fraction", "1", "--algorithm.normalisation", "group"),
    *("--algorithm.clip-range", "0.1", "--evaluation.embeddings.model", "none"),
]


@pytest.mark.parametrize("model", ["sdxl", "sd3", "flux", "flux_kontext", "wan", "stable_audio"], indirect=True)
def test_train_sample_and_evaluate(model: Path, request: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = request.node.callspec.params["model"]
    reward = "sounds:loudness" if name == "stable_audio" else "compressibility"
    chosen = ["--model", str(model), *tiny.QUICK, *tiny.options_of(name)]
    asked = ["--prompts", "prompts.jsonl", "--reward", reward]
    assert main(["train", *chosen, *asked, *TRAINED, "--run-dir", "run"]) == 0, capsys.readouterr().err
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["ratio/max_gap"] < 1e-5 and metrics[-1]["reward/invalid"] == 0
    about = json.loads(Path("run/env.json").read_text())["model"]
    assert about["pipeline"] == type(tiny.build(name)).__name__
    ending = {"wan": "webp", "stable_audio": "wav"}.get(name, "png")
    assert len(list(Path("run/samples/step_000001").glob(f"0*.{ending}"))) == 2
    page = Path("run/report.html").read_text()
    kind = {"wan": "data:image/webp", "stable_audio": "data:audio/wav"}.get(name, "data:image/png")
    assert kind in page and about["pipeline"] in page
    assert about["pipeline"] in Path("run/export/README.md").read_text()
    settings = yaml.safe_load(Path("run/config.yaml").read_text())["sampling"]
    assert settings["num_steps"] == 2
    assert ("guidance is distilled" in capsys.readouterr().err) == name.startswith("flux")
    inputs = sorted(file.name for file in Path("run/samples/step_000001/inputs").glob("*"))
    assert inputs == (["00000_image.png", "00001_image.png"] if name == "flux_kontext" else [])
    assert page.count('alt="what the prompt names"') == (2 + 2 + 2) * (name == "flux_kontext")
    assert main(["sample", "--model", "run", "--prompts", "prompts.jsonl", "--seeds", "0", "--out", "drawn"]) == 0
    assert Path(f"drawn/00001.{ending}").is_file()
    more = ["--baseline", str(model), "--num-samples", "2", "--out", "scores.json"]
    assert main(["evaluate", "--model", "run", *asked, *more]) == 0, capsys.readouterr().err
    assert json.loads(Path("scores.json").read_text())["settings"]["model"] == "run"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("sd3", "decoded, 16 x 16, finite"),
        ("sdxl", "draws the same images"),
        ("flux", "the same image twice"),
        ("flux_kontext", "decoded, 16 x 16, finite"),
        ("wan", "decoded, 16 x 16, 5 frames each, finite"),
        ("stable_audio", "decoded, sounds of 7 values, 2 channels, finite, not silent"),
    ],
    indirect=["model"],
)
def test_the_doctor_finds_them_healthy(model: Path, told: str, request: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = request.node.callspec.params["model"]
    kind = {"wan": "video", "stable_audio": "sound"}.get(name, "image")
    reward = "sounds:loudness" if kind == "sound" else "compressibility"
    chosen = ["--model", str(model), *tiny.QUICK, *tiny.options_of(name), "--prompts", "prompts.jsonl", "--reward", reward]
    assert main(["doctor", *chosen, *TRAINED, "--optimizer.learning-rate", "0.01"]) == 0, capsys.readouterr().out
    said = " ".join(capsys.readouterr().out.split())
    assert told in said and " 0 to look at, 0 failed" in said
    assert f"plain diffusers draws the same {kind}s" in said and f"the same {kind} twice gets the same score" in said
    assert ("image" in said.replace(" images 8 decoded", "")) == (kind == "image")


def test_the_doctor_sees_what_is_wrong_with_a_reward_for_sound() -> None:
    """One that ignores its sounds, and one that has no score for them the second time."""
    policy = PipelinePolicy(tiny.build("stable_audio"), steps=2, arguments=tiny.call_of("stable_audio"))
    sampling = SamplingConfig(num_steps=2, sampler="cps", eta=0.7)
    config = TrainConfig(prompts_per_step=2, samples_per_prompt=4, sampling=sampling, algorithm=DDPOConfig(updates_per_step=1))

    def constant(sounds: Tensor, prompts: Any, metadata: Any) -> list[float]:
        return [1.0] * len(sounds)

    asked = [0]

    def once(sounds: Tensor, prompts: Any, metadata: Any) -> Tensor:
        assert all(each["sampling_rate"] == policy.sampling_rate for each in metadata)
        asked[0] += len(sounds) * bool(sounds.any())  # silent ones are tried before
        return sounds.mean((1, 2)) * (1 if asked[0] <= 8 else torch.nan)

    def found(reward: Any, check: str) -> str:
        return next(each.said for each in diagnose(config, policy, reward, ["a cat", "a dog"]) if each.check == check)

    assert "all 8 sounds score 1, and so do silence, constant sounds and noise" in found(constant, "variation")
    assert found(once, "repeatable").startswith("8 of 8 sounds have a score once, and none the next time")


# What cannot be had is said at once


@pytest.mark.parametrize("model", ["stable_audio"], indirect=True)
def test_a_reward_for_images_on_sound(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--model", str(model), *tiny.QUICK, *tiny.options_of("stable_audio"), "--prompts", "prompts.jsonl"]
    assert main(["train", *chosen, *TRAINED, "--run-dir", "run"]) == 2
    assert "compressibility scores images, and the model makes sound" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("model", ["flux"], indirect=True)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sampling.call", "wings=2"], "FluxPipeline takes no wings"),
        (["--sampling.num-frames", "9"], "FluxPipeline takes no num_frames"),
        (["--sampling.call", "output_type=np"], "set by diffusionrl itself"),
        (["--sampling.call", "wings"], "is not KEY=VALUE"),
        (["--policy.lora-targets", "to_z"], "has no layer 'to_z'; its layers' names end in"),
        (["--policy.networks", "unet"], "unet: no such part is called"),
        (["--pretraining.source", "emoji"], "FluxPipeline makes no latents of an image that it would decode to the same"),
    ],
)
def test_what_a_model_does_not_take(model: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--model", str(model), *tiny.QUICK, *TRAINED, "--prompts", "prompts.jsonl", "--run-dir", "run"]
    sizes = [] if given[0].startswith("--sampling") else tiny.options_of("flux")
    try:
        code = main(["train", *chosen, *sizes, *given])
    except SystemExit as error:  # tyro's, of a value out of range
        code = int(error.code or 0)
    assert code == 2 and said in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


@pytest.mark.parametrize("model", ["flux_kontext"], indirect=True)
def test_an_image_that_is_missing_or_broken(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        "--model",
        str(model),
        *tiny.QUICK,
        *tiny.options_of("flux_kontext"),
        *TRAINED,
        "--prompts",
        "prompts.jsonl",
        "--run-dir",
        "run",
    ]
    Path("cat_image.png").write_bytes(b"no image")
    assert main(["train", *chosen]) == 2
    assert "cat_image.png of a prompt cannot be read" in capsys.readouterr().err
    Path("cat_image.png").unlink()
    assert main(["train", *chosen]) == 2
    assert "prompts.jsonl:1: image 'cat_image.png' is no file beside it" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("model", ["sd1_img2img"], indirect=True)
def test_images_of_two_sizes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which the pipeline makes latents of two shapes of."""
    Image.new("RGB", (32, 16)).save("dog_image.png")
    chosen = ["--model", str(model), *tiny.QUICK, *tiny.options_of("sd1_img2img"), *TRAINED, "--prompts", "prompts.jsonl"]
    assert main(["train", *chosen, "--sampling.sampler", "ddim", "--run-dir", "run"]) == 2
    said = capsys.readouterr().err
    dog, cat = Path("dog_image.png").absolute(), Path("cat_image.png").absolute()
    assert f"latents of 'a dog' ({dog}) have the shape (4, 8, 16), and those of 'a cat' ({cat}) (4, 8, 8)" in said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("sdxl", {"height": 20}, "StableDiffusionXLPipeline refuses a call with .*height 20.* divisible by 8"),
        ("sd3", {"height": 17}, None),
        ("flux", {"height": 17}, "sampling.height is 17, and FluxPipeline makes 16 of it"),
        ("wan", {"num_frames": 4}, "sampling.num_frames is 4, and WanPipeline makes 5 of it"),
        ("ltx", {"num_frames": 4}, "sampling.num_frames is 4, and LTXPipeline makes 1 of it"),
    ],
)
def test_sizes_that_it_cannot_make(name: str, sizes: dict[str, int], said: str | None) -> None:
    def load() -> PipelinePolicy:
        return PipelinePolicy(tiny.build(name), steps=2, arguments=tiny.call_of(name) | sizes)

    if said is None:
        assert load().sample_shape[1] == 17
        return
    with pytest.raises(UserError, match=said):
        load()


class OddLoop(StableDiffusionPipeline):
    """Steps so often at every time."""

    steps = 2

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 2, output_type: str = "pt", return_dict: bool = False) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.prepare_latents(1, 4, 16, 16, torch.float32, self.device, None)
        text = self.encode_prompt(prompt, self.device, 1, False)[0]
        for time in self.scheduler.timesteps:
            noise = self.unet(latents, time, text).sample
            for _ in range(self.steps):
                latents = self.scheduler.step(noise, time, latents)[0]
        return (latents,)


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "its loop never calls the scheduler's step"), (2, "its loop steps at the times")]
)
def test_a_loop_that_steps_oddly(steps: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OddLoop, "steps", steps)
    with pytest.raises(UserError, match=f"^OddLoop cannot be asked for its grid: {said}"):
        PipelinePolicy(OddLoop(**tiny.build("sd1").components, requires_safety_checker=False), steps=2)


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
def test_models_that_cannot_be_asked(model: Path, tmp_path: Path) -> None:
    index, scheduler = model / "model_index.json", model / "scheduler" / "scheduler_config.json"
    settings, schedule = json.loads(index.read_text()), json.loads(scheduler.read_text())

    def refused(kind: str, scheduler_kind: str = "DDIMScheduler") -> str:
        index.write_text(json.dumps(settings | {"_class_name": kind}))
        scheduler.write_text(json.dumps(schedule | {"_class_name": scheduler_kind}))
        with pytest.raises(UserError) as error:
            check_model(str(model))
        return str(error.value)

    assert "diffusers" in refused("NoSuchPipeline") and "has no such pipeline" in refused("NoSuchPipeline")
    assert "has no such pipeline" in refused("UNet2DModel")
    assert "cannot be asked where sampling starts" in refused("DDPMPipeline")
    assert "its scheduler, LCMScheduler, is of no kind" in refused("StableDiffusionXLPipeline", "LCMScheduler")
    index.write_text("{")
    with pytest.raises(UserError, match="does not say what pipeline"):
        check_model(str(model))
    with pytest.raises(UserError, match="has no model_index"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
def test_stable_diffusion_takes_the_general_road_where_more_is_asked(model: Path) -> None:
    from diffusionrl.policies import StableDiffusionPolicy

    assert isinstance(load_policy(str(model)), StableDiffusionPolicy)
    asked = SamplingConfig(num_steps=2, height=16, width=32)
    policy = load_policy(str(model), sampling=asked)
    assert not isinstance(policy, StableDiffusionPolicy) and policy.sample_shape == (3, 16, 32)


def test_distilled_checkpoints_are_told_by_configuration_or_name() -> None:
    from diffusionrl.policies.distilled import distillation

    plain, klein, flux = (tiny.build(name) for name in ("sd3", "flux2_klein", "flux"))
    assert distillation(plain, "stabilityai/stable-diffusion-3.5-medium") is None
    assert "few steps" in (distillation(plain, "stabilityai/stable-diffusion-3.5-large-turbo") or "")
    assert "few steps" in (distillation(flux, "black-forest-labs/FLUX.1-schnell") or "")
    assert "guidance is distilled" in (distillation(flux, "black-forest-labs/FLUX.1-dev") or "")
    assert distillation(klein, "klein-base") is None
    klein.register_to_config(is_distilled=True)
    assert "few steps" in (distillation(klein, "klein") or "")


def test_pictures_are_pictures(tmp_path: Path) -> None:
    from diffusionrl.data.media import write_sample

    write_sample(torch.rand(5, 3, 8, 8), tmp_path / "clip.png")
    with Image.open(tmp_path / "clip.webp") as clip:
        assert (clip.n_frames, clip.size) == (5, (8, 8))
    write_sample(torch.sin(torch.arange(2 * 8000) / 20).view(2, 8000), tmp_path / "sound.png", 4000)
    import wave

    with wave.open(str(tmp_path / "sound.wav")) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 4000, 8000)
    with Image.open(tmp_path / "sound.png") as picture:
        assert len(picture.getcolors() or ()) == 2
