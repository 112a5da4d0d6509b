"""Everything that a training step changes, in one place, so that nothing of it is missing from a checkpoint."""

import copy
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.checkpoint import Checkpoint
from diffusionrl.config import TrainConfig
from diffusionrl.errors import UserError
from diffusionrl.optimization import Optimization
from diffusionrl.policies.base import Policy
from diffusionrl.prompts import Prompt, fingerprint
from diffusionrl.rewards import Mixture


class TrainingState:
    """Weights, optimizer, the algorithm's own state, the reward's normalisation and counts, and the recent invalid samples.

    Attributes:
        invalid: (invalid samples, samples) of the last steps.
    """

    def __init__(
        self, policy: Policy, algorithm: Algorithm, reward: Mixture, prompts: Sequence[Prompt], config: TrainConfig
    ) -> None:
        self.algorithm, self.reward, self.config = algorithm, reward, config
        self.optimization = Optimization(policy.trainable(), config.optimizer)
        self.invalid: deque[tuple[int, int]] = deque(maxlen=config.rewards.invalid_window)
        self._prompts = fingerprint(prompts)
        self._broken: dict[int, str] = getattr(prompts, "broken", {})  # of a file whose lines are read as they are drawn

    def capture(self, step: int, score: float | None = None) -> Checkpoint:
        """A copy of it all, on the CPU; ``score`` is the evaluation's after this step, if there was one."""
        tensors: dict[str, dict[str, Tensor]] = {
            "policy": dict(self.optimization.parameters),
            "optimizer": self.optimization.tensors(),
        }
        state = {
            "updates": self.optimization.updates,
            "invalid": list(self.invalid),
            "algorithm": copy.deepcopy(self.algorithm.state_dict()),
            "reward": dict(self.reward.statistics),
            "counts": self.reward.counts(),
            "prompts": self._prompts,
            "broken": list(self._broken.items()),
            "score": score,
        }
        copies = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in each.items()}
            for file, each in tensors.items()
        }
        return Checkpoint(step, copies, state)

    @torch.no_grad()
    def restore(self, found: Checkpoint) -> None:
        """Be as at ``capture``.

        Raises:
            UserError: the checkpoint is of other weights, or of other prompts.
        """
        parameters, weights = self.optimization.parameters, found.tensors["policy"]
        if {name: p.shape for name, p in parameters.items()} != {name: w.shape for name, w in weights.items()}:
            raise UserError("the checkpoint holds other weights than this run trains: choose another --name")
        if found.state["prompts"] != self._prompts and not self.config.checkpoint.allow_changes:
            raise UserError(
                "the prompts are not those that the run began with: choose another --name, "
                "or go on all the same with --checkpoint.allow-changes"
            )
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        self.optimization.load_tensors(found.tensors["optimizer"], found.state["updates"])
        self.invalid = deque(map(tuple, found.state["invalid"]), self.config.rewards.invalid_window)
        self.algorithm.load_state_dict(copy.deepcopy(found.state["algorithm"]))
        self.reward.statistics = {name: (mean, std) for name, (mean, std) in found.state["reward"].items()}
        self.reward.go_on_counting(found.state["counts"])
        self._broken.clear()
        self._broken.update((place, said) for place, said in found.state["broken"])
