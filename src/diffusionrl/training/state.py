"""Everything that a training step changes, in one place, so that nothing of it is missing from a checkpoint."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from diffusionrl import processes
from diffusionrl.config import TrainConfig
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.policies.base import Policy
from diffusionrl.processes import like
from diffusionrl.rewards import Mixture
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.training.beginnings import Beginnings
from diffusionrl.training.optimization import Optimization, all_finite
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.tasks import Task


class TrainingState:
    """Weights, older copies of them, optimizer, and what belongs to each task: the algorithm's own state, the reward's
    normalisation and counts, and the recent invalid samples; and what the pretraining loss passed over."""

    def __init__(
        self,
        policy: Policy,
        tasks: Sequence[Task],
        config: TrainConfig,
        pretraining: Pretraining | None = None,
        held_out: Mixture | None = None,
    ) -> None:
        self.tasks, self.pretraining = {task.name: task for task in tasks}, pretraining
        self.optimization = Optimization(policy.trainable(), config.optimizer)
        self.copies, self._config = policy.copies, config
        rewards = [task.reward for task in tasks]
        self.beginnings = Beginnings(policy, rewards if held_out is None else [*rewards, held_out])

    def capture(self, step: int, score: float | None = None) -> Checkpoint:
        """A copy of it all, on the CPU; ``score`` is the evaluation's after this step, if there was one. Of several processes,
        the main one has the copy; the others help.

        Raises:
            RunStopped: the processes have different weights, or something is not finite.
        """
        self._compare(step)
        state = {
            "updates": self.optimization.updates,
            "tasks": {name: task.capture() for name, task in self.tasks.items()},
            "pretraining": self.pretraining.capture() if self.pretraining else None,
            "began_from": self.beginnings.found,
            "score": score if score is not None and math.isfinite(score) else None,
        }
        tensors = {
            "policy": processes.copies(self.optimization.parameters),
            "optimizer": processes.copies(self.optimization.tensors()),
        }
        older = processes.copies(self.copies.tensors())
        if older:
            tensors["copies"] = older
        for name, each in tensors.items():
            if each and not all_finite(list(each.values())):
                raise RunStopped(
                    f"{name} is not finite after step {step}, and is not saved: the newest checkpoint is from before"
                )
        return Checkpoint(step, tensors, state)

    def _compare(self, step: int) -> None:
        """Processes that take the same steps from the same weights have the same weights, to the bit. Raises RunStopped."""
        if processes.count() == 1:
            return
        weights = [weight for weight in self.optimization.parameters.values() if not isinstance(weight, DTensor)]
        digest = hashlib.sha256()
        for weight in weights:
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        if len(set(processes.ask(digest.hexdigest()))) > 1:
            raise RunStopped(f"the processes have different weights after step {step}; the newest checkpoint is from before")

    def restore(self, found: Checkpoint) -> None:
        """Be as at ``capture``.

        Raises:
            UserError: the checkpoint is of other weights, tasks or prompts, began from another model, LoRA or reward, or is not
                what this version writes.
        """
        try:
            self._restore(found)
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"the checkpoint of step {found.step} is whole, and not as this version writes it ({type(error).__name__}: "
                f"{error}): go on with the version that began the run, or choose another --name"
            ) from error

    @torch.no_grad()
    def _restore(self, found: Checkpoint) -> None:
        parameters, weights = self.optimization.parameters, found.tensors["policy"]
        expected = {name: (weight.shape, weight.dtype) for name, weight in parameters.items()}
        if {name: (weight.shape, weight.dtype) for name, weight in weights.items()} != expected:
            raise UserError("the checkpoint holds other weights than this run trains: choose another --name")
        states = found.state["tasks"]
        if states.keys() != self.tasks.keys():
            named = [", ".join(filter(None, each)) or "none" for each in (states, self.tasks)]
            raise UserError(f"the run began with other tasks (further ones: {named[0]}; now {named[1]}): choose another --name")
        if "began_from" in found.state:  # which an older version did not know
            self.beginnings.check(found.state["began_from"], self._config.checkpoint.allow_changes)
        for name, task in self.tasks.items():
            task.check(states[name])
        if self.pretraining:
            self.pretraining.restore(found.state["pretraining"])
        for name, parameter in parameters.items():
            parameter.copy_(like(parameter, weights[name]))
        self.copies.load(found.tensors.get("copies", {}), like)
        self.optimization.load_tensors(found.tensors["optimizer"], found.state["updates"])
        for name, task in self.tasks.items():
            task.restore(states[name])
