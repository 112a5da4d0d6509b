"""From rows of work to an optimizer step: gradient accumulation, clipping, warm-up, and a stop before anything non-finite."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffusionrl.algorithms.base import Objective
from diffusionrl.config import OptimizerConfig
from diffusionrl.interruption import check
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.rollout import Rollout


class NonFiniteError(Exception):
    """A loss or the gradient is not finite; weights and optimizer are as before this update.

    Args:
        losses: (R,), one a row.
    """

    def __init__(self, rollout: Rollout, rows: Tensor, advantages: Tensor, losses: Tensor) -> None:
        count = int((~losses.isfinite()).sum())
        super().__init__(f"{count} of {len(losses)} losses are" if count else "the gradient is")
        self.rollout, self.rows, self.advantages, self.losses = rollout, rows, advantages, losses

    def save(self, folder: Path) -> str:
        """Everything that the losses were computed from: ``batch.safetensors``, and the prompts in ``batch.json``.

        Returns:
            The folder, or why there is none.
        """
        try:
            self._write(folder)
        except (OSError, SafetensorError) as error:
            return f"no file, for want of a disk to write to ({error})"
        return str(folder)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rollout, samples = self.rollout, torch.unique(self.rows[:, 0])
        where = samples.to(rollout.latents.device)
        tensors = {
            "samples": samples,
            "rows": self.rows,
            "losses": self.losses,
            "advantages": self.advantages[samples],
            "latents": rollout.latents[where],
            "embeddings": rollout.embeddings[where],
            "log_probs": rollout.log_probs[where],
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "batch.safetensors")
        prompts = [rollout.prompts[i].text for i in samples.tolist()]
        (folder / "batch.json").write_text(json.dumps(prompts, indent=1) + "\n")


class Optimization:
    """AdamW on named parameters, with a count of its updates, which is all that the warm-up depends on."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters, self.config, self.updates = parameters, config, 0
        self.adamw = torch.optim.AdamW(
            parameters.values(), config.learning_rate, config.betas, config.epsilon, config.weight_decay
        )

    def update(
        self, algorithm: Objective, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor
    ) -> tuple[dict[str, Tensor], float]:
        """One optimizer step on the mean loss over the rows.

        Returns:
            The algorithm's figures, one number a row; and the norm of the gradient before it was clipped.

        Raises:
            NonFiniteError: instead of the step.
        """
        try:
            figures = accumulate_gradient(algorithm, policy, rollout, rows, advantages)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
            losses = figures.pop("loss")
            if not (norm.isfinite() and losses.isfinite().all()):
                raise NonFiniteError(rollout, rows, advantages, losses)
            self.updates += 1
            for group in self.adamw.param_groups:
                group["lr"] = self.config.learning_rate * min(1.0, self.updates / max(1, self.config.warmup))
            self.adamw.step()
        finally:
            self.adamw.zero_grad()
        return figures, norm.item()

    def rms(self, norm: float) -> float:
        """The root mean square of a gradient of this norm, as AdamW gets it: clipped."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        return min(norm, self.config.max_grad_norm) / math.sqrt(count)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by parameter and kind, "NAME.exp_avg"."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Be as when ``tensors`` was called, after so many updates."""
        self.adamw.state.clear()
        for name, value in tensors.items():
            owner, key = name.rsplit(".", 1)
            parameter = self.parameters[owner]
            self.adamw.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
        self.updates = updates


def accumulate_gradient(
    algorithm: Objective, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over all rows, in micro-batches; how they are cut changes only rounding.

    Returns:
        The algorithm's figures and the "loss", one number a row.
    """
    parts: list[dict[str, Tensor]] = []
    for micro in chunks(len(rows), algorithm.micro_batch_size):
        check()
        losses, figures = algorithm.losses(policy, rollout, rows[micro], advantages)
        (losses.sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
        parts.append(figures | {"loss": losses.detach()})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
