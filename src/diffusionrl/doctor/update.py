"""Two optimizer updates: the ratio before them, the gradient in them, and what they moved."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.devices import in_double
from diffusionrl.doctor.findings import Finding
from diffusionrl.errors import UserError
from diffusionrl.runs.alarms import ratio_tolerance
from diffusionrl.sampling.rollout import Rollout, denoise_step
from diffusionrl.training.optimization import NonFiniteError
from diffusionrl.training.trainer import Trainer

_MAX_ROWS = 64  # of an update: enough to reach every tensor
_ROUNDING = 1e-6  # of a float32 prediction, relative


def rows_of_an_update(trainer: Trainer, rollout: Rollout, advantages: Tensor) -> Tensor:
    """Rows of the first update of a step, spread evenly if there are many, (R, K)."""
    every = trainer.algorithm.updates(rollout, advantages, trainer.config.seed, 0)
    rows = next(rows for rows in every if len(rows))
    count = min(len(rows), _MAX_ROWS)
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def check_update(trainer: Trainer, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Iterator[Finding]:
    """Two updates on the rows. A LoRA begins at zero, so half of its tensors get a gradient in the second update only."""
    optimization, gradients = trainer.state.optimization, []

    def note(*_: object) -> None:
        square = {
            name: in_double(p.grad).square().mean().item() for name, p in optimization.parameters.items() if p.grad is not None
        }
        gradients.append({name: math.sqrt(square.get(name, 0.0)) for name in optimization.parameters})

    policy_before, reference_before = _predict(trainer, rollout, False), _predict(trainer, rollout, True)
    decoded_before = trainer.policy.decode(rollout.latents[:1, -1], rollout.prompts[:1])
    handle = optimization.adamw.register_step_pre_hook(note)
    try:
        figures, norm, _ = optimization.update(trainer.algorithm, trainer.policy, rollout, rows, advantages)
        later, _, _ = optimization.update(trainer.algorithm, trainer.policy, rollout, rows, advantages)
    except NonFiniteError as error:
        remedy = "try policy.dtype float32, a lower optimizer.learning_rate, and sampling.eta above 0"
        yield Finding("fail", "gradient", f"{error} not finite", remedy)
        return
    finally:
        handle.remove()
    if "ratio_gap" in figures:
        yield _ratio(trainer, figures["ratio_gap"].max().item())
    yield _gradient(trainer, gradients, optimization.rms(norm), later.get("policy/clip_fraction", torch.zeros(1)))
    yield _policy(trainer, _change(policy_before, _predict(trainer, rollout, False)))
    decoder = _change(decoded_before, trainer.policy.decode(rollout.latents[:1, -1], rollout.prompts[:1]))
    yield _reference(_change(reference_before, _predict(trainer, rollout, True)), decoder)


def _ratio(trainer: Trainer, gap: float) -> Finding:
    tolerance = ratio_tolerance(trainer.config)
    if gap <= tolerance:
        return Finding("pass", "ratio", f"1 before the first update; largest gap {gap:.1g}, rounding allows {tolerance:.0e}")
    return Finding(
        "fail",
        "ratio",
        f"off by {gap:.1e} before the first update, rounding allows {tolerance:.0e}: the update does not see the policy "
        "that sampled",
        "the network must compute the same in both: no dropout, one precision (policy.dtype float32), no lossy cache",
    )


def _gradient(trainer: Trainer, gradients: list[dict[str, float]], rms: float, clipped: Tensor) -> Finding:
    """Against AdamW's epsilon: below it, every step is shortened. ``clipped`` is of the second update's rows."""
    epsilon = trainer.config.optimizer.epsilon
    missed = [name for name in gradients[0] if not any(each[name] > 0 for each in gradients)]
    if missed and clipped.all():
        dimensions = math.prod(trainer.policy.latent_shape)
        return Finding(
            "fail",
            "gradient",
            "one update takes every ratio beyond the clip range, where it teaches nothing",
            f"raise algorithm.clip_range (published: 1.6 / latent dimensions, here {1.6 / dimensions:.1e}, of mean "
            "log-probabilities), or lower optimizer.learning_rate",
        )
    if missed:
        return Finding(
            "fail",
            "gradient",
            f"{len(missed)} of {len(gradients[0])} trained tensors get no gradient: {', '.join(missed[:2])}"
            + (" ..." if len(missed) > 2 else ""),
            "they have no part in the loss: something detaches them, or their layer is not used",
        )
    told = f"reaches all {len(gradients[0])} trained tensors; root mean square {rms:.1e}, epsilon {epsilon:.0e}"
    if rms >= 10 * epsilon:
        return Finding("pass", "gradient", told)
    remedy = f"lower optimizer.epsilon to {max(rms, 1e-13) / 100:.0e}: AdamW divides by the gradient's size plus epsilon"
    return Finding("warn" if rms >= epsilon else "fail", "gradient", told, remedy)


@torch.no_grad()
def _predict(trainer: Trainer, rollout: Rollout, reference: bool) -> Tensor | None:
    """The mean of a step at the beginning and one half-way, from noise; None where there is no reference."""
    policy, prompts, steps = trainer.policy, (rollout.prompts * 2)[:2], torch.tensor([0, len(rollout.table) // 2])
    x = policy.start(prompts, [seeds.address(trainer.config.seed, "doctor", 1, i) for i in range(2)])
    try:
        with policy.reference() if reference else nullcontext():
            return denoise_step(policy, rollout.table, x, steps, prompts, trainer.config.sampling.guidance)[0]
    except UserError:
        return None


def _change(before: Tensor | None, after: Tensor | None) -> float | None:
    """Mean difference, relative."""
    if before is None or after is None:
        return None
    return ((after - before).abs().mean() / before.abs().mean()).item()


def _policy(trainer: Trainer, change: float | None) -> Finding:
    assert change is not None
    if change > _ROUNDING:
        return Finding("pass", "policy", f"moves: two updates change its prediction by {change:.1g} of itself")
    optimizer = trainer.config.optimizer
    told = "does not move" if change == 0 else f"moves no further than rounding ({change:.0e} of its prediction)"
    warmup = f", in the first of {optimizer.warmup} updates of optimizer.warmup" if optimizer.warmup > 1 else ""
    remedy = f"raise optimizer.learning_rate ({optimizer.learning_rate:g}{warmup})"
    return Finding("warn" if change else "fail", "policy", f"{told} in two updates", remedy)


def _reference(change: float | None, decoder: float | None) -> Finding:
    if (change or 0.0) > _ROUNDING or (decoder or 0.0) > _ROUNDING:
        what = "the reference" if (change or 0.0) > _ROUNDING else "the decoder"
        remedy = "freeze everything but what policy.trainable() names; reference() must switch the adapter off"
        return Finding("fail", "reference", f"{what} moves with the policy", remedy)
    if change is None:
        return Finding("pass", "reference", "full fine-tuning keeps none; the decoder stands still")
    return Finding("pass", "reference", "stands still, and so does the decoder")
