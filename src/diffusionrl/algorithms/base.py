"""What the trainer asks of an algorithm."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout
from diffusionrl.transitions import Reduction


class Objective(Protocol):
    """What an optimizer step is made on. Work is cut into rows of integers, which may be batched in any way."""

    micro_batch_size: int

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row, (R,), with gradient; and figures to log, each (R,), without."""
        ...


class Algorithm(Objective, Protocol):
    """How a batch of samples becomes losses."""

    needs: Needs
    """What must be collected: whole trajectories with their log-probabilities, or endpoints only."""
    logprob_reduction: Reduction

    def advantages(self, rollout: Rollout) -> Tensor:
        """One number a sample, (N,), float32. Called once a step: running statistics are updated here."""
        ...

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """The work of each optimizer step: rows (R, K) of integers, of which the first is a valid sample's index."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Whatever must survive a restart, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
