"""Better images from the same weights: search by best-of-N, Demon, or particles.

**Best-of-N** draws whole images. **Demon** (Yeh et al., arXiv 2410.05760) stays at one image: at each noisy step it scores what
K draws of the fresh noise z_k would lead to, and takes the step with

    z* = sqrt(N) * sum_k w_k z_k / ||sum_k w_k z_k||,      N the size of z

where w_k = tanh((R_k - mean R) / tau), or softmax(R / tau), or 1 for the best draw alone (the ablation). **Particles** are
sequential Monte Carlo as in FK steering (Singhal et al., arXiv 2501.06848): each has the weight exp((R - R before) / tau),
whose product over the rounds is exp(R / tau) at the end; systematic resampling; the best that arrives.

Where this is not the papers':

- Demon's step is a row of the sampler table, whatever the sampler and the path, in the place of Karras' SDE with its beta; of
  first order by default, of second by ``order``: Heun's mean direction, with the same fresh noise.
- Its ``tau`` is by default the standard deviation at the first step, as in the authors' code; by their text, at each step.
- What a noisy sample is worth is asked after ``lookahead`` steps of the ODE on the rest of the model's own grid (theirs: up to
  20, or 2 of a consistency model).
- A budget ends the search, from the noisiest step on; the rest is the ODE's.
- Candidates without a valid score have no weight; where none has one, the first is taken, as without a search.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.config.checks import LARGEST
from diffusionrl.config.search import BestOfNConfig, DemonConfig, ParticlesConfig, SearchConfig, ValueConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture, Reward, as_mixture
from diffusionrl.sampling.candidates import Case, Round, Spent

_ALIKE = 1e-8  # standard deviation of scores that do not differ, as in Demon's code


@dataclass(frozen=True)
class Found:
    """One image, as it is without a search and as it was found.

    Attributes:
        index: over all prompts and seeds, prompt by prompt.
        before, after: samples, float32 on the CPU, of the same seed: that of ``diffusionrl sample``, and what was found.
        scores: "before" and "after", each by name: "reward", and where there are several its parts, and held-out ones; NaN
            where invalid.
        rounds: of candidates, in order; of the whole group where the reward looks at groups.
        spent: on it; an equal share of what its group cost.
    """

    index: int
    prompt: Prompt
    seed: int
    before: Tensor
    after: Tensor
    scores: dict[str, dict[str, float]]
    rounds: list[Round]
    spent: Spent


def search(
    policy: Policy,
    reward: Reward | Mixture,
    prompts: Sequence[Prompt | str],
    seeds: Sequence[int] = (0,),
    config: SearchConfig | None = None,
    sampling: SamplingConfig | None = None,
    held_out: Mixture | None = None,
    rewards: RewardsConfig | None = None,
    done: Container[int] = (),
) -> Iterator[Found]:
    """For every prompt and seed an image that the reward likes better than what the model draws: each as soon as it is found.
    What is found for a prompt and a seed depends on nothing else (but for ``config.seconds``, on the clock).

    Args:
        policy: from ``load_policy``, or your own.
        reward: any function (images, prompts, metadata) -> scores, or a ``Mixture``. Where it looks at groups, the images of
            one prompt over all seeds are searched for together.
        config: which search, and its budget an image; Demon by default.
        held_out: rewards that score both images and are not searched with.
        rewards: "timeout" and "max_invalid" of it are used.
        done: indices that are left out.

    Raises:
        UserError: the sampler has no fresh noise, or there is no group for a reward that looks at groups.
        RunStopped: more than ``rewards.max_invalid`` of an image's scores were invalid, with the reward's own error.
    """
    config, sampling = config or DemonConfig(), sampling or SamplingConfig()
    rewards, mixture = rewards or RewardsConfig(), as_mixture(reward)
    check_search(mixture, held_out, prompts, seeds, config, sampling, rewards)
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    jobs = [(prompt, seed) for prompt in asked for seed in seeds]
    size = len(seeds) if mixture.grouped else 1
    lookahead = config.lookahead if isinstance(config, ValueConfig) else 1
    for first in range(0, len(jobs), size):
        indices = range(first, first + size)
        if all(index in done for index in indices):
            continue
        own_prompts, own_seeds = zip(*(jobs[index] for index in indices), strict=True)
        case = Case(policy, mixture, own_prompts, own_seeds, config, sampling, rewards.timeout, lookahead)
        for found in _find(case, indices, held_out, rewards.max_invalid):
            if found.index not in done:  # of a group, of which some may be
                yield found


def check_search(
    mixture: Mixture,
    held_out: Mixture | None,
    prompts: Sequence[Prompt | str],
    seeds: Sequence[int],
    config: SearchConfig,
    sampling: SamplingConfig,
    rewards: RewardsConfig,
) -> None:
    """Raises UserError where the parts of a search do not fit each other."""
    config.check_sampling(sampling)
    for what, given in (("prompts", prompts), ("seeds", seeds)):
        if not given:
            raise UserError(f"{what} names none: give one or more")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds names one twice: {', '.join(map(str, seeds))}")
    if rewards.normalise:
        raise UserError("rewards.normalise is by a run's first evaluation, and a search has none: give weights (NAME=WEIGHT)")
    mixture.require_groups(len(seeds), "the number of seeds", len(seeds) * len(prompts), "the number of images")
    if held_out is not None and held_out.grouped and not mixture.grouped:
        raise UserError(f"held_out names {held_out.grouped[0]}, which looks at groups, and the search is for single images")


def _find(case: Case, indices: range, held_out: Mixture | None, max_invalid: float) -> Iterator[Found]:
    start, noise = case.draw(0)
    before = case.decode(case.sample(start[None], noise[None], case.table))
    case.begin()
    after = case.decode(_METHODS[case.search.name](case)[None])
    case.look_at_the_clock()
    if case.spent.invalid > max_invalid * case.spent.queries:
        raise RunStopped(
            f"{case.spent.invalid} of {case.spent.queries} scores for {case.prompts[0].text!r} are invalid; the reward's last "
            f"error: {case.error}"
        )
    scores = {side: _scores(case, images, held_out) for side, images in (("before", before), ("after", after))}
    spent, size = case.spent, len(indices)
    share = Spent(spent.queries // size, spent.invalid // size, spent.denoisings // size, spent.seconds / size)
    for i, index in enumerate(indices):
        own = {side: {name: of[i] for name, of in each.items()} for side, each in scores.items()}
        yield Found(index, case.prompts[i], case.seeds[i], before[i], after[i], own, case.rounds, share)


def _scores(case: Case, images: Tensor, held_out: Mixture | None) -> dict[str, list[float]]:
    own = case.score(images)
    found = {"reward": torch.where(own.valid, own.values, torch.nan)} | (own.parts if len(own.parts) > 1 else {})
    if held_out is not None:
        found |= case.score(images, held_out).parts
    return {name: values.tolist() for name, values in found.items()}


# Methods: from a case to the latents of what was found, (S, ...)


def _best_of_n(case: Case) -> Tensor:
    drawn = 0
    size = max(1, case.sampling.batch_size // len(case.prompts))
    while count := next((n for n in range(size, 0, -1) if case.affords(n)), 0):
        starts, noise = (torch.stack(each) for each in zip(*map(case.draw, range(drawn, drawn + count)), strict=True))
        case.values(case.sample(starts, noise, case.table), len(case.table))
        drawn += count
    assert case.best is not None
    return case.best


def _demon(case: Case) -> Tensor:
    config, table = case.search, case.table
    assert isinstance(config, DemonConfig)
    tau, count = Temperature(config.tau), config.candidates
    noisy = table.grid.sigma > config.ode_after * table.grid.alpha
    x = case.draw(0)[0][None]
    for row in range(len(table)):
        if not (table.fresh[row] > 0 and noisy[row] and case.affords(count)):
            x = case.step(x, row, torch.zeros_like(x), case.ode, config.order)
            continue
        noise = case.noise(row, count)
        first = case.predict(x, row)  # of the one state that all steps here begin from
        values = case.values(case.step(x, row, noise, table, config.order, first), row + 1)
        blended = blend(noise, noise_weights(values, config.weights, tau))[None]
        x = case.step(x, row, blended, table, config.order, first)
    return case.best if config.keep == "best" and case.best is not None else x[0]


def _particles(case: Case) -> Tensor:
    config, table = case.search, case.table
    assert isinstance(config, ParticlesConfig)
    tau, count = Temperature(config.tau), config.candidates
    rounds = min(config.rounds, len(table), (config.queries or LARGEST) // count)
    stops = {len(table) * each // rounds for each in range(1, rounds)}
    x = torch.stack([case.draw(each)[0] for each in range(count)])
    worth = torch.zeros(count, dtype=torch.float64)
    for row in range(len(table)):
        x = case.step(x, row, case.noise(row, count), table)
        if row + 1 in stops and case.affords(2 * count):  # the end costs a round too
            values = case.values(x, row + 1)
            parents = resample(softmax_weights(values - worth, tau.of(values)), case.uniform(row))
            x, worth = x[parents.to(x.device)], torch.where(values.isnan(), worth, values)[parents]
    values = case.values(x, len(table))
    if config.keep == "best" and case.best is not None:
        return case.best
    return x[values.nan_to_num(-math.inf).argmax()]


_METHODS: dict[str, Callable[[Case], Tensor]] = {
    BestOfNConfig.name: _best_of_n,
    DemonConfig.name: _demon,
    ParticlesConfig.name: _particles,
}


# Weights of candidates, (K,), float64, from their values, NaN where invalid


class Temperature:
    """tau, by ``config.search.ValueConfig``; 0 where scores do not differ."""

    def __init__(self, setting: Literal["first", "step"] | float) -> None:
        self._setting = setting
        self._first = 0.0

    def of(self, values: Tensor) -> float:
        """For these scores, after those that it was asked for before."""
        if not isinstance(self._setting, str):
            return float(self._setting)
        spread = spread_of(values)
        self._first = self._first or spread
        return self._first if self._setting == "first" else spread


def spread_of(values: Tensor) -> float:
    """The standard deviation of the valid ones; 0 where they do not differ."""
    valid = values[~values.isnan()]
    spread = valid.std().item() if len(valid) > 1 else 0.0
    return spread if spread > _ALIKE else 0.0


def noise_weights(values: Tensor, kind: Literal["tanh", "boltzmann", "best"], tau: Temperature) -> Tensor:
    """Demon's; all the same where scores do not differ, and of the first one alone where none is valid."""
    temperature, valid = tau.of(values), ~values.isnan()
    if not valid.any():
        return torch.eye(len(values), dtype=torch.float64)[0]
    if kind == "best":
        return torch.eye(len(values), dtype=torch.float64)[values.nan_to_num(-math.inf).argmax()]
    if spread_of(values) == 0:
        return valid.double()
    if kind == "boltzmann":
        return softmax_weights(values, temperature)
    return torch.tanh((values - values.nanmean()) / temperature).nan_to_num(0.0)


def softmax_weights(values: Tensor, tau: float) -> Tensor:
    """Sum to 1; equal where tau is 0 or no value is valid."""
    valid = ~values.isnan()
    if tau == 0 or not valid.any():
        return valid.double() / valid.sum() if valid.any() else torch.full_like(values, 1 / len(values))
    return (values / tau).nan_to_num(-math.inf).softmax(0)


def blend(noise: Tensor, weights: Tensor) -> Tensor:
    """z* of the header: of (K, ...), one noise of the length that N Gaussian numbers have."""
    mixed = torch.einsum("k,k...->...", weights.float().to(noise.device), noise)
    return mixed * (math.sqrt(mixed.numel()) / mixed.norm())


def resample(weights: Tensor, uniform: float) -> Tensor:
    """Systematic resampling: whose place each particle takes, (K,), in order; particle k is copied K * w_k times, rounded up
    or down."""
    count = len(weights)
    places = (torch.arange(count, dtype=torch.float64) + uniform) / count
    return torch.searchsorted(weights.cumsum(0), places, right=True).clamp(max=count - 1)
