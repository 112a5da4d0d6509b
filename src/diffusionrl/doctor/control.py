"""What noise does at the run's own rate: a few of its steps on a reward of noise, and how far they move its scores."""

import math
from dataclasses import dataclass

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import RewardGradientConfig, TrainConfig
from diffusionrl.doctor.findings import Finding
from diffusionrl.errors import RunStopped, require
from diffusionrl.evaluation.fixed_seed import Evaluation, by_group, evaluate
from diffusionrl.evaluation.intervals import differences, overall
from diffusionrl.rewards import as_mixture, load_reward
from diffusionrl.training.optimization import NonFiniteError
from diffusionrl.training.step import TrainingStep
from diffusionrl.training.tasks import Task
from diffusionrl.training.trainer import Trainer

STEPS = 5
_MATTERS = 0.1  # standard deviations between images, over the steps


def require_control(config: TrainConfig, algorithm: Algorithm | None) -> None:
    """Raises UserError where noise cannot take the reward's place; ``algorithm``: the one that was handed over."""
    gradient = isinstance(config.algorithm, RewardGradientConfig) if algorithm is None else algorithm.needs_reward_gradient
    name = config.algorithm.name if algorithm is None else type(algorithm).__name__
    require(not gradient, f"algorithm {name} follows the reward's gradient, and noise has none: leave --control out")
    require(not config.preferences, "preferences are judged images, which no noise can take the place of: leave --control out")


@dataclass(frozen=True)
class Moved:
    """A score, over the steps.

    Attributes:
        change: of its mean over the fixed seeds.
        half: of that mean's 95 % interval.
        spread: the standard deviation between images before.
    """

    name: str
    change: float
    half: float
    spread: float

    @property
    def matters(self) -> bool:
        return abs(self.change) > max(self.half, _MATTERS * self.spread)

    def __str__(self) -> str:
        per_step, half = self.change / STEPS, self.half / STEPS
        places = min(9, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3
        return f"{self.name} by {per_step:+.{places}f} ± {half:.{places}f}"


def check_control(trainer: Trainer) -> Finding:
    """Trains the first steps of the run on noise, with the warm-up behind them, from the weights that are there."""
    config = trainer.config
    before = _evaluate(trainer)
    trainer.state.optimization.updates = config.optimizer.warmup
    noise = as_mixture(load_reward("noise", config.rewards))
    tasks = [Task(each.settings, each.prompts, noise, each.algorithm, config) for each in trainer.tasks]
    step = TrainingStep(trainer.policy, tasks, config, trainer.state.optimization, trainer.pretraining)
    remedy = "lower optimizer.learning_rate, or take more samples a step"
    try:
        for number in range(1, STEPS + 1):
            step(number)
    except (NonFiniteError, RunStopped) as error:
        return Finding("fail", "control", f"{STEPS} steps on a reward of noise break the model: {error}", remedy)
    found = _compare(before, _evaluate(trainer), next(iter(trainer.reward.rewards)))
    moved = ", ".join(map(str, found)) or "nothing that has a score"
    told = f"at this rate a reward of noise moves {moved} a step (95 %, of {STEPS} steps)"
    if any(each.matters for each in found):
        return Finding("warn", "control", told, f"that much is drift: {remedy}")
    return Finding("pass", "control", told)


def _evaluate(trainer: Trainer) -> Evaluation:
    """The first task's rewards and those held out, on the run's fixed seeds."""
    config, task = trainer.config, trainer.tasks[0]
    settings, limit = config.evaluation, config.rewards.timeout
    asked = (trainer.policy, task.reward, task.prompts, settings.num_samples, config.sampling, task.seed)
    return evaluate(*asked, trainer.monitor.held_out, limit, settings.samples_per_prompt)


def _compare(before: Evaluation, after: Evaluation, only: str) -> list[Moved]:
    """Score by score; where there is one reward, it is the one named ``only``."""
    found = []
    prompts = [prompt.text for prompt in before.rollout.prompts]
    for name, values in before.by_sample.items():
        if name == "reward" and len(before.rollout.scores.parts) > 1:  # whose parts are there
            continue
        size = before.group_sizes.get(name, 1)
        then, now = (by_group(each, size).double() for each in (values, after.by_sample[name]))
        change = overall(differences(now.tolist(), then.tolist()), prompts[::size])
        spread = then[then.isfinite()].std().item()
        if math.isfinite(change.high):
            found.append(Moved(only if name == "reward" else name, change.value, change.high - change.value, spread))
    return found
