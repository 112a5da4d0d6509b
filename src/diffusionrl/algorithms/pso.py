"""PSO: Tuning Timestep-Distilled Diffusion Models Using Pairwise Sample Optimization (arXiv 2410.03190).

A model of few steps that learns to denoise good images blurs. PSO learns from pairs: the target t is to become likelier than a
reference sample r that the model draws itself, both measured against the model that training began from, over the steps
n = 1 .. N of its own distilled chain. The last step has no noise and no likelihood: it is left out.

Online (``pso``). Two chains of a prompt, told apart by the reward, each step by itself; with rho = p_theta / p_ref of a step:

    L = -log sigmoid(beta * log clip(rho_t, 1 - c, 1 + c) - beta * log clip(rho_r, 1 - c, 1 + c))

That is D3PO (``d3po.py``) of a short chain, without its last step. As in the authors' code: beta is 50, c is 0.1, and
log-probabilities are means over the latent dimensions.

Offline (``pso-offline``). Two samples that are there, noised to one of the N levels of the chain with the same noise. With the
error l = |x0_theta - x0|^2 / sigma^2 at noise sigma a unit of signal, which is that of the noise (on a linear flow, whose sigma
is a share, that of the velocity), and l_ref of the reference model:

    L = -log sigmoid(beta * ((l_ref(t) - l(t)) - (l_ref(r) - l(r)))) + retain * l(r)

That is Diffusion-DPO (``dpo.py``) at the levels that are sampled, whose beta counts half there, and a term against forgetting,
as r is the model's own. As in the authors' code for subjects: beta is 5, retain is 0.5. Pairs are drawn and told apart by the
reward, or come from disk (``preferences``): targets as chosen, images that the model has drawn as rejected.

Deviations: the two chains begin from noise of their own; of several rewards the sum tells, where the authors draw one for each
pair; the chain is the sampler's, "renoise" for LCM and DMD and "ddim" for ancestral Turbo; the offline hinge without a
reference model is left out. Equations of the joint likelihood of whole chains, second-hand, are not what the code does.

    diffusionrl train --algorithm.name pso --sampling.sampler renoise --sampling.num-steps 4 --sampling.guidance 1
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.d3po import D3PO
from diffusionrl.algorithms.dpo import DPO
from diffusionrl.algorithms.groups import compare
from diffusionrl.config.algorithms import OfflinePSOConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.transitions import NoiseLevels, SamplerTable


class PSO(D3PO):
    """Online. An "advantage" is 1 for a target, -1 for a reference sample."""

    def table(self, sampler: SamplerTable, seed: int, step: int) -> SamplerTable:
        """With a last step that adds no noise, whatever the scheduler ends at."""
        return sampler.only(torch.arange(len(sampler) - 1))


class OfflinePSO(DPO):
    """Offline. An "advantage" is as in ``PSO``."""

    def __init__(self, config: OfflinePSOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.retain = config.retain

    def among(self, policy: Policy, rollout: Rollout) -> NoiseLevels:
        """Those of the chain."""
        return rollout.table.grid.levels

    def compared(self, error: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses, figures = compare(reference - error, self.config.beta)
        return losses + self.retain * error.chunk(2)[1], figures
