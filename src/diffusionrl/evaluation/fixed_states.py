"""How far the policy is from the reference model, at states that stay the same: noisy latents of the reference's own.

``kl_per_step`` (``measures.py``) looks where the policy goes, and weighs each denoising step by 1 / fresh^2: it depends on the
sampler, and hangs on the last steps. Here states are those of the ODE on the run's grid, and each step counts alike: the
measure is the same for every objective and sampler. At a state x the network says (x0, noise), and

    reference_kl        = |(x0, noise) - (x0_ref, noise_ref)|^2 / 2, in nats: the KL of Gaussians of unit variance around both
    reference_distance  = |(x0, noise) - (x0_ref, noise_ref)| / |(x0_ref, noise_ref)|

averaged over the states, which are spread evenly over the denoising steps. Both parts are needed: of pure noise, every network
says the same noise, and of a clean sample the same x0. On variance-preserving paths, the norm is that of v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.sampling.rollout import draw_noise, make_table, predict, sample_trajectories
from diffusionrl.transitions import SamplerTable

TRAJECTORIES, STATES = 8, 32
"""Samples that the reference draws once, and the states that are taken of them, at most one a sample and step: a tenth of an
evaluation, and then a few percent of each."""


@dataclass(frozen=True)
class FixedStates:
    """S states of the reference model, and what it says there.

    Attributes:
        x: noisy latents, (S, ...).
        rows: of the table, (S,).
        prompts: S of them.
        said: (x0, noise) as one vector a state, (S, D), on the CPU.
    """

    table: SamplerTable
    x: Tensor
    rows: Tensor
    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    said: Tensor

    def distance(self, policy: Policy) -> dict[str, float]:
        """Both measures, by name."""
        kl, distance = 0.0, 0.0
        for part, said in _say(policy, self.table, self.x, self.rows, self.prompts, self.sampling):
            expected = self.said[part].double()
            gaps = (said.double() - expected).square().sum(1)
            kl += gaps.sum().item() / 2
            distance += (gaps / expected.square().sum(1)).sqrt().sum().item()
        return {"reference_kl": kl / len(self.rows), "reference_distance": distance / len(self.rows)}


@torch.no_grad()
def fix_states(policy: Policy, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> FixedStates:
    """States of the reference that depend on these arguments alone, but for sampler and eta, and on no trained weight.

    Args:
        prompts: of the trajectories, one each.

    Raises:
        UserError: the policy keeps no reference.
    """
    table, count = make_table(policy, replace(sampling, sampler="ode", eta=0.0)), len(prompts)
    states = min(STATES, count * len(table))
    rows, samples = torch.arange(states) * len(table) // states, torch.arange(states) % count
    x = torch.empty(states, *policy.latent_shape, device=policy.device)
    with policy.reference():
        for part in chunks(count, sampling.batch_size):
            chosen, indices = prompts[part], range(part.start, part.stop)
            start, noise = draw_noise(policy, table, chosen, seed, "fixed_states", 0, indices)
            latents = sample_trajectories(policy, table, chosen, start, noise, sampling.guidance).latents
            for state in ((samples >= part.start) & (samples < part.stop)).nonzero().flatten().tolist():
                x[state] = latents[samples[state] - part.start, rows[state]]
        asked = [prompts[i] for i in samples.tolist()]
        said = torch.cat([each for _, each in _say(policy, table, x, rows, asked, sampling)])
    return FixedStates(table, x, rows, asked, sampling, said)


@torch.no_grad()
def _say(
    policy: Policy, table: SamplerTable, x: Tensor, rows: Tensor, prompts: Sequence[Prompt], sampling: SamplingConfig
) -> Iterator[tuple[slice, Tensor]]:
    """(x0, noise) of some states after the others, (B, D), on the CPU."""
    for part in chunks(len(rows), sampling.batch_size):
        x0, noise = predict(policy, table, x[part], rows[part], prompts[part], sampling.guidance)
        yield part, torch.cat([x0.flatten(1), noise.flatten(1)], 1).cpu()
