"""Everything that a training step changes, in one place, so that nothing of it is missing from a checkpoint."""

import copy
import hashlib
from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffusionrl import processes
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.checkpoint import Checkpoint
from diffusionrl.config import TrainConfig
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.optimization import Optimization
from diffusionrl.policies.base import Policy
from diffusionrl.processes import like, whole
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
        """A copy of it all, on the CPU; ``score`` is the evaluation's after this step, if there was one. Of several processes,
        the main one has the copy; the others help.

        Raises:
            RunStopped: the processes have different weights.
        """
        tensors: dict[str, dict[str, Tensor]] = {
            "policy": {name: whole(parameter) for name, parameter in self.optimization.parameters.items()},
            "optimizer": self.optimization.tensors(),
        }
        self._compare(step)
        counts: Counter[str] = Counter()
        for each in processes.ask(self.reward.counts()):
            counts.update(each)
        state = {
            "updates": self.optimization.updates,
            "invalid": list(self.invalid),
            "algorithm": copy.deepcopy(self.algorithm.state_dict()),
            "reward": dict(self.reward.statistics),
            "counts": dict(counts),
            "prompts": self._prompts,
            "broken": list(self._broken.items()),
            "score": score,
        }
        copies = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in each.items()}
            for file, each in tensors.items()
            if processes.is_main()
        }
        return Checkpoint(step, copies, state)

    def _compare(self, step: int) -> None:
        """Processes that take the same steps from the same weights have the same weights, to the bit. Raises RunStopped."""
        weights = [weight for weight in self.optimization.parameters.values() if not isinstance(weight, DTensor)]
        if processes.count() == 1:
            return
        digest = hashlib.sha256()
        for weight in weights:
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        if len(set(processes.ask(digest.hexdigest()))) > 1:
            raise RunStopped(f"the processes have different weights after step {step}; the newest checkpoint is from before")

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
            parameter.copy_(like(parameter, weights[name]))
        self.optimization.load_tensors(found.tensors["optimizer"], found.state["updates"])
        self.invalid = deque(map(tuple, found.state["invalid"]), self.config.rewards.invalid_window)
        self.algorithm.load_state_dict(copy.deepcopy(found.state["algorithm"]))
        self.reward.statistics = {name: (mean, std) for name, (mean, std) in found.state["reward"].items()}
        counts = found.state["counts"]  # of all processes
        self.reward.go_on_counting(counts if processes.is_main() else dict.fromkeys(counts, 0))
        self._broken.clear()
        self._broken.update((place, said) for place, said in found.state["broken"])
