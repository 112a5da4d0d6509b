"""RWR and RWR-sparse: reward-weighted regression, the baselines of DDPO (Black et al., arXiv 2305.13301, Sec. 4.1, App. D).

Generation is a decision process of one step: the state is the prompt c, the action the image x0. Its likelihood cannot be
computed, so a bound stands in for it, the denoising loss, weighted by what the image scored:

    L = E[ w(x0, c) * |noise - noise_theta(alpha_t x0 + sigma_t noise, t, c)|^2 ],        noise ~ N(0, I)
    RWR           w = softmax(beta * r), times the number of samples: its mean is 1
    RWR-sparse    w = 1 where r is at or above the percentile, 0 elsewhere; only the former are trained on

over the samples of one prompt or of the whole step, for t uniform over the model's own grid; of flows, it is the error of the
velocity (``forward_process.py``). With guidance, the guided prediction is trained, as in the paper (App. E.1;
``train_guided``). A step's samples are passed over in shuffled batches until ``updates_per_step`` optimizer steps are made,
with fresh times and noise at every pass.

The paper weights per prompt; its code does so for the aesthetic reward only, and elsewhere over the step:
``normalisation`` says which. Rewards are in the units of the reward: ``inverse_temperature`` 0.2 is for kilobytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.base import PlainAlgorithm
from diffusionrl.algorithms.forward_process import noised
from diffusionrl.config import RWRConfig
from diffusionrl.data.prompts import members_of
from diffusionrl.devices import handed
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout


class RWR(PlainAlgorithm):
    """RWR and RWR-sparse. An "advantage" is a sample's weight."""

    needs: Needs = "endpoints"

    def __init__(self, config: RWRConfig, guidance: float) -> None:
        super().__init__()
        self.config, self.guidance = config, guidance if config.train_guided else None
        self.micro_batch_size = config.micro_batch_size

    def advantages(self, rollout: Rollout) -> Tensor:
        scores = rollout.scores
        weights = torch.zeros(len(scores.values))
        keys = [prompt.key if self.config.normalisation == "prompt" else "" for prompt in rollout.prompts]
        for indices in members_of(keys).values():
            members = torch.tensor(indices)
            members = members[scores.valid[members]]
            if len(members):
                weights[members] = self._weigh(scores.values[members].double()).float()
        return weights

    def _weigh(self, rewards: Tensor) -> Tensor:
        if self.config.variant == "sparse":
            return (rewards >= rewards.quantile(self.config.percentile)).double()
        return len(rewards) * (self.config.inverse_temperature * rewards).softmax(0)

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        trained = (advantages > 0).nonzero().flatten()
        size, queue, passes = self.config.batch_size, trained[:0], 0
        for update in range(self.config.updates_per_step if len(trained) else 0):
            while len(queue) < size:
                order = torch.randperm(len(trained), generator=seeds.torch_generator(seed, "update_order", step, passes))
                queue, passes = torch.cat([queue, trained[order]]), passes + 1
            batch, queue = queue[:size], queue[size:]
            draws = [seeds.address(seed, "rwr", step, update, i) for i in range(len(batch))]
            yield torch.stack([batch, torch.tensor(draws)], 1)

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sample, weights = rows[:, 0], handed(weights, rollout.latents.device)
        at = noised(policy, rollout.endpoints(sample), rollout.prompts_of(sample), rows[:, 1].tolist())
        errors = at.error(at.ask(policy, self.guidance))
        return weights * errors, {"policy/denoising_loss": errors.detach(), "policy/weight": weights}
