"""What a search asks of the model and of the reward: candidates for one image, their steps, and what they are worth on the way.

Candidates are tensors (K, S, ...): S samples that are scored together, which is one, or all the samples of a prompt where the
reward looks at groups; such a group is searched for as a whole, and is worth the mean of its scores.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusionrl import interruption, seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.config.search import SearchConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.foreign import surroundings
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.rewards import Mixture, RewardCall, Scores
from diffusionrl.sampling.rollout import draw_noise, edited, make_table, metadata_of, predict, sample_trajectories
from diffusionrl.transitions import Grid, SamplerTable, ode, to_x0_and_noise

_NO_SIGNAL = 1e-2  # alpha below which a noise prediction says nothing of the sample


@dataclass(frozen=True)
class Round:
    """Candidates that were scored together.

    Attributes:
        step: denoising steps that they had behind them.
        queries: that the search had asked for by then.
        values: of K candidates, None where invalid.
    """

    step: int
    queries: int
    values: list[float | None]


@dataclass
class Spent:
    """On one case.

    Attributes:
        queries: scores of samples.
        invalid: of these.
        denoisings: samples times passes of the model.
        seconds: for all of it.
    """

    queries: int = 0
    invalid: int = 0
    denoisings: int = 0
    seconds: float = 0.0


@dataclass
class Case:
    """Samples that are searched for together, and what has been found so far.

    Attributes:
        prompts, seeds: of its S samples.
        timeout: seconds for one call of the reward.
        lookahead: see ``config.search.ValueConfig``.
        best: the end that was scored best, (S, ...).
        worth: its score; minus infinity before there is one.
    """

    policy: Policy
    reward: Mixture
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    search: SearchConfig
    sampling: SamplingConfig
    timeout: float = 600.0
    lookahead: int = 1
    rounds: list[Round] = field(default_factory=list)
    error: str | None = None
    best: Tensor | None = None
    worth: float = -math.inf

    def __post_init__(self) -> None:
        self.table = make_table(self.policy, self.sampling)
        self.ode = ode(self.table.grid)
        self.begin()

    def begin(self) -> None:
        """What is spent counts from here."""
        self.spent, self._began = Spent(), time.perf_counter()

    def affords(self, candidates: int) -> bool:
        """Whether the budget holds a round of so many; there is time for the first one."""
        self.look_at_the_clock()
        if self.rounds and self.search.seconds is not None and self.spent.seconds >= self.search.seconds:
            return False
        asked = self.spent.queries + candidates * len(self.prompts)
        return self.search.queries is None or asked <= self.search.queries * len(self.prompts)

    def look_at_the_clock(self) -> None:
        self.spent.seconds = time.perf_counter() - self._began

    # Candidates

    def draw(self, candidate: int) -> tuple[Tensor, Tensor]:
        """Where one begins, (S, ...), and the noise of its steps, (S, T, ...). The first: as by ``diffusionrl sample``."""
        purpose, index = ("search", candidate) if candidate else ("sample", 0)
        each = zip(self.prompts, self.seeds, strict=True)
        draws = [draw_noise(self.policy, self.table, [prompt], seed, purpose, 0, [index]) for prompt, seed in each]
        start, noise = (torch.cat(part) for part in zip(*draws, strict=True))
        return start, noise

    def noise(self, row: int, count: int) -> Tensor:
        """Of the candidates of one step, (count, S, ...)."""
        shape, numbers = self.policy.latent_shape, list(range(count))
        drawn = [seeds.normal(seed, "search step", row, numbers, shape) for seed in self.seeds]
        return torch.stack(drawn, 1).to(self.policy.device)

    def uniform(self, row: int) -> float:
        """A number in [0, 1) for a step."""
        generator = seeds.torch_generator(self.seeds[0], "search resampling", row)
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    @torch.no_grad()
    def sample(self, starts: Tensor, noise: Tensor, table: SamplerTable) -> Tensor:
        """From (K, S, ...), by (K, S, T, ...), to the end, (K, S, ...)."""
        self.spent.denoisings += len(table) * starts.shape[0] * starts.shape[1]

        def through(x: Tensor, prompts: Sequence[Prompt], part: slice) -> Tensor:
            z = noise.flatten(0, 1)[part]
            return sample_trajectories(self.policy, table, prompts, x, z, self.sampling.guidance).latents[:, -1].clone()

        return self._in_parts(starts, through)

    def step(
        self,
        x: Tensor,
        row: int,
        noise: Tensor,
        table: SamplerTable,
        order: int = 1,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step of candidates, (K, S, ...), of the first order, or of the second: Heun's direction, the same fresh noise.

        Args:
            x: their states, or one for all of them, (1, S, ...).
            first: what the model says of x, where it was asked before.
        """
        interruption.check()
        first = self.predict(x, row) if first is None else first
        y = self._stepped(x, first, row, noise, table)
        if order == 1 or row + 1 == len(table) or table.grid.alpha[row] < _NO_SIGNAL:
            return y
        return self._stepped(x, self._mean_direction(x, row, first, self.predict(y, row + 1)), row, noise, table)

    def _stepped(self, x: Tensor, estimates: tuple[Tensor, Tensor], row: int, noise: Tensor, table: SamplerTable) -> Tensor:
        alpha, kept, fresh = (float(column[row]) for column in (table.alpha_next, table.kept, table.fresh))
        y = alpha * estimates[0] + kept * estimates[1] + fresh * noise
        if not self.policy.edits:
            return y
        before = x.expand(y.shape).flatten(0, 1)
        return self._in_parts(y, lambda y, prompts, part: edited(self.policy, table, y, before[part], row, prompts))

    def _mean_direction(
        self, x: Tensor, row: int, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(x0, noise) at x whose noise is the mean of two estimates'; or, on linear flows, whose velocity is."""
        grid = self.table.grid
        alpha, sigma = grid.alpha[row].to(x.device), grid.sigma[row].to(x.device)
        if grid.levels.linear:
            velocity = (first[1] - first[0] + second[1] - second[0]) / 2
            return to_x0_and_noise("flow", velocity, x, alpha, sigma)
        return to_x0_and_noise("epsilon", (first[1] + second[1]) / 2, x, alpha, sigma)

    @torch.no_grad()
    def predict(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """What the model says of states, (K, S, ...), before a step: estimates of (x0, noise)."""
        self.spent.denoisings += x.shape[0] * x.shape[1]

        def both(part: Tensor, prompts: Sequence[Prompt], _: slice) -> Tensor:
            rows = torch.full((len(part),), row)
            return torch.stack(predict(self.policy, self.table, part, rows, prompts, self.sampling.guidance), 1)

        found = self._in_parts(x, both)
        return found[:, :, 0], found[:, :, 1]

    def _in_parts(self, x: Tensor, do: Callable[[Tensor, Sequence[Prompt], slice], Tensor]) -> Tensor:
        """(K, S, ...) in batches: ``do`` is called with samples, their prompts, and which they are among all."""
        flat, prompts = x.flatten(0, 1), [*self.prompts] * len(x)
        with surroundings.suspected():
            parts = [do(flat[part], prompts[part], part) for part in chunks(len(flat), self.sampling.batch_size)]
        found = torch.cat(parts)
        return found.view(*x.shape[:2], *found.shape[1:])

    # What they are worth

    def values(self, x: Tensor, step: int) -> Tensor:
        """What candidates with ``step`` denoising steps behind them are worth, float64, (K,), NaN where invalid: a round."""
        ends = self.ends(x, step)
        scores = self.score(self.decode(ends))
        count, size = x.shape[:2]
        valid = scores.valid.view(count, size).all(1)
        values = torch.where(valid, scores.values.view(count, size).mean(1), torch.nan)
        self.spent.queries += count * size
        self.spent.invalid += int((~scores.valid).sum())
        self.error = scores.error or self.error
        listed = [value if good else None for value, good in zip(values.tolist(), valid.tolist(), strict=True)]
        self.rounds.append(Round(step, self.spent.queries, listed))
        highest = values.nan_to_num(-math.inf).max().item()
        if self.best is None or highest > self.worth:
            self.best, self.worth = ends[values.nan_to_num(-math.inf).argmax()], highest
        return values

    def ends(self, x: Tensor, step: int) -> Tensor:
        """Where the ODE takes states by ``lookahead`` steps of the rest of the grid; what has arrived stays."""
        left = len(self.table) - step
        if left == 0:
            return x
        count = min(self.lookahead, left)
        rest = coarser(self.table.grid, [step + k * left // count for k in range(count)])
        return self.sample(x, torch.zeros_like(x)[:, :, None].expand(*x.shape[:2], count, *x.shape[2:]), ode(rest))

    def decode(self, latents: Tensor) -> Tensor:
        """Samples on the CPU, (K * S, ...), of the ends of the way."""
        return self._in_parts(latents, lambda part, prompts, _: self.policy.decode(part, prompts).cpu()).flatten(0, 1)

    def score(self, images: Tensor, reward: Mixture | None = None) -> Scores:
        """Of samples in the order of candidates, by the reward that is searched with or another one. Not counted."""
        prompts = [*self.prompts] * (len(images) // len(self.prompts))
        texts, metadata = [prompt.text for prompt in prompts], metadata_of(prompts, self.policy.sampling_rate)
        call = RewardCall(reward or self.reward, images, texts, metadata, group_size=len(self.prompts))
        call.start()
        scores = call.result(self.timeout)
        surroundings.check()
        return scores


def coarser(grid: Grid, rows: Sequence[int]) -> Grid:
    """The same way from the first of these rows on, in steps from each of them to the next, and from the last to the end."""
    columns = [column[list(rows)] for column in (grid.timesteps, grid.alpha, grid.sigma)]
    ends = [
        torch.cat([column[1:], last[-1:]]) for column, last in zip(columns[1:], (grid.alpha_next, grid.sigma_next), strict=True)
    ]
    return Grid(*columns, *ends)
