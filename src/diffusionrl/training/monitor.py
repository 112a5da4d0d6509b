"""The evaluations of one run: on the fixed seeds, compared with the ones before, measured beside the reward, and judged.

Nothing is remembered here that is not in the run folder, so a run that is taken up again goes on as if it had not stopped.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionrl import processes
from diffusionrl.config import MIN_PAIRS, TrainConfig
from diffusionrl.errors import UserError
from diffusionrl.evaluation import fixed_states
from diffusionrl.evaluation.fixed_seed import Evaluation, by_group, evaluate, finite_or_none, mean_and_error, write_samples
from diffusionrl.evaluation.guard import Verdict, judge, peak_of
from diffusionrl.evaluation.measures import distance_from_reference, diversity, image_statistics
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.rewards import Mixture
from diffusionrl.runs import checkpoint
from diffusionrl.runs.folder import RunFolder
from diffusionrl.runs.lines import read_metrics
from diffusionrl.training.tasks import Task

Values = dict[str, Tensor]
Embed = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to embeddings of length 1, (B, D)."""


class Monitor:
    """``evaluate`` at every evaluation; ``verdict`` is the guard's of the last one.

    What is compared, watched and judged is the first task's; of the others, the rewards are measured.

    Args:
        embed: for the diversity; None leaves it out.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: Sequence[Task],
        config: TrainConfig,
        held_out: Mixture | None = None,
        embed: Embed | None = None,
    ) -> None:
        self.policy, self.tasks, self.config = policy, tasks, config
        self.held_out, self.embed = held_out, embed
        self.verdict = Verdict()
        self._states: fixed_states.FixedStates | None = None
        try:
            with policy.reference():
                self.has_reference = True
        except UserError:  # full fine-tuning keeps none
            self.has_reference = False

    def recall(self, run_dir: Path) -> None:
        """Take the verdict from what the run folder says. With other settings of the guard than before, its best weights may be
        ones that were not kept: the best of those that were are taken, and that is said."""
        if (run_dir / "metrics.jsonl").is_file():
            lines, settings = evaluations_in(run_dir), (self.config.watched, self.config.guard)
            self.verdict = judge(lines, *settings, checkpoint.complete_steps(run_dir))
            best = judge(lines, *settings).best
            if best != self.verdict.best:
                kept = "no other" if self.verdict.best is None else f"step {self.verdict.best}"
                print(
                    f"warning: the guard's best is step {best}, whose weights were not kept; it takes {kept}", file=sys.stderr
                )
        self._tell_verdict()

    def _tell_verdict(self) -> None:
        """The main process judges, and all stop by it."""
        said = processes.tell(asdict(self.verdict))
        self.verdict = Verdict(**said | {"fallen": tuple(said["fallen"])})

    def exported_step(self, last: int) -> int:
        """Whose weights are to be exported: those of the ``last`` step; where the guard may stop the run, its best ones."""
        best = self.verdict.best if self.config.guard.stop else None
        return last if best is None else min(best, last)

    def ending(self, last: int) -> dict[str, Any]:
        """What finished.json says of a run whose ``last`` step is done."""
        ending: dict[str, Any] = {"steps": last, "exported_step": self.exported_step(last)}
        if not self.verdict.stop:
            return ending
        return ending | {"stopped": self.verdict.message}

    def evaluate(self, step: int, folder: RunFolder) -> dict[str, float]:
        """Evaluate on the fixed seeds, keep the samples, raise the guard's alarm if one is due. Returns the metrics; beside the
        main process, the reward's mean alone.

        Raises:
            RunStopped: see ``Task.require_scores``; nothing is kept of the evaluation.
        """
        began = time.perf_counter()
        found = [self._evaluate(task, step) for task in self.tasks]
        metrics = self._record(step, folder, found, began) if processes.is_main() else {"eval/reward": found[0].mean}
        self._tell_verdict()
        return metrics

    def _record(self, step: int, folder: RunFolder, evaluations: Sequence[Evaluation], began: float) -> dict[str, float]:
        """Measure, compare, judge and write."""
        config, samples, sampled = self.config, folder.run_dir / "samples" / f"step_{step:06d}", time.perf_counter()
        found = evaluations[0]
        found = replace(found, statistics=image_statistics(found.rollout.images) if found.rollout.show is None else {})
        metrics = found.metrics() | self._measures(found)
        before = evaluations_in(folder.run_dir)
        earlier = partial(read_samples, folder.run_dir)
        metrics |= compare(found.by_sample, before, earlier, config.watched, found.group_sizes)
        measured = time.perf_counter()
        failed = write_samples(found, samples)
        if failed is not None:
            folder.alarm(step, "show", f"no pictures of the samples: {failed}")
        line = {key: finite_or_none(value) for key, value in metrics.items()}
        kept = {*checkpoint.complete_steps(folder.run_dir), step}
        self.verdict = judge([*before, {"step": step} | line], config.watched, config.guard, kept)
        if self.verdict.alarm is not None:
            folder.alarm(step, self.verdict.alarm, self.verdict.message)
        if config.watched:
            metrics |= {"guard/streak": self.verdict.streak}
        if self.verdict.best is not None:
            metrics |= {"guard/best_step": self.verdict.best}
        for task, further in zip(self.tasks[1:], evaluations[1:], strict=True):
            write_samples(further, samples / task.name)
            metrics |= {key.replace("eval/", f"eval/{task.prefix}", 1): value for key, value in further.metrics().items()}
        return metrics | {"time/evaluation": time.perf_counter() - began, "time/measures": measured - sampled}

    def _evaluate(self, task: Task, step: int) -> Evaluation:
        """On the task's fixed seeds and prompts. The first time, its reward is normalised by it if that is asked for."""
        config, first = self.config, task is self.tasks[0]
        found = evaluate(
            self.policy,
            task.reward,
            task.prompts,
            config.evaluation.num_samples,
            config.sampling,
            task.seed,
            self.held_out if first else None,
            config.rewards.timeout,
            config.evaluation.samples_per_prompt,
            "trajectories" if first and self.has_reference else "endpoints",
        )
        task.require_scores(found.rollout, step)
        if step == 0 and config.rewards.normalise:
            try:
                found = found.rescored(task.reward.calibrate(found.rollout.scores))
            except UserError as error:
                raise UserError(f"{task.settings.whose}{error}") from error
        return found

    def _measures(self, found: Evaluation) -> dict[str, float]:
        rollout, sampling = found.rollout, self.config.sampling
        measures: dict[str, float] = {}
        if self.embed is not None and rollout.kind in ("image", "video"):
            images = rollout.images if rollout.images.ndim == 4 else rollout.images[:, rollout.images.shape[1] // 2]
            with torch.no_grad():
                embeddings = torch.cat([self.embed(images[part]) for part in chunks(len(images), sampling.batch_size)])
            measures |= diversity(embeddings, [prompt.key for prompt in rollout.prompts])
        if self.has_reference:
            measures |= self._fixed_states().distance(self.policy)
            measures |= distance_from_reference(self.policy, rollout, sampling.guidance, sampling.batch_size)
        return {f"eval/{name}": value for name, value in measures.items()}

    def _fixed_states(self) -> fixed_states.FixedStates:
        """The same in every evaluation, and in a run that is taken up again."""
        if self._states is None:
            task, count = self.tasks[0], min(fixed_states.TRAJECTORIES, self.config.evaluation.num_samples)
            prompts = [task.prompts[i % len(task.prompts)] for i in range(count)]
            self._states = fixed_states.fix_states(self.policy, prompts, self.config.sampling, task.seed)
        return self._states


def compare(
    now: Values,
    before: Sequence[Mapping[str, Any]],
    samples_of: Callable[[int], Values],
    watched: Sequence[str],
    group_sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Paired differences of the newest evaluation: of everything from the first one (``eval/NAME_change``), and of the watched
    scores from their highest one so far (``eval/NAME_from_peak``), each with its standard error; and the standard deviation
    between images at that highest one (``eval/NAME_peak_std``).

    Args:
        now: by name, (N,), NaN where invalid.
        before: the metrics of the evaluations before this one, oldest first.
        samples_of: the values of an earlier evaluation by its step.
        group_sizes: see ``Evaluation``.
    """
    if not before:
        return {}
    sizes = group_sizes or {}
    differences, spreads = {}, {}
    first = samples_of(before[0]["step"])
    for name, values in now.items():
        differences[f"eval/{name}_change"] = paired(values, first.get(name), sizes.get(name, 1))
    for name in watched:
        peak = peak_of(before, name)
        if peak is not None and name in now:
            then = samples_of(peak["step"]).get(name)
            differences[f"eval/{name}_from_peak"] = paired(now[name], then, sizes.get(name, 1))
            spreads[f"eval/{name}_peak_std"] = spread(then, sizes.get(name, 1))
    pairs = {f"{key}{end}": each for key, pair in differences.items() for end, each in zip(("", "_se"), pair, strict=True)}
    return pairs | spreads


def spread(values: Tensor | None, group_size: int = 1) -> float:
    """Standard deviation of the valid ones, sample by sample or group by group; NaN with fewer than two."""
    each = by_group(torch.empty(0) if values is None else values.double(), group_size)
    return each[each.isfinite()].std().item() if int(each.isfinite().sum()) > 1 else float("nan")


def paired(now: Tensor, then: Tensor | None, group_size: int = 1) -> tuple[float, float]:
    """Mean of the differences sample by sample, or group by group, and its standard error; NaN with fewer than ``MIN_PAIRS``
    valid pairs."""
    if then is None or len(then) != len(now):
        return float("nan"), float("nan")
    gaps = by_group(now.double() - then.double(), group_size)
    return mean_and_error(gaps) if int(gaps.isfinite().sum()) >= MIN_PAIRS else (float("nan"), float("nan"))


def evaluations_in(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run's evaluations, oldest first."""
    if not (run_dir / "metrics.jsonl").is_file():
        return []
    return [line for line in read_metrics(run_dir) if "eval/reward" in line]


def read_samples(run_dir: Path, step: int) -> Values:
    """What samples.jsonl says of an evaluation; nothing where it is gone."""
    file = run_dir / "samples" / f"step_{step:06d}" / "samples.jsonl"
    if not file.is_file():
        return {}
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    numbers = [name for name in entries[0] if name not in ("index", "prompt", "valid")]
    return {
        name: torch.tensor([float("nan") if entry[name] is None else entry[name] for entry in entries], dtype=torch.float64)
        for name in numbers
    }
