"""The pretraining loss: real pairs of image and caption, which hold the model to what it was (DiffusionRL, arXiv 2401.12244).

After the tasks of a training step come optimizer steps on

    L_pre = weight * E |noise - noise_theta(alpha_t x0 + sigma_t noise, t, c)|^2,        noise ~ N(0, I)

without guidance, for t uniform over the model's own grid (of flows, the error of the velocity). They are steps of their own
with the tasks' optimizer (Algorithm 1), not a term of the tasks' loss. Where the paper is silent, or its code differs:
- the paper gives the weight no value; under AdamW the number of steps matters more (here 1 to the 5 of a task);
- captions are dropped at a rate, as in the model's own training: the paper does not say;
- x0 is the mean of the VAE's posterior (``Policy.encode``); the code draws from it;
- the error is that of the noise, as in the equation, for v prediction too; there, the code takes the error of v.
"""

import time
from typing import Any

import torch
from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.algorithms.forward_process import noised
from diffusionrl.config import TrainConfig
from diffusionrl.data.pairs import MAX_BROKEN, Pairs
from diffusionrl.data.prompts import Prompt
from diffusionrl.devices import handed
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, make_table
from diffusionrl.training import disk
from diffusionrl.training.disk import cropped, draw_all, share_broken
from diffusionrl.training.optimization import Optimization


class Pretraining:
    """The loss on pairs, as an objective of the optimizer: a real image is an endpoint that nobody sampled."""

    def __init__(self, pairs: Pairs, config: TrainConfig, micro_batch_size: int) -> None:
        self.pairs, self.config, self.micro_batch_size = pairs, config, micro_batch_size

    def train(self, policy: Policy, optimization: Optimization, step: int) -> dict[str, float]:
        """The optimizer steps of a training step. Returns its metrics.

        Raises:
            RunStopped: too many images do not decode.
            NonFiniteError: a loss or the gradient is not finite.
        """
        began, settings = time.perf_counter(), self.config.pretraining
        losses, norms = [], []
        for update in range(settings.updates):
            indices = range(update * settings.batch_size, (update + 1) * settings.batch_size)
            draws = [seeds.address(self.config.seed, "pretraining", step, i) for i in indices]
            rows = torch.stack([torch.arange(len(draws)), torch.tensor(draws)], 1)
            weights = torch.full((len(draws),), settings.weight)
            figures, norm, _ = optimization.update(self, policy, self.batch(policy, step, indices), rows, weights)
            losses.append(figures["pretraining/loss"].mean().item())
            norms.append(norm)
        share_broken(self.pairs, settings.max_broken, MAX_BROKEN)
        return {
            "pretraining/loss": sum(losses) / len(losses),
            "pretraining/grad_norm": sum(norms) / len(norms),
            "pretraining/broken": len(self.pairs.broken),
            "time/pretraining": time.perf_counter() - began,
        }

    def batch(self, policy: Policy, step: int, indices: range) -> Rollout:
        """Pairs as samples; which one is drawn depends on the seed, the step and its index alone. Of several processes, each
        draws its share, and does not know the captions of the others."""
        seed, dropped = self.config.seed, self.config.pretraining.drop_caption
        own = processes.share(len(indices))
        pairs = draw_all(self.pairs.draw, [seeds.address(seed, "pretraining_pair", step, indices[i]) for i in own])
        without = [seeds.numpy_generator(seed, "pretraining_caption", step, indices[i]).random() < dropped for i in own]
        captions = ["" if drop else caption for (_, caption), drop in zip(pairs, without, strict=True)]
        prompts = [Prompt("")] * len(indices)
        prompts[own.start : own.stop] = map(Prompt, captions)
        images = torch.stack([cropped(image, policy.sample_shape) for image, _ in pairs])
        nothing = torch.zeros(len(indices))
        return Rollout(
            prompts=prompts,
            latents=policy.encode(images)[:, None],
            images=images,
            # Not looked at, where only endpoints are trained on.
            table=make_table(policy, self.config.sampling),
            log_probs=torch.zeros(len(pairs), 0),
            scores=Scores(nothing, nothing == 0),
            seconds={},
        )

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        return advantages[rows[:, 0]]

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sample = rows[:, 0]
        at = noised(policy, rollout.endpoints(sample), rollout.prompts_of(sample), rows[:, 1].tolist())
        errors = at.error(at.ask(policy, guidance=None))
        return handed(weights, errors.device) * errors, {"pretraining/loss": errors.detach()}

    def capture(self) -> dict[str, Any]:
        """See ``disk.capture``."""
        return disk.capture(self.pairs)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Be as at ``capture``; None is of a run that had no such loss.

        Raises:
            UserError: it is of other pairs.
        """
        if state is not None:
            allowed = self.config.checkpoint.allow_changes
            disk.check(self.pairs, state, "pretraining.source holds other captions or images", allowed)
            disk.restore(self.pairs, state)
