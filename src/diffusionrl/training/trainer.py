"""The loop. It knows no algorithm, no reward and no model by name."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffusionrl import interruption, processes
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import TrainConfig
from diffusionrl.data.pairs import Pairs
from diffusionrl.data.preferences import Preferences
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import RunStopped, clean
from diffusionrl.evaluation import recent
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture, Reward, as_mixture
from diffusionrl.runs import checkpoint
from diffusionrl.runs.card import write_card
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.runs.folder import RunFolder, TrainResult, tell_result
from diffusionrl.training.monitor import Embed, Monitor
from diffusionrl.training.optimization import NonFiniteError
from diffusionrl.training.preferences import JudgedImages
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.state import TrainingState
from diffusionrl.training.step import AVERAGE, TrainingStep
from diffusionrl.training.tasks import BrokenModel, Task


class Trainer:
    """One run: ``Trainer(...).run(folder)``. Reward, prompts and algorithm are the first task's, ``further`` the other
    tasks; ``pairs`` are for the pretraining loss, ``preferences`` take the place of the first task's samples."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward | Mixture,
        prompts: Sequence[Prompt],
        algorithm: Algorithm,
        config: TrainConfig,
        held_out: Mixture | None = None,
        embed: Embed | None = None,
        further: Sequence[Task] = (),
        pairs: Pairs | None = None,
        preferences: Preferences | None = None,
    ) -> None:
        self.policy, self.prompts, self.algorithm, self.config = policy, prompts, algorithm, config
        self.reward = as_mixture(reward)
        judged = JudgedImages(preferences, config) if preferences is not None else None
        self.tasks = [Task(config.all_tasks[0], prompts, self.reward, algorithm, config, judged), *further]
        self.monitor = Monitor(policy, self.tasks, config, held_out, embed)
        self.pretraining = Pretraining(pairs, config, algorithm.micro_batch_size) if pairs is not None else None
        self.state = TrainingState(policy, self.tasks, config, self.pretraining, held_out)
        self.training = TrainingStep(policy, self.tasks, config, self.state.optimization, self.pretraining)
        # What the step in progress began from, or, of sharded weights, the newest checkpoint; None before the first evaluation.
        self.at_start: Checkpoint | None = None

    def run(self, folder: RunFolder) -> TrainResult:
        """Train to the end, from the folder's newest checkpoint if it has one. The weights are exported however it ends.

        Raises:
            UserError: the disk is too small.
            RunStopped: too many samples without a valid score, a loss or gradient that is not finite, too little memory on the
                device, or a disk that cannot be written to. What was done before the step that failed is saved, unless
                weights are sharded.
            Interrupted: a signal asked for it; the steps that were done are saved, unless weights are sharded.
        """
        found = checkpoint.tell(folder.find_checkpoint())
        folder.check_disk(self.disk_need(folder.run_dir))
        if found is not None:
            self.state.restore(found)
            folder.say(f"going on after step {found.step}")
        self.at_start = found
        try:
            folder.begin(found.step if found else None, self.policy.device, self.policy.about)
            self.monitor.recall(folder.run_dir)
            interruption.begin_polling()
            done = self._steps(folder)
            self._export(folder)
            folder.finish(self.monitor.ending(done))
        except OSError as error:
            with suppress(OSError, RunStopped):
                self._rescue(folder)
            free = checkpoint.free_bytes(folder.run_dir) / 1e6
            raise RunStopped(
                f"{folder.run_dir} cannot be written to: {error}; {free:.1f} MB are free. "
                "Make room and give the same command again"
            ) from error
        except BrokenModel as error:
            self._step_back(folder, error.step)
            self._rescue(folder)
            raise
        except torch.OutOfMemoryError as error:
            self._rescue(folder)
            raise RunStopped(self._out_of_memory(error)) from error
        except BaseException:
            self._rescue(folder)
            raise
        return tell_result(folder.run_dir)

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        batch, micro = self.config.sampling.batch_size, self.algorithm.micro_batch_size
        smaller = f"--sampling.batch-size {max(1, batch // 2)} --algorithm.micro-batch-size {max(1, micro // 2)}"
        checkpointing = "" if self.config.policy.gradient_checkpointing else " --policy.gradient-checkpointing"
        return (
            f"{clean(error)} What was done is kept: go on with the same command and {smaller}{checkpointing} "
            "--checkpoint.allow-changes, which change memory and speed, not what is learned; diffusionrl doctor says what fits"
        )

    def _step_back(self, folder: RunFolder, broken: int) -> None:
        """The weights of step ``broken`` make images that are not finite. Where they are what is left, they are forgotten, for
        the checkpoint before them if there is one."""
        if self.at_start is None or self.at_start.step != broken or broken == 0:
            return
        if processes.is_main():
            checkpoint.forget(folder.run_dir, self.at_start.step)
        self.at_start = checkpoint.tell(checkpoint.load_newest(folder.run_dir, exact=False) if processes.is_main() else None)

    def _rescue(self, folder: RunFolder) -> None:
        """Whatever ended the run, the steps that were done are kept. Sharded weights are not there to be kept without the other
        processes, which may be gone: of them, there are the checkpoints.

        Raises:
            RunStopped: they cannot be written.
        """
        if self.at_start is None or not processes.is_main():
            return
        folder.save(self.at_start)
        if self.state.optimization.sharded:  # the run that goes on from here exports
            return
        self.state.restore(self.at_start)
        try:
            self._export(folder)
        except OSError as error:
            raise RunStopped(f"the checkpoint is saved, but the weights cannot be exported: {error}") from error

    def _steps(self, folder: RunFolder) -> int:
        """Returns how many steps are done at the end."""
        if self.at_start is None:
            count = self.config.evaluation.num_samples
            folder.say(f"{folder.run_dir}: {count} images before training, then {self.config.last_step} steps")
            folder.log({"step": 0, "queries": 0} | self._evaluate(0, folder))
            self.at_start = self.state.capture(0)  # with the reward's normalisation
            if self.monitor.verdict.best == 0:
                folder.save(self.at_start)
        steps, first = self.config.last_step, self.at_start.step + 1
        if first > steps and self.at_start.state["score"] is None:  # stopped here, where it was not to be evaluated
            folder.log({"step": steps, "queries": self.training.queries(steps)} | self._evaluate(steps, folder))
        for step in range(first, steps + 1):
            if self.monitor.verdict.stop:
                break
            try:
                metrics = self.step(step, folder.run_dir / "samples" if processes.is_main() else None)
            except NonFiniteError as error:
                raise RunStopped(
                    f"{error} not finite in step {step}; the weights are as before it, and the batch is in "
                    f"{error.save(folder.run_dir / 'debug' / f'step_{step:06d}')}. "
                    "Try a lower optimizer.learning_rate or policy.dtype float32, with --checkpoint.allow-changes"
                ) from error
            every, last = self.config.evaluation.every, step == steps
            if last or (every and step % every == 0):
                metrics |= self._evaluate(step, folder)
            folder.log(metrics)
            verdict = self.monitor.verdict
            due = last or verdict.stop or verdict.best == step or step % self.config.checkpoint.every == 0
            if due or not self.state.optimization.sharded:  # which all processes have to gather
                self.at_start = self.state.capture(step, metrics.get("eval/reward"))
            if due:
                folder.save(self.at_start)
                folder.prune(verdict.best)
        return self.at_start.step

    def _export(self, folder: RunFolder) -> None:
        """The weights that the monitor chooses.

        Raises:
            RunStopped: they are the guard's best ones, and their checkpoint is corrupted or gone.
        """
        assert self.at_start is not None
        sharded, main = self.state.optimization.sharded, processes.is_main()
        if not (main or sharded):
            return
        chosen = self.monitor.exported_step(self.at_start.step)
        try:
            if chosen != self.at_start.step:
                best = checkpoint.load(checkpoint.folder_of(folder.run_dir, chosen)) if main else None
                best = checkpoint.tell(best) if sharded else best
                assert best is not None
                self.state.restore(best)
            with self._averaged():
                self.policy.export(folder.run_dir / "export")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        except checkpoint.Corrupted as error:
            raise RunStopped(
                f"the guard's best weights cannot be exported: {error}. --guard.no-stop exports the last"
            ) from error
        if main:
            write_card(folder.run_dir, chosen)

    def _evaluate(self, step: int, folder: RunFolder) -> dict[str, float]:
        with self._averaged():
            return self.monitor.evaluate(step, folder)

    def _averaged(self) -> AbstractContextManager[None]:
        """The policy as it is evaluated and exported: its average over the updates, where one is kept."""
        return self.policy.copies.used(AVERAGE) if AVERAGE in self.policy.copies else nullcontext()

    def disk_need(self, run_dir: Path) -> int:
        """Bytes that the run may write, beyond what is there: checkpoints, the export, and the samples of evaluations."""
        config = self.config
        weights = sum(parameter.nbytes for parameter in self.state.optimization.parameters.values())
        evaluations = 2 + (config.last_step // config.evaluation.every if config.evaluation.every else 0)
        count = len(self.tasks) * (evaluations * config.evaluation.num_samples + (recent.KEPT + 1) * 3 * recent.PICKED)
        images = count * math.prod(self.policy.sample_shape)
        there = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
        return 3 * weights * (config.checkpoint.keep + 2) + weights + images - there

    def step(self, step: int, samples: Path | None = None) -> dict[str, float]:
        """One training step; see ``TrainingStep``."""
        return self.training(step, samples)
