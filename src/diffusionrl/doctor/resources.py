"""What the whole run will take, from what small pieces of it took: memory, time, disk."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.devices import own_memory
from diffusionrl.doctor.costs import Cost, Peak, limit_bytes, measure
from diffusionrl.doctor.findings import Finding
from diffusionrl.doctor.reward import ask
from diffusionrl.doctor.savings import savings
from diffusionrl.evaluation.measures import PAIRS
from diffusionrl.policies.base import chunks
from diffusionrl.rewards import Scores
from diffusionrl.runs import checkpoint
from diffusionrl.sampling.rollout import Rollout, denoise_step, make_table
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.training.trainer import Trainer

_FULL = 0.85  # of the memory: a run of the preset "emoji" held 14 % more than estimated, which the allocator did not give back
_DECODED = 16  # images are decoded at most so many at once
_MATTERS = 0.03  # of the peak: what saves less is not proposed


@dataclass(frozen=True)
class Costs:
    """Of one denoising step and of decoding, by images; of a forward and backward pass, by rows."""

    denoise: Cost
    decode: Cost
    update: Cost
    beside: float = 0.0
    """Seconds an image, of what an evaluation asks and measures beside the reward."""
    embedding: float = 0.0
    """Bytes at the peak of a step whose prompt was not embedded before."""

    def sampling_peak(self, batch: int) -> float:
        return max(self.denoise.peak(batch), self.decode.peak(min(batch, _DECODED)))


def measure_sampling(trainer: Trainer) -> tuple[Cost, Cost]:
    """Of a denoising step and of decoding, for batches as large as sampling.batch_size."""
    policy, config = trainer.policy, trainer.config
    table, first = make_table(policy, config.sampling), trainer.prompts[0]

    def start(n: int) -> Tensor:
        return policy.start([first] * n, [seeds.address(config.seed, "doctor", 4, i) for i in range(n)])

    @torch.no_grad()
    def denoise(n: int) -> None:
        denoise_step(policy, table, start(n), torch.zeros(n, dtype=torch.long), [first] * n, config.sampling.guidance)

    batch = min(config.sampling.batch_size, max(config.samples_per_step, config.evaluation.num_samples))
    return (
        measure(denoise, batch, policy.device),
        measure(lambda n: policy.decode(start(n), [first] * n), min(batch, _DECODED), policy.device),
    )


def measure_embedding(trainer: Trainer) -> int:
    """Bytes at the peak of a denoising step for a prompt that was not seen before."""
    policy, config = trainer.policy, trainer.config
    unseen = [replace(trainer.prompts[0], text=trainer.prompts[0].text[1:] or "unseen")]
    with Peak(policy.device) as peak, torch.no_grad():
        x = policy.start(unseen, [seeds.address(config.seed, "doctor", 5, 0)])
        denoise_step(policy, make_table(policy, config.sampling), x, torch.tensor([0]), unseen, config.sampling.guidance)
    return peak.bytes


def measure_beside(trainer: Trainer, rollout: Rollout) -> tuple[Scores | None, float]:
    """Scores of the held-out rewards, and the seconds an image that they and the embeddings take at an evaluation."""
    monitor, images = trainer.monitor, rollout.images
    scores = None
    began = time.perf_counter()
    if monitor.held_out is not None:
        scores = ask(trainer, monitor.held_out, rollout, images, trainer.config.evaluation.samples_per_prompt)
    seconds = time.perf_counter() - began
    if monitor.embed is not None:
        with torch.no_grad():
            monitor.embed(images[:1])  # whatever is slow the first time
            began = time.perf_counter()
            monitor.embed(images)
        seconds += time.perf_counter() - began
    return scores, seconds / len(images)


def measure_update(trainer: Trainer, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Cost:
    """Of a forward and backward pass, for micro-batches as large as algorithm.micro_batch_size."""
    algorithm, optimization = trainer.algorithm, trainer.state.optimization
    wanted = algorithm.micro_batch_size
    batch = next(each for each in rollout.batches(processes.index()) if each.start <= rows[0, 0] < each.stop)
    alike = rows[(rows[:, 0] >= batch.start) & (rows[:, 0] < batch.stop)]  # no micro-batch has rows of two

    def pass_over(n: int) -> None:
        algorithm.micro_batch_size = n
        accumulate_gradient(algorithm, trainer.policy, rollout, alike[torch.arange(n) % len(alike)], advantages)
        optimization.adamw.zero_grad()

    try:
        return measure(pass_over, micro_batch(trainer, rollout, advantages), trainer.policy.device)
    finally:
        algorithm.micro_batch_size = wanted


def micro_batch(trainer: Trainer, rollout: Rollout, advantages: Tensor) -> int:
    """The largest of a real step."""
    return min(trainer.algorithm.micro_batch_size, max(len(rows) for rows in whole_step(trainer, rollout, advantages)))


def whole_step(trainer: Trainer, rollout: Rollout, advantages: Tensor) -> list[Tensor]:
    """The rows of each update of a real step, whose samples are these over and over."""
    times = -(-trainer.config.samples_per_step // len(rollout.prompts))
    count = trainer.config.samples_per_step
    scores = Scores(rollout.scores.values.repeat(times)[:count], rollout.scores.valid.repeat(times)[:count])
    full = replace(rollout, prompts=(rollout.prompts * times)[:count], scores=scores)
    every = trainer.algorithm.updates(full, advantages.repeat(times)[:count], trainer.config.seed, 0)
    return [rows for rows in every if len(rows)]


def something_to_learn(trainer: Trainer, rollout: Rollout) -> tuple[Rollout, Tensor]:
    """Advantages; where the reward gives none, every other sample is taken to be good, so that the rest can be tried."""
    advantages = trainer.tasks[0].advantages(rollout)
    if advantages.any():
        return rollout, advantages
    good = torch.tensor([1.0, -1.0]).repeat(len(advantages))[: len(advantages)]
    return replace(rollout, scores=replace(rollout.scores, values=good, valid=torch.ones_like(rollout.scores.valid))), good


# Memory


def check_memory(trainer: Trainer, rollout: Rollout, advantages: Tensor, costs: Costs) -> Finding:
    """The peak at the configured batch sizes against what there is; smaller ones where that is not enough."""
    config, device = trainer.config, trainer.policy.device
    limit, kept, evaluated = limit_bytes(device), _kept(trainer, rollout), _kept_evaluation(trainer, rollout)
    size, images = config.sampling.batch_size, config.evaluation.num_samples
    batch, micro = min(size, max(config.samples_per_step, images)), micro_batch(trainer, rollout, advantages)

    def sampling(n: int) -> float:
        return costs.sampling_peak(min(n, config.samples_per_step)) + kept

    def evaluation(n: int) -> float:
        return costs.sampling_peak(min(n, images)) + evaluated

    def update(n: int) -> float:
        return costs.update.peak(n) + kept

    embedding = costs.embedding + kept
    peaks = {"sampling": sampling(batch), "an evaluation": evaluation(batch), "updates": update(micro), "embedding": embedding}
    need, when = max((peak, when) for when, peak in peaks.items())
    where = "the GPU" if own_memory(device) else "memory"
    told = f"{need / 1e9:.2f} GB at the peak, {when}; {limit / 1e9:.1f} GB of {where}"
    if need <= _FULL * limit:
        return Finding("pass", "memory", told)
    smaller_batch = largest(batch, lambda n: max(sampling(n), evaluation(n)) <= _FULL * limit)
    smaller_micro = largest(micro, lambda n: update(n) <= _FULL * limit)
    if evaluation(1) > _FULL * limit >= sampling(1):
        remedy = "all samples of an evaluation are held until it ends: lower evaluation.num_samples"
        return Finding("fail" if need > limit else "warn", "memory", told, remedy)
    options = _savings(trainer, costs, need, when, embedding, batch)
    if not (smaller_batch and smaller_micro) or embedding > _FULL * limit:
        remedy = f"not even one at a time fits: take {', or '.join([*options, 'more memory'])}"
        return Finding("fail", "memory", told, remedy)
    sizes = [f"--sampling.batch-size {smaller_batch}"] if smaller_batch < batch else []
    sizes += [f"--algorithm.micro-batch-size {smaller_micro}"] if smaller_micro < micro else []
    remedy = (
        f"{' '.join(sizes)}; a step stays {config.prompts_per_step} prompts x {config.samples_per_prompt}, "
        "and an update adds up more micro-batches to the same gradient"
    )
    remedy += f"; what saves memory too: {', '.join(options)}" if options else ""
    return Finding("fail" if need > limit else "warn", "memory", told, remedy)


def _savings(trainer: Trainer, costs: Costs, need: float, when: str, embedding: float, batch: int) -> list[str]:
    """Options that are off and would lower the peak, each alone, and by how much."""
    config, found = trainer.config.policy, savings(trainer.policy, trainer.config.policy)
    encoders, slicing = "--policy.offload-text-encoders", "--policy.vae-slicing"
    if encoders in found:
        found[encoders] = min(found[encoders], need - embedding)
    if when in ("sampling", "an evaluation") and not config.vae_slicing:
        found[slicing] = costs.sampling_peak(batch) - max(costs.denoise.peak(batch), costs.decode.peak(1))
    worth = sorted((-saved, option) for option, saved in found.items() if saved > _MATTERS * need)
    told = [f"{option} (some {-saved / 1e9:.2g} GB)" for saved, option in worth]
    return [*told, *(["--policy.gradient-checkpointing"] if when == "updates" and not config.gradient_checkpointing else [])]


def largest(size: int, fits: Callable[[int], bool]) -> int:
    """``size``, or the next that fits when it is halved again and again; 0 where none does."""
    while size and not fits(size):
        size //= 2
    return size


def _kept(trainer: Trainer, rollout: Rollout) -> int:
    """What a run holds beside its batches: AdamW's moments, the samples of a step (twice, when they are put together) and, in
    memory, two copies of weights and moments for checkpoints."""
    tensors = [each for each in (rollout.latents, rollout.log_probs, rollout.steps, rollout.means) if each is not None]
    samples = _bytes_of(trainer, rollout, sum(tensor[0].nbytes for tensor in tensors)) * trainer.config.samples_per_step
    return 2 * samples + _weights(trainer)


def _kept_evaluation(trainer: Trainer, rollout: Rollout) -> int:
    """The same while an evaluation lasts, whose trajectories are held where there is a reference to compare the policy with."""
    latents = rollout.latents[0, 0].nbytes * (len(rollout.table) + 1 if trainer.monitor.has_reference else 1)
    samples = _bytes_of(trainer, rollout, latents) * trainer.config.evaluation.num_samples
    return 2 * samples + _weights(trainer)


def _bytes_of(trainer: Trainer, rollout: Rollout, tensors: int) -> int:
    """Of a sample whose tensors are on the policy's device; its image is always in memory."""
    return tensors + (rollout.images[0].nbytes if own_memory(trainer.policy.device) is None else 0)


def _weights(trainer: Trainer) -> int:
    """AdamW's moments and, in memory, the copies for checkpoints."""
    weights = sum(parameter.nbytes for parameter in trainer.state.optimization.parameters.values())
    return weights * (2 + (6 if own_memory(trainer.policy.device) is None else 0))


# Time


def check_time(trainer: Trainer, rollout: Rollout, advantages: Tensor, costs: Costs) -> tuple[Finding, Finding]:
    """Of a step and of the run; and the reward's part in it."""
    config = trainer.config
    score = rollout.seconds["reward"] / len(rollout.prompts)
    evaluation = _evaluation_seconds(trainer, costs, score)
    micro = trainer.algorithm.micro_batch_size
    parts = [part for rows in whole_step(trainer, rollout, advantages) for part in chunks(len(rows), micro)]
    update = sum(costs.update.time(part.stop - part.start) for part in parts)
    if trainer.tasks[0].judged is None:
        sampling, reward = _sampling_seconds(trainer, costs, config.samples_per_step), score * config.samples_per_step
        waiting = max(score * min(config.sampling.batch_size, config.samples_per_step), reward - sampling)
        of_it = f"sampling {clock(sampling)}, waiting for the reward {clock(waiting)}, updates {clock(update)}"
    else:
        sampling = waiting = 0.0
        of_it = "updates alone; images are read beside it"
    step = sampling + waiting + update
    every = config.evaluation.every
    evaluations = 1 + (config.last_step // every + (config.last_step % every > 0) if every else 1)
    run = config.last_step * step + evaluations * evaluation
    told = (
        f"about {clock(step)} a step ({of_it}), {clock(evaluation)} an evaluation; "
        f"{clock(run)} for {config.last_step} steps and {evaluations} evaluations"
    )
    return _speed(trainer, score, waiting / step), Finding("pass", "time", told)


def _speed(trainer: Trainer, score: float, share: float) -> Finding:
    config = trainer.config
    told = f"{score * 1000:.3g} ms a sample; a step waits for it {share:.0%} of its time"
    call = score * min(config.sampling.batch_size, config.samples_per_step)
    if call > config.rewards.timeout:
        remedy = f"raise rewards.timeout above {call:.0f}, or lower sampling.batch_size"
        return Finding("fail", "speed", f"a batch takes {call:.0f} s, rewards.timeout is {config.rewards.timeout:g} s", remedy)
    if share <= 0.5:
        return Finding("pass", "speed", told)
    remedy = "score a whole batch at once, on the GPU if there is one; keep answers of a server that were given before"
    return Finding("warn", "speed", told, remedy)


def _sampling_seconds(trainer: Trainer, costs: Costs, count: int) -> float:
    """Of so many images."""
    sampling = trainer.config.sampling
    seconds = 0.0
    for part in chunks(count, sampling.batch_size):
        size = part.stop - part.start
        seconds += sampling.num_steps * costs.denoise.time(size)
        seconds += sum(costs.decode.time(each.stop - each.start) for each in chunks(size, _DECODED))
    return seconds


def _evaluation_seconds(trainer: Trainer, costs: Costs, score: float) -> float:
    """Sampling, the reward (``score`` seconds an image), and what is asked and measured beside it."""
    config = trainer.config
    count, batch = config.evaluation.num_samples, config.sampling.batch_size
    pairs = [part.stop - part.start for part in chunks(min(PAIRS, count), batch)] if trainer.monitor.has_reference else []
    distance = sum(2 * costs.denoise.time(size) for size in pairs)  # by the policy and by the reference
    return _sampling_seconds(trainer, costs, count) + count * (score + costs.beside) + distance


def clock(seconds: float) -> str:
    """12 s, 4 min, 3.5 h, 12 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


# Disk


def check_disk(trainer: Trainer) -> Finding:
    run_dir = trainer.config.run_dir or Path("runs")
    need, free = trainer.disk_need(run_dir if trainer.config.run_dir else run_dir / "NAME"), checkpoint.free_bytes(run_dir)
    told = f"{need / 1e6:.0f} MB at most for checkpoints, samples and export; {free / 1e9:.1f} GB free in {run_dir}"
    if need <= free:
        return Finding("pass", "disk", told)
    return Finding("fail", "disk", told, "choose another --run-dir, or lower checkpoint.keep")
