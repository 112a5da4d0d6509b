"""From weights to images and to a file: decoding, and the export in plain diffusers."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.doctor.costs import limit_bytes, used_bytes
from diffusionrl.doctor.findings import Finding
from diffusionrl.errors import UserError, describe
from diffusionrl.policies import Policy, load_pipeline, make_policy, put_export
from diffusionrl.policies.adapters import find_lora
from diffusionrl.policies.quantization import is_quantized
from diffusionrl.runs.usage import is_own
from diffusionrl.sampling.rollout import Rollout, draw_noise, sample_trajectories
from diffusionrl.training.trainer import Trainer
from diffusionrl.transitions import ode

_STEPS = 4  # denoising steps of the images that are compared
_SHIFT, _ATTEMPTS, _SHOWS = 0.1, 6, 8.0  # first shift of the weights, relative; doublings; mean change in levels that is enough
_LEVELS = 1  # of 255: as README.md says, single values may round to the next
_FINE, _COARSE = 0.01, 0.25  # of what was trained: in float32 on the CPU, and otherwise, where little but its size is seen


def check_images(rollout: Rollout) -> Finding:
    """Finite, and showing something."""
    images, kind = rollout.images, rollout.kind
    if not images.isfinite().all():
        remedy = "the decoder overflows: run it in float32, or try another checkpoint of the model"
        return Finding("fail", "images", "the decoder gives NaN or infinity", remedy)
    if not (images.std() if kind == "sample" else images.flatten(1).std(1).max()) > 1 / 255:
        said = "all sounds are silent" if kind == "sound" else f"all {kind}s are blank"
        return Finding("fail", "images", said, "look at more of them: diffusionrl sample --model ...")
    size = " x ".join(map(str, images.shape[-2:] if kind != "sample" else images.shape[1:]))
    if kind == "video":
        size += f", {images.shape[1]} frames each"
    if kind == "sound":
        size = f"sounds of {images.shape[-1]} values, {images.shape[1]} channels"
    return Finding("pass", "images", f"{len(images)} decoded, {size}, finite, not {'silent' if kind == 'sound' else 'blank'}")


@torch.no_grad()
def check_export(trainer: Trainer, rollout: Rollout) -> Finding:
    """Move the weights, export them, load them in plain diffusers, and draw the same images."""
    if is_own(trainer.policy.about):
        return _check_writing(trainer.policy)
    policy, sampling, quantization = trainer.policy, trainer.config.sampling, trainer.config.policy.quantization
    if quantization != "none" and policy.about["format"] != "lora":
        return Finding("warn", "export", "not tried: it is no LoRA file", "try it with policy.quantization none")
    second, free = _second_model(policy), limit_bytes(policy.device) - used_bytes(policy.device)
    if second > free:
        told = f"not tried: the model is loaded a second time for it, {second / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return Finding("warn", "export", told, "draw from the run's first export/ by the lines in its README.md")
    prompts, table = (rollout.prompts * 2)[:2], ode(policy.grid(_STEPS))
    start, noise = draw_noise(policy, table, prompts, trainer.config.seed, "doctor", 2, [0, 1])

    def draw(drawing: Policy = policy) -> Tensor:
        drawn = sample_trajectories(drawing, table, prompts, start, noise, sampling.guidance)
        return _levels(drawing.decode(drawn.latents[:, -1], prompts))

    def plain(export: Path | None = None) -> Tensor:
        """What diffusers makes of the model, with an export put into it."""
        pipeline = load_pipeline(policy.source, config=trainer.config.model_config, quantization=quantization)
        device = str(policy.device)
        if quantization != "none":  # where a LoRA is not merged, which would round it
            with torch.enable_grad():  # by which layers without a part are found
                return draw(make_policy(pipeline, sampling, prompts[0], lora=export and find_lora(export), device=device))
        if export is not None:
            put_export(pipeline, export, policy.source)
        return draw(make_policy(pipeline, sampling, prompts[0], lora_rank=None, device=device))

    try:
        base = plain()
    except UserError as error:
        return Finding("warn", "export", f"not tried: {error}", "hand over the model by folder or hub id")
    ours = _shifted(trainer, draw, base)
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy.export(Path(folder))
            theirs = plain(Path(folder))
    except Exception as error:  # whatever it raises is the answer
        return Finding("fail", "export", f"does not load in plain diffusers: {type(error).__name__}: {error}", _REMEDY)
    exact = trainer.config.policy.dtype == "float32" and policy.device.type == "cpu"
    return _compare((theirs - ours).abs(), (ours - base).abs().mean().item(), exact, rollout.kind)


def _check_writing(policy: Policy) -> Finding:
    """Of a model of one's own, which nothing here knows how to load."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            policy.export(Path(folder))
        except Exception as error:  # whatever it raises is the answer
            return Finding("fail", "export", f"export(folder) raises {describe(error)}", "mend the policy's export")
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        named = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.2g} MB)" for file in files[:3])
    if not files:
        return Finding(
            "fail", "export", "export(folder) writes nothing", "nothing of the run would be left: let it write weights"
        )
    return Finding("pass", "export", f"writes {named}; that it loads is for you to see")


def _second_model(policy: Policy) -> int:
    """Bytes of its weights in float32, or in a byte each where they are quantised."""
    components = getattr(getattr(policy, "pipeline", None), "components", {})
    networks = [part for part in components.values() if isinstance(part, torch.nn.Module)]
    return sum(weight.numel() * (1 if is_quantized(part) else 4) for part in networks for weight in part.parameters())


_REMEDY = "the weights that are trained are not those that are exported: compare policy.trainable() with policy.export()"


def _shifted(trainer: Trainer, draw: Callable[[], Tensor], base: Tensor) -> Tensor:
    """Move the weights, further and further until that shows; returns the images. An untrained adapter changes nothing."""
    parameters = trainer.policy.trainable()
    square = sum(p.square().sum().item() for p in parameters.values()) / sum(p.numel() for p in parameters.values())
    images = base
    for attempt in range(_ATTEMPTS):
        for index, parameter in enumerate(parameters.values()):
            generator = seeds.torch_generator(trainer.config.seed, "doctor", 3, attempt, index)
            drawn = torch.empty(parameter.shape).normal_(std=_SHIFT * 2**attempt * square**0.5, generator=generator)
            parameter.add_(drawn.to(parameter.device))
        images = draw()
        if (images - base).abs().mean() >= _SHOWS:
            break
    return images


def _levels(images: Tensor) -> Tensor:
    return (images.float().cpu() * 255).round()


def _compare(gap: Tensor, effect: float, exact: bool, kind: str) -> Finding:
    """The gap in levels against what the weights change, ``effect`` on average."""
    if effect == 0:
        return Finding("warn", "export", f"the trained weights change no {kind}", "look at policy.trainable()")
    close = gap.max() <= _LEVELS and gap.mean() <= _FINE * effect
    if close or (not exact and gap.mean() <= _COARSE * effect):
        told = (
            f"plain diffusers draws the same {kind}s, at most {gap.max():.0f} of 255 levels off ({gap.mean():.1g} on average)"
        )
        return Finding("pass", "export", told)
    told = f"plain diffusers draws other {kind}s: {gap.mean():.2g} of 255 levels off; what was trained changes {effect:.2g}"
    return Finding("fail", "export", told, _REMEDY)
