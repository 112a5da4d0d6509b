"""What the trainer asks of an algorithm."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout
from diffusionrl.transitions import Reduction, SamplerTable


class Objective(Protocol):
    """What an optimizer step is made on. Work is cut into rows of integers, which may be batched in any way."""

    micro_batch_size: int

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        """What each of an update's rows counts, (R,): its sample's advantage, or what a look at its whole group gives. Asked
        once before the update, without gradient, of all rows of this process, in the order of ``Rollout.micro_batches``.

        Args:
            rows: (R, K), the first column counted among this process's samples, as in ``losses``.
            advantages: of this process's samples.
        """
        ...

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row, (R,), with gradient; and figures to log, each (R,), without, NaN where a row has none.

        Args:
            weights: what ``weights`` gave for these rows, (R,).
        """
        ...


class Algorithm(Objective, Protocol):
    """How a batch of samples becomes losses."""

    needs: Needs
    """What must be collected: whole trajectories with their log-probabilities, those with the means of their steps too, or
    endpoints only."""
    logprob_reduction: Reduction
    shared_start: bool
    """The samples of a group begin alike."""

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        """Older copies of the policy that it keeps, by name: the decay with which a copy follows the weights before a training
        step, after so many steps; 0 is the weights as the step begins."""
        ...

    @property
    def sampled_by(self) -> str | None:
        """The copy that samples; None: the policy itself."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the policy has to keep the model that training began from."""
        ...

    needs_reward_gradient: bool
    """Whether the reward is differentiated."""

    def table(self, sampler: SamplerTable, seed: int, step: int) -> SamplerTable:
        """With what a training step samples: the run's own sampler, or that on some of its rows and the ODE on the others. It
        depends on its arguments alone."""
        ...

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


class PlainAlgorithm:
    """What an algorithm answers where it has nothing to say: the policy itself samples, by the run's own sampler, nothing is
    remembered, and what a row counts is its sample's advantage."""

    logprob_reduction: Reduction = "mean"
    shared_start = False
    sampled_by: str | None = None
    needs_reward_gradient = False

    def __init__(self) -> None:
        self.copies: dict[str, Callable[[int], float]] = {}

    @property
    def needs_reference(self) -> bool:
        return False

    def table(self, sampler: SamplerTable, seed: int, step: int) -> SamplerTable:
        return sampler

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        return advantages[rows[:, 0]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but was given {sorted(state)}")
