"""Everything that a training step changes, in one place, so that nothing of it is missing from a checkpoint."""

import hashlib
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from diffusionrl import processes
from diffusionrl.config import TrainConfig
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.policies.base import Policy
from diffusionrl.processes import like
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.training.optimization import Optimization
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.tasks import Task


class TrainingState:
    """Weights, older copies of them, optimizer, and what belongs to each task: the algorithm's own state, the reward's
    normalisation and counts, and the recent invalid samples; and what the pretraining loss passed over."""

    def __init__(
        self, policy: Policy, tasks: Sequence[Task], config: TrainConfig, pretraining: Pretraining | None = None
    ) -> None:
        self.tasks, self.pretraining = {task.name: task for task in tasks}, pretraining
        self.optimization = Optimization(policy.trainable(), config.optimizer)
        self.copies, self._lora, self._config = policy.copies, policy.about.get("lora"), config

    def capture(self, step: int, score: float | None = None) -> Checkpoint:
        """A copy of it all, on the CPU; ``score`` is the evaluation's after this step, if there was one. Of several processes,
        the main one has the copy; the others help.

        Raises:
            RunStopped: the processes have different weights.
        """
        self._compare(step)
        state = {
            "updates": self.optimization.updates,
            "tasks": {name: task.capture() for name, task in self.tasks.items()},
            "pretraining": self.pretraining.capture() if self.pretraining else None,
            "lora": self._lora,
            "score": score,
        }
        tensors = {
            "policy": processes.copies(self.optimization.parameters),
            "optimizer": processes.copies(self.optimization.tensors()),
        }
        older = processes.copies(self.copies.tensors())
        if older:
            tensors["copies"] = older
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

    @torch.no_grad()
    def restore(self, found: Checkpoint) -> None:
        """Be as at ``capture``.

        Raises:
            UserError: the checkpoint is of other weights, of other tasks, of other prompts, or began from another LoRA.
        """
        parameters, weights = self.optimization.parameters, found.tensors["policy"]
        if {name: p.shape for name, p in parameters.items()} != {name: w.shape for name, w in weights.items()}:
            raise UserError("the checkpoint holds other weights than this run trains: choose another --name")
        states = found.state["tasks"]
        if states.keys() != self.tasks.keys():
            named = [", ".join(filter(None, each)) or "none" for each in (states, self.tasks)]
            raise UserError(f"the run began with other tasks (further ones: {named[0]}; now {named[1]}): choose another --name")
        if found.state["lora"] != self._lora and not self._config.checkpoint.allow_changes:
            raise UserError(
                "the file of policy.lora is not the one that the run began with: choose another --name, or go on all the same "
                "with --checkpoint.allow-changes"
            )
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
