"""Silent failures of a run, read off its metrics: each is a rule on the lines of metrics.jsonl, and nothing else is remembered.

So a run that is taken up again replays the lines that it kept, and raises no alarm twice. docs/doctor.md lists the rules.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusionrl.config import TrainConfig
from diffusionrl.runs.signal import COSINE, SAMPLES, UPDATES, signal_of

PATIENCE = 3
"""Steps in a row that a rule must find wrong: one batch may be so by chance."""
VARIATION = 0.01
"""A reward varies no more once its standard deviation in a step is below this share of the largest so far: divided by so
little, the noise of the reward is what is learned."""
ROUNDING = 1e-6
"""Relative to the mean: equal scores of a network in float32 may seem to differ by as much."""
_AS_ROUNDING = ", no more than the rounding of float32: if that is what is meant, subtract a constant in the reward"
IDLE = 0.5
"""Share of prompts without any advantage: beyond it, most of what is sampled and scored teaches nothing."""
FALLEN = 0.005
"""Of the denoising loss, or of a log-probability: chosen and rejected samples are both less likely than to the reference model
once both have lost as much."""
CLIPPED = 0.5
"""Share of ratios beyond the clip."""
LONGER = 1.15
"""Length of a prediction relative to the reference model's: regressions and preferences have been seen to inflate it by 5 to
15 %."""

WALK = 0.8
"""Share of the weights' squared displacement that is random walk."""


@dataclass(frozen=True)
class Alarm:
    """A silent failure: the step whose line gave it away, which kind, and what to do."""

    step: int
    kind: str
    message: str


def ratio_tolerance(config: TrainConfig) -> float:
    """How far from 1 the ratio may be before the first update of a step.

    1e-5 where only the rounding of float32 is in it (DESIGN.md, rule 2). Sums over the latent dimensions and bfloat16 round
    more coarsely; there, it must not use up more than a tenth of the clip range.
    """
    exact = config.policy.dtype == "float32" and getattr(config.algorithm, "logprob_reduction", "mean") == "mean"
    return 1e-5 if exact else max(1e-5, 0.1 * getattr(config.algorithm, "clip_range", 0.0))


class Watch:
    """Sees a run's lines of metrics in order and says what is newly wrong.

    An alarm of one kind is raised once, and again only after it went away.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._streaks: dict[str, int] = {}
        self._raised: set[str] = set()
        self._largest_std = 0.0
        self._signals: list[dict[str, Any]] = []

    def see(self, line: dict[str, Any]) -> list[Alarm]:
        """The alarms that this line raises."""
        found = []
        self._signals.append({key: line[key] for key in (COSINE, UPDATES, SAMPLES) if key in line})
        for kind, patience, message in self._judge(line):
            if message is None:
                self._streaks[kind] = 0
                self._raised.discard(kind)
                continue
            self._streaks[kind] = self._streaks.get(kind, 0) + 1
            if self._streaks[kind] >= patience and kind not in self._raised:
                self._raised.add(kind)
                found.append(Alarm(line["step"], kind, message))
        return found

    def _judge(self, line: dict[str, Any]) -> Iterator[tuple[str, int, str | None]]:
        """(kind, patience, what is wrong or None) of every rule that the line has figures for.

        A reward that tells nothing apart explains idle prompts, no gradient and a still policy, so it is named alone.
        """
        if line["step"] == 0 and line.get("eval/reward_se") is not None:
            yield "constant-reward", 1, self._first_evaluation(line["eval/reward"], line["eval/reward_se"])
        if line.get("reward/std") is None or self.config.samples_per_step - line["reward/invalid"] < 2:
            return
        constant = self._constant(line["reward/mean"], line["reward/std"])
        yield "constant-reward", PATIENCE, constant
        yield "idle-prompts", PATIENCE, None if constant else self._idle(line)
        if line.get("grad_rms") is not None:
            yield "small-gradient", PATIENCE, None if constant else self._gradient(line["grad_rms"])
        if line.get("policy/chosen_gain") is not None and line.get("policy/rejected_gain") is not None:
            yield "both-falling", PATIENCE, self._falling(line)
        several = "ratio/max_gap" in line and getattr(self.config.algorithm, "updates_per_step", 1) > 1
        distance = line.get("eval/kl_per_step", line.get("eval/prediction_distance"))  # an ODE has no KL
        if not several and distance is not None:
            yield "policy-still", 1, None if constant else self._unmoved(line["step"], distance)
        if line.get("eval/prediction_norm") is not None:
            yield "longer-predictions", 1, self._longer(line["eval/prediction_norm"])
        if any(key.endswith("_from_peak") for key in line):
            yield "drifting", 1, None if constant else self._drifting(line)
        for key in line:
            if key.startswith("policy/decay_of_"):
                yield f"copy-{key.removeprefix('policy/decay_of_')}", PATIENCE, None if constant else self._copy(line, key)
        if line.get("ratio/max_gap") is not None:
            off = self._ratio(line["ratio/max_gap"])
            yield "ratio", 1, off
            if several:
                yield "policy-still", PATIENCE, None if constant or off else self._still(line)
            yield "clip-fraction", PATIENCE, self._clipped(line)

    def _first_evaluation(self, mean: float, standard_error: float) -> str | None:
        if standard_error > ROUNDING * abs(mean):
            return None
        if standard_error:
            return f"the scores of the first evaluation differ by {standard_error:.3g} around {mean:.6g}{_AS_ROUNDING}"
        return "the reward gave every image of the first evaluation the same score: nothing can be learned from it"

    def _constant(self, mean: float, std: float) -> str | None:
        self._largest_std = max(self._largest_std, std)
        if std > VARIATION * self._largest_std and std > ROUNDING * abs(mean):
            return None
        if 0 < std <= ROUNDING * abs(mean):
            return f"the rewards of a step differ by {std:.3g} around {mean:.6g}{_AS_ROUNDING}"
        was = f"the standard deviation of a step's rewards is {std:.3g}, and was {self._largest_std:.3g}"
        return f"the reward no longer varies: {was}. It is saturated or broken: stop here, and look at the samples"

    def _idle(self, line: dict[str, Any]) -> str | None:
        idle, prompts = line.get("advantage/idle_prompts"), line.get("advantage/prompts")
        # An algorithm that trains on the best samples alone leaves prompts out on purpose; those with a ratio do not.
        if not prompts or idle < IDLE * prompts or "ratio/max_gap" not in line:
            return None
        return (
            f"{idle} of {prompts} prompts have no advantage, as all their samples score alike: "
            "raise samples_per_prompt, or choose a reward or prompts that differ more"
        )

    def _gradient(self, rms: float) -> str | None:
        epsilon = self.config.optimizer.epsilon
        if rms >= epsilon:
            return None
        if rms == 0:
            return "there is no gradient: nothing that is trained has a part in the loss. Try diffusionrl doctor"
        return (
            f"the gradient's root mean square is {rms:.1e}, below optimizer.epsilon {epsilon:.0e}, which then shortens "
            "every step: lower it, for instance to 1e-15"
        )

    def _falling(self, line: dict[str, Any]) -> str | None:
        """A preference is learnt by telling samples apart, which can be done by forgetting both, one faster than the other."""
        chosen, rejected = line["policy/chosen_gain"], line["policy/rejected_gain"]
        if max(chosen, rejected) > -FALLEN * line.get("policy/denoising_loss", 1.0):
            return None
        return (
            f"chosen and rejected samples are both less likely than to the reference model (by {-chosen:.2g} and "
            f"{-rejected:.2g}): raise algorithm.beta, or lower optimizer.learning_rate"
        )

    def _ratio(self, gap: float) -> str | None:
        tolerance = ratio_tolerance(self.config)
        if gap <= tolerance:
            return None
        return (
            f"the ratio is off by {gap:.1e} before the first update, more than rounding ({tolerance:.0e}): the samples are "
            "not the policy's. Try policy.dtype float32, and diffusionrl doctor"
        )

    def _still(self, line: dict[str, Any]) -> str | None:
        """Between two updates of a step the ratio moves, unless the policy does not; a gap of rounding is no movement."""
        kl = line.get("policy/approx_kl")
        if kl is None or kl > 0.5 * line["ratio/max_gap"] ** 2:
            return None
        return "the policy does not move: the new one is equal to the old one. Raise optimizer.learning_rate"

    def _unmoved(self, step: int, distance: float) -> str | None:
        """Where no ratio is seen between two updates of a step, evaluations tell."""
        if distance != 0:
            return None
        return (
            f"the policy has not moved: after {step} steps it predicts what it did before training, to the bit. "
            "Raise optimizer.learning_rate"
        )

    def _longer(self, norm: float) -> str | None:
        if norm <= LONGER:
            return None
        return (
            f"the policy's predictions are {norm - 1:.0%} longer than the reference model's: images turn harsh. Hold it with "
            "algorithm.reference_weight or kl_weight, or lower optimizer.learning_rate"
        )

    def _drifting(self, line: dict[str, Any]) -> str | None:
        """Scores fall though nothing pushes them, as weights that move at random make worse images."""
        signal, name = signal_of(self._signals), fallen_score(line)
        if signal is None or name is None or (signal.is_seen and signal.walk() < WALK):
            return None
        if signal.is_seen:
            moved = f"{signal.walk():.0%} of what {signal.updates:,} updates moved is random walk"
        else:
            moved = f"no signal is seen in {signal.updates:,} updates, whose halves agree by chance"
        return (
            f"{name} falls, and {moved}: that is drift. Lower optimizer.learning_rate, raise the samples of a step (now "
            f"{signal.samples:,.0f} an update), or lower sampling.guidance, under which samples differ little"
        )

    def _copy(self, line: dict[str, Any], key: str) -> str | None:
        """A copy that lags behind must differ from the policy once there were updates."""
        name = key.removeprefix("policy/decay_of_")
        distance = line.get(f"policy/distance_from_{name}")
        if distance is None or distance > 0 or line[key] == 0 or line["step"] == 1:
            return None
        return (
            f"the policy is equal to its copy {name!r}, which should lag behind it: the updates do not reach the weights, or "
            "the copy follows at once"
        )

    def _clipped(self, line: dict[str, Any]) -> str | None:
        share = line.get("policy/clip_fraction")
        if share is None or share < CLIPPED:
            return None
        return (
            f"{share:.0%} of the ratios are beyond the clip range, where they teach nothing: "
            "lower optimizer.learning_rate or algorithm.updates_per_step"
        )


def fallen_score(line: dict[str, Any]) -> str | None:
    """The held-out score that is below its peak by more than two standard errors; of several, the one that is so by most."""
    found = {}
    for key, difference in line.items():
        error = line.get(f"{key}_se")
        if key.startswith("eval/") and key.endswith("_from_peak") and difference is not None and error:
            found[key.removeprefix("eval/").removesuffix("_from_peak")] = difference / error
    worst = min(found, key=lambda name: found[name], default=None)
    return worst if worst is not None and found[worst] < -2 else None
