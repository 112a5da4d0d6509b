"""Prompts to trajectories, chunk by chunk; rewards are computed while the next chunk is sampled."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusionrl import interruption, processes, seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.data.media import Show, kind_of
from diffusionrl.data.prompts import Prompt
from diffusionrl.devices import handed
from diffusionrl.errors import UserError
from diffusionrl.foreign import surroundings
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.rewards import Mixture, Reward, RewardQueue, Scores, as_mixture
from diffusionrl.rewards.base import are_whole
from diffusionrl.sampling.broken import where_it_broke
from diffusionrl.sampling.gathering import gather_scores
from diffusionrl.transitions import SAMPLERS, Reduction, SamplerTable, log_density

Needs = Literal["trajectories", "means", "endpoints"]
"""Of a sample: its trajectory, that with the means of its steps, or its endpoint."""


@dataclass(frozen=True)
class Rollout:
    """Trajectories of N samples over T denoising steps, on the policy's device, and what they scored.

    Prompts and scores are of all samples; tensors are of the n that this process drew, all of them where it is alone.

    Attributes:
        table: the sampler that made them.
        prompts: N prompts.
        latents: float32, (n, T + 1, ...), from the start to the endpoint; (n, 1, ...) where only endpoints are kept.
        log_probs: float32, (n, T), of the stored latents under the policy that drew them; 0 on deterministic rows; (n, 0) where
            only endpoints are kept.
        images: float32, (n, *policy.sample_shape), on the CPU.
        scores: N scores.
        seconds: time spent in "rollout", until the last sample is scored, and, overlapping it, in "reward".
        group_size: samples in a row that one process drew.
        batch_size: samples that were drawn at once.
        steps: what each step gave, (n, T, ...), which the log-probabilities are of, where the pipeline edits it afterwards;
            None where that is the next latent.
        sampling_rate: of sounds, in Hz.
        reward_weights: of the rewards that the scores are the sum of, by name.
        reward: what scored them; None where it is not at hand.
        means: of the Gaussians that the steps were drawn from, (n, T, ...); None where they are not needed.
        broken_images: how many of all images are not finite.
        show: see ``Policy.show``.
    """

    table: SamplerTable
    prompts: list[Prompt]
    latents: Tensor
    log_probs: Tensor
    images: Tensor
    scores: Scores
    seconds: dict[str, float]
    group_size: int = 1
    batch_size: int = sys.maxsize
    steps: Tensor | None = None
    sampling_rate: int | None = None
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    reward: Mixture | None = None
    means: Tensor | None = None
    broken_images: int = 0
    show: Show | None = None

    @property
    def kind(self) -> str:
        """What the samples are: "image", "video", "sound", or "sample" where they are shown by pictures of them."""
        return "sample" if self.show is not None else kind_of(self.images.shape[1:])

    @property
    def shares(self) -> list[range]:
        """Which samples each process drew."""
        return [processes.share(len(self.prompts), self.group_size, process) for process in range(processes.count())]

    @property
    def own(self) -> range:
        """Which samples this process drew."""
        return self.shares[processes.index()]

    def prompts_of(self, samples: Tensor) -> list[Prompt]:
        """Of samples by their place among those whose tensors are here."""
        return [self.prompts[i] for i in self.among_all(samples).tolist()]

    def among_all(self, samples: Tensor) -> Tensor:
        """The places among all samples of some whose tensors are here."""
        return samples + (self.own.start if len(self.latents) < len(self.prompts) else 0)

    def endpoints(self, samples: Tensor) -> Tensor:
        """The latents that some samples ended in, (B, ...), by their place among those whose tensors are here."""
        return self.latents[handed(samples, self.latents.device), -1]

    def step_to(self, samples: Tensor, rows: Tensor) -> Tensor:
        """What the steps of some rows of the table gave, (B, ...)."""
        return self.latents[samples, rows + 1] if self.steps is None else self.steps[samples, rows]

    def batches(self, process: int) -> list[range]:
        """The samples that a process drew at once, batch by batch."""
        return cut(self.shares[process], self.batch_size)

    def middle(self, rows: Tensor, size: int) -> int:
        """The first sample of the second half of the groups that rows of work belong to; if it can be, where a batch begins. 0
        where there is one group, or one micro-batch, which is not cut for this."""
        groups = torch.unique(rows[:, 0] // self.group_size) * self.group_size
        starts = [batch.start for process in range(processes.count()) for batch in self.batches(process)]
        if len(groups) < 2 or (len(starts) == 1 and len(rows) <= size):
            return 0
        middle = int(groups[len(groups) // 2])
        fitting = [start for start in starts if start % self.group_size == 0 and groups[0] < start <= groups[-1]]
        return min(fitting, key=lambda start: abs(start - middle), default=middle)

    def micro_batches(self, rows: Tensor, size: int, process: int) -> list[Tensor]:
        """A process's rows of work, whose first column is a sample, cut. No micro-batch has rows of two batches in it, so they
        are the same however many processes share the batches; nor of two halves of the groups (``middle``)."""
        found: list[Tensor] = []
        middle = self.middle(rows, size)
        for batch in self.batches(process):
            place = min(max(middle, batch.start), batch.stop)
            for half in (range(batch.start, place), range(place, batch.stop)):
                inside = rows[(rows[:, 0] >= half.start) & (rows[:, 0] < half.stop)]
                found += [inside[part] for part in chunks(len(inside), size)]
        return found

    def idle_groups(self) -> list[int]:
        """Numbers of the groups whose valid scores, if they have any, are all equal."""
        size, scores = self.group_size, self.scores
        groups = [slice(first, first + size) for first in range(0, len(self.prompts), size)]
        values = [scores.values[group][scores.valid[group]] for group in groups]
        return [number for number, each in enumerate(values) if len(each) < 2 or bool((each == each[0]).all())]

    def with_groups(self, groups: Sequence[int], drawn: "Rollout") -> "Rollout":
        """Another rollout's samples in the place of some groups. Of one process alone."""
        size, prompts = self.group_size, list(self.prompts)
        places = torch.tensor([group * size + i for group in groups for i in range(size)])
        for place, prompt in zip(places.tolist(), drawn.prompts, strict=True):
            prompts[place] = prompt

        def put(mine: Tensor, others: Tensor) -> Tensor:
            return mine.index_copy(0, places.to(mine.device), others.to(mine.device))

        mine, others = self.scores, drawn.scores
        parts = {name: put(part, others.parts[name]) for name, part in mine.parts.items()}
        return replace(
            self,
            prompts=prompts,
            latents=put(self.latents, drawn.latents),
            log_probs=put(self.log_probs, drawn.log_probs),
            images=put(self.images, drawn.images),
            steps=None if self.steps is None or drawn.steps is None else put(self.steps, drawn.steps),
            means=None if self.means is None or drawn.means is None else put(self.means, drawn.means),
            scores=Scores(put(mine.values, others.values), put(mine.valid, others.valid), others.error or mine.error, parts),
            seconds={key: seconds + drawn.seconds[key] for key, seconds in self.seconds.items()},
        )

    def whole(self) -> "Rollout":
        """With the tensors of all samples, on every process."""
        sizes = list(map(len, self.shares))
        return replace(
            self,
            latents=processes.gather(self.latents, sizes),
            log_probs=processes.gather(self.log_probs, sizes),
            images=processes.gather(self.images, sizes),
            steps=None if self.steps is None else processes.gather(self.steps, sizes),
            means=None if self.means is None else processes.gather(self.means, sizes),
        )


def cut(share: range, size: int) -> list[range]:
    """Samples in batches of ``size``, the last one smaller if need be."""
    return [share[part] for part in chunks(len(share), size)]


def make_table(policy: Policy, config: SamplingConfig) -> SamplerTable:
    """The sampler of a configuration on the model's own time grid.

    Raises:
        UserError: the model or the sampler cannot do that.
    """
    try:
        return SAMPLERS[config.sampler](policy.grid(config.num_steps), config.eta)
    except ValueError as error:
        raise UserError(f"sampling settings do not fit the model: {error}") from error


def predict(
    policy: Policy, table: SamplerTable, x: Tensor, steps: Tensor, prompts: Sequence[Prompt], guidance: float
) -> tuple[Tensor, Tensor]:
    """Estimates of (x0, noise), for samples that may each be at a denoising step of their own.

    Args:
        x: (B, ...).
        steps: rows of the table, (B,).
        prompts: B of them.
    """
    return policy.denoise(x, table.grid.levels[steps], prompts, guidance)


def denoise_step(
    policy: Policy, table: SamplerTable, x: Tensor, steps: Tensor, prompts: Sequence[Prompt], guidance: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next latent; the arguments are those of ``predict``.

    This is the policy of the paper, and the only place where it is evaluated: sampling and updates share it.
    """
    return table.mean(steps, *predict(policy, table, x, steps, prompts, guidance)), table.std(steps, x)


@dataclass(frozen=True)
class Trajectories:
    """Of B samples over T denoising steps.

    Attributes:
        latents: (B, T + 1, ...).
        log_probs: (B, T); 0 on deterministic rows.
        steps, means: as in ``Rollout``.
    """

    latents: Tensor
    log_probs: Tensor
    steps: Tensor | None = None
    means: Tensor | None = None

    def keep(self, needs: Needs) -> "Trajectories":
        """What is needed of them."""
        if needs == "endpoints":
            return Trajectories(self.latents[:, -1:].clone(), self.log_probs[:, :0])
        return self if needs == "means" else replace(self, means=None)


@torch.no_grad()
def sample_trajectories(
    policy: Policy,
    table: SamplerTable,
    prompts: Sequence[Prompt],
    start: Tensor,
    noise: Tensor,
    guidance: float,
    reduction: Reduction = "mean",
) -> Trajectories:
    """Samples from where they begin, (B, ...), and the fresh noise of each step, (B, T, ...)."""
    latents, steps, log_probs, means = [start], [], [], []
    for i in range(len(table)):
        interruption.check()
        rows = torch.full((len(start),), i)
        mean, std = denoise_step(policy, table, latents[-1], rows, prompts, guidance)
        means.append(mean)
        steps.append(mean + std * noise[:, i])
        carries = bool(table.fresh[i] > 0)
        log_probs.append(log_density(steps[-1], mean, std, reduction) if carries else mean.new_zeros(len(mean)))
        latents.append(edited(policy, table, steps[-1], latents[-1], i, prompts) if policy.edits else steps[-1])
    before = torch.stack(steps, 1) if policy.edits else None
    return Trajectories(torch.stack(latents, 1), torch.stack(log_probs, 1), before, torch.stack(means, 1))


def edited(policy: Policy, table: SamplerTable, y: Tensor, x: Tensor, row: int, prompts: Sequence[Prompt]) -> Tensor:
    """What a pipeline that edits makes of y, which a row of the table gave; all (B, ...)."""
    rows = torch.full((len(x),), row)
    following = table.grid.levels[rows + 1] if row + 1 < len(table) else None
    return policy.after(y, x, table.grid.levels[rows], following, prompts)


def draw_noise(
    policy: Policy,
    table: SamplerTable,
    prompts: Sequence[Prompt],
    seed: int,
    purpose: str,
    step: int,
    indices: Sequence[int],
    alike: int = 1,
) -> tuple[Tensor, Tensor]:
    """Where samples begin, (B, ...), and the fresh noise of their steps, (B, T, ...), on the policy's device; of each, they
    depend on its prompt and on (seed, purpose, step, index) alone.

    Args:
        alike: so many samples in a row begin where the first of them does.
    """
    start = policy.start(prompts, [seeds.address(seed, purpose, step, i - i % alike) for i in indices])
    drawn = seeds.normal(seed, purpose, step, list(indices), (len(table) + 1, *policy.latent_shape))
    return start, drawn[:, 1:].to(policy.device)  # the first is the start where a policy starts from noise alone


def collect(
    policy: Policy,
    reward: Reward | Mixture,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    purpose: str,
    step: int,
    reduction: Reduction = "mean",
    needs: Needs = "trajectories",
    timeout: float = 600.0,
    group_size: int = 1,
    table: SamplerTable | None = None,
    shared_start: bool = False,
) -> Rollout:
    """Sample once a prompt and score it; sample i depends on (seed, purpose, step, i) and its prompt alone. Of several
    processes, each samples and scores its share, and all know the scores.

    Args:
        reduction: of the log-probabilities over the latent dimensions.
        needs: what is kept of a sample.
        timeout: seconds for one call of the reward.
        group_size: samples in a row that belong to one prompt slot: one process draws them, rewards may look at them together.
        table: another sampler than that of ``sampling``.
        shared_start: the samples of a group begin alike.

    Raises:
        UserError: a reward looks at whole groups, and there are none; or there are more processes than groups.
        RunStopped: a reward changed what is computed beside it.
        Interrupted: the run was asked to stop.
    """
    table = make_table(policy, sampling) if table is None else table
    mixture = as_mixture(reward)
    mixture.require_groups(group_size, "group_size", len(prompts), "the number of prompts")
    queue = RewardQueue(mixture, group_size)
    found: list[Trajectories] = []
    images: list[Tensor] = []
    began = time.perf_counter()
    broken: str | None = None
    alike = group_size if shared_start else 1
    for chunk, drawn, decoded in _batches(policy, table, prompts, sampling, seed, purpose, step, reduction, group_size, alike):
        broken = broken or where_it_broke(drawn.latents, decoded, chunk)
        found.append(drawn.keep(needs))
        images.append(decoded)
        queue.add(decoded, [prompt.text for prompt in chunk], metadata_of(chunk, policy.sampling_rate))
    scores = queue.result(timeout)
    surroundings.check()
    rollout = Rollout(
        table,
        list(prompts),
        torch.cat([each.latents for each in found]),
        torch.cat([each.log_probs for each in found]),
        torch.cat(images),
        scores,
        {},
        group_size,
        sampling.batch_size,
        _joined([each.steps for each in found]),
        policy.sampling_rate,
        mixture.weights,
        mixture,
        _joined([each.means for each in found]),
        sum(processes.ask(int((~are_whole(torch.cat(images))).sum()))),
        policy.show,
    )
    scores = gather_scores(replace(scores, error=broken or scores.error), rollout.shares)  # what is broken is no reward's fault
    elapsed = time.perf_counter() - began  # with the wait for scores, one's own and others'
    return replace(rollout, scores=scores, seconds={"rollout": elapsed, "reward": queue.seconds})


def _batches(
    policy: Policy,
    table: SamplerTable,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    purpose: str,
    step: int,
    reduction: Reduction,
    group_size: int,
    alike: int,
) -> Iterator[tuple[Sequence[Prompt], Trajectories, Tensor]]:
    """This process's share, batch by batch: prompts, trajectories, and images on the CPU. Where weights are sharded, each
    process runs as many batches as the others: one that has none left takes part with a sample that is thrown away."""
    cuts = [cut(processes.share(len(prompts), group_size, each), sampling.batch_size) for each in range(processes.count())]
    batches = cuts[processes.index()]
    for indices in batches:
        chunk = prompts[indices.start : indices.stop]
        with surroundings.suspected():
            start, noise = draw_noise(policy, table, chunk, seed, purpose, step, indices, alike)
            drawn = sample_trajectories(policy, table, chunk, start, noise, sampling.guidance, reduction)
            images = policy.decode(drawn.latents[:, -1], chunk).cpu()
        yield chunk, drawn, images
    if processes.sharded(policy.trainable().values()):
        for _ in range(max(map(len, cuts)) - len(batches)):
            sample_trajectories(policy, table, chunk[:1], start[:1], noise[:1], sampling.guidance, reduction)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Of all batches, where there is any."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def metadata_of(prompts: Sequence[Prompt], sampling_rate: int | None = None) -> list[dict[str, Any]]:
    """What a reward is told of prompts beside their texts; of sounds, that includes "sampling_rate"."""
    if sampling_rate is None:
        return [prompt.metadata for prompt in prompts]
    return [prompt.metadata | {"sampling_rate": sampling_rate} for prompt in prompts]
