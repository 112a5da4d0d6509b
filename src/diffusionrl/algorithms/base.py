"""What the trainer asks of an algorithm."""

from typing import Any, Protocol

from torch import Tensor

from diffusionrl.policies.base import Policy
from diffusionrl.rollout import Rollout
from diffusionrl.transitions import Reduction


class Algorithm(Protocol):
    """How a batch of samples becomes losses. Work is cut into (sample, step) pairs, which may be batched in any way."""

    updates_per_step: int
    micro_batch_size: int
    logprob_reduction: Reduction

    def advantages(self, rollout: Rollout) -> Tensor:
        """One number a sample, (N,), float32. Called once a step: running statistics are updated here."""
        ...

    def pairs(self, rollout: Rollout, samples: Tensor, seed: int, step: int) -> Tensor:
        """The (sample, denoising step) pairs that an update on these valid samples runs over, (P, 2)."""
        ...

    def losses(self, policy: Policy, rollout: Rollout, pairs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, (P,), with gradient; and figures to log, each (P,), without."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Whatever must survive a restart, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
