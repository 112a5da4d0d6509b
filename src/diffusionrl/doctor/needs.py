"""What a run would hold in memory and compute, found on shapes alone: no weights are read, nothing is computed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms import make_algorithm
from diffusionrl.config import TrainConfig
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.doctor.meter import AsOnCard, Meter
from diffusionrl.doctor.resources import micro_batch, something_to_learn, whole_step
from diffusionrl.doctor.savings import BITS
from diffusionrl.doctor.shapes import build_pipeline
from diffusionrl.doctor.update import rows_of_an_update
from diffusionrl.errors import UserError
from diffusionrl.policies.base import Policy
from diffusionrl.policies.encoders import encoders_of
from diffusionrl.policies.loading import check_model, configuration_of, policy_of
from diffusionrl.policies.quantization import is_denoiser
from diffusionrl.rewards import Scores, as_mixture, differentiable
from diffusionrl.sampling.rollout import Rollout, denoise_step, make_table
from diffusionrl.training.optimization import FEW, accumulate_gradient
from diffusionrl.training.trainer import Trainer

_DECODED = 16  # at once, at most


@dataclass(frozen=True)
class Work:
    """Of a batch of n: what it takes however small, and what each further one adds."""

    bytes: tuple[float, float]
    operations: tuple[float, float]

    def peak(self, n: int) -> float:
        return self.bytes[0] + self.bytes[1] * n


@dataclass(frozen=True)
class Needs:
    """Of a run, in bytes on its device.

    Attributes:
        weights: of the pipeline's networks, by part, without what is trained; text encoders that wait elsewhere left out.
        waiting: of text encoders that wait elsewhere.
        dequantised: the largest layer of few bits, as it is while it runs.
        trained: of the trained weights.
        optimizer: of what belongs to them: AdamW's moments, gradients while they are added up, older copies.
        denoise, decode, update: activations of a denoising step and of decoding, by samples; of an update, by rows.
        embedding: activations of embedding a prompt.
        latent: of one latent.
        sample: of what a step keeps of a sample, until it has been trained on.
        evaluated: of what an evaluation keeps of one.
        num_steps: denoising steps.
        rows: of the largest update of a step, and of all of them together.
    """

    weights: dict[str, float]
    waiting: float
    dequantised: float
    trained: float
    optimizer: float
    denoise: Work
    decode: Work
    update: Work
    embedding: float
    latent: float
    sample: float
    evaluated: float
    num_steps: int
    rows: tuple[int, int]
    config: TrainConfig
    about: str

    @property
    def resident(self) -> float:
        """What is there all the time."""
        return sum(self.weights.values()) + self.trained + self.optimizer

    def peaks(self, batch: int, micro: int) -> dict[str, float]:
        """The most that is held in each phase of a step, and in an evaluation."""
        config = self.config
        found = {"embedding": self.resident + self.waiting + self.embedding + self.dequantised}
        for phase, kept, count in (
            ("sampling", self.sample, config.samples_per_step),
            ("an evaluation", self.evaluated, config.evaluation.num_samples),
        ):
            n = min(batch, count)
            chain = self.latent * self.num_steps * n  # of the noise, the latents and their means
            samples = kept * count
            during = max(
                self.denoise.peak(n) + 3 * chain + self.dequantised, self.decode.peak(min(n, _DECODED)) + 3 * chain, 5 * chain
            )
            found[phase] = self.resident + max(samples + during, 2 * samples)  # which are put together in the end
        samples = self.sample * config.samples_per_step
        found["updates"] = self.resident + samples + self.update.peak(micro) + self.dequantised
        return found

    def operations(self) -> float:
        """Floating point operations of a training step."""
        count = self.config.samples_per_step
        sampling = count * (self.num_steps * self.denoise.operations[1] + self.decode.operations[1])
        return sampling + self.rows[1] * self.update.operations[1]


def find_needs(config: TrainConfig, on_card: bool) -> Needs:
    """What a run with these settings needs; of several tasks, the first.

    Args:
        on_card: the device has memory of its own, beside the machine's.

    Raises:
        UserError: its model cannot be planned.
    """
    if config.preferences:
        raise UserError("plan knows nothing of preferences from disk: try the doctor, which loads them")
    prompts = load_prompts(config.prompts, config.max_broken_prompts)
    check_model(config.model, config.model_config)
    with Meter() as meter, AsOnCard() if on_card else nullcontext():
        try:
            policy = _policy_of(config, prompts[0])
            return _measured(meter, Trainer(policy, _brightness, prompts, make_algorithm(config), config), on_card)
        except UserError:
            raise
        except Exception as error:  # of a library that asks for values where there are none, or of settings that do not fit
            raise UserError(
                f"model {config.model!r} cannot be planned by its settings: {type(error).__name__}: {error}. The doctor tries "
                "one step of it, with its weights"
            ) from error


def _policy_of(config: TrainConfig, example: Prompt) -> Any:
    """Without weights."""
    pipeline = build_pipeline(configuration_of(config.model, config.model_config), getattr(torch, config.policy.dtype))
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        if config.policy.quantization != "none" and is_denoiser(type(part)):
            part.is_quantized = True
    policy = policy_of(pipeline, config.policy, config.model, "cpu", config.seed, config.sampling, example)
    for part in parts:
        part.to()  # what was added has no values either
    return policy


@differentiable
def _brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """In the place of any reward."""
    return images.flatten(1).mean(1)


def _measured(meter: Meter, trainer: Trainer, on_card: bool) -> Needs:
    policy, config = trainer.policy, trainer.config
    table = trainer.algorithm.table(make_table(policy, config.sampling), config.seed, 1)
    rollout = _rollout(trainer, table)
    first, guidance = trainer.prompts[0], config.sampling.guidance

    def start(n: int, prompt: Prompt = first) -> Tensor:
        return policy.start([prompt] * n, [seeds.address(config.seed, "plan", 0, i) for i in range(n)])

    @torch.no_grad()
    def denoise(n: int, prompt: Prompt = first) -> None:
        denoise_step(policy, table, start(n, prompt), torch.zeros(n, dtype=torch.long), [prompt] * n, guidance)

    denoise(1)
    before = meter.restart()
    denoise(1, replace(first, text=first.text[1:] or "unseen"))
    embedding = meter.peak - before
    trainer.training.follow(0)
    rollout, advantages = something_to_learn(trainer, rollout)
    rows = rows_of_an_update(trainer, rollout, advantages)
    updates = [len(each) for each in whole_step(trainer, rollout, advantages)]

    def update(n: int) -> None:
        trainer.algorithm.micro_batch_size = n
        few = rows[rows[:, 0] == rows[0, 0]]
        accumulate_gradient(trainer.algorithm, policy, rollout, few[torch.arange(n) % len(few)], advantages)
        trainer.state.optimization.adamw.zero_grad()

    wanted = micro_batch(trainer, rollout, advantages)
    works = [_work(meter, each) for each in (denoise, lambda n: policy.decode(start(n), [first] * n), update)]
    trainer.algorithm.micro_batch_size = wanted
    kept = [each for each in (rollout.latents, rollout.log_probs, rollout.steps, rollout.means) if each is not None]
    image = 0 if on_card else rollout.images[0].nbytes
    chain = len(table) + 1 if trainer.monitor.has_reference else 1
    latent = rollout.latents[0, 0].nbytes
    return Needs(
        **_weights(trainer, on_card),
        denoise=works[0],
        decode=works[1],
        update=works[2],
        embedding=embedding,
        latent=latent,
        sample=sum(each[0].nbytes for each in kept) + image,
        evaluated=latent * chain + image,
        num_steps=len(table),
        rows=(max(updates), sum(updates)),
        config=config,
        about=str(policy.about.get("pipeline", "StableDiffusionPipeline")),
    )


def _work(meter: Meter, work: Callable[[int], object]) -> Work:
    work(2)  # whatever is tried or kept the first time
    found = []
    for n in (1, 2):
        before, operations = meter.restart(), meter.operations
        work(n)
        found.append((meter.peak - before, meter.operations - operations))
    (one, few), (two, more) = found
    return Work((2 * one - two, two - one), (2 * few - more, more - few))


def _rollout(trainer: Trainer, table: Any) -> Rollout:
    """Two groups of samples, of which every other one is good."""
    policy, config, needs = trainer.policy, trainer.config, trainer.algorithm.needs
    group = max(2, min(config.samples_per_prompt, 4))
    prompts = [prompt for prompt in (list(trainer.prompts) * 2)[:2] for _ in range(group)]
    count, steps = len(prompts), len(table)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(count, *shape)

    chain = (steps, *policy.latent_shape)
    whole = needs != "endpoints"
    good = torch.tensor([1.0, 0.0]).repeat(count // 2).double()
    return Rollout(
        table,
        prompts,
        zeros(steps + 1 if whole else 1, *policy.latent_shape),
        zeros(steps if whole else 0),
        zeros(*policy.sample_shape),
        Scores(good, torch.ones(count, dtype=torch.bool)),
        {"rollout": 1.0, "reward": 0.0},
        group,
        config.sampling.batch_size,
        zeros(*chain) if policy.edits and whole else None,
        policy.sampling_rate,
        reward=as_mixture(_brightness),
        means=zeros(*chain) if needs == "means" else None,
    )


def _weights(trainer: Trainer, on_card: bool) -> dict[str, Any]:
    """The first attributes of ``Needs``."""
    policy: Any = trainer.policy
    config, parts = trainer.config, policy.pipeline.components
    trained = sum(weight.nbytes for weight in policy.trainable().values())
    own = {id(weight) for weight in policy.trainable().values()}
    waiting = encoders_of(parts) if config.policy.offload_text_encoders and on_card else {}
    weights, aside, largest = {}, 0.0, 0.0
    for name, part in parts.items():
        if not isinstance(part, torch.nn.Module):
            continue
        size = float(sum(each.nbytes for each in (*part.parameters(), *part.buffers()) if id(each) not in own))
        if config.policy.quantization != "none" and is_denoiser(type(part)):
            layers = [each.weight for each in part.modules() if isinstance(each, torch.nn.Linear) and id(each.weight) not in own]
            bits = BITS[config.policy.quantization]
            size -= sum(each.nbytes - each.numel() * bits / 8 for each in layers)
            largest = max([largest, *(each.nbytes for each in layers)])
        if name in waiting:
            aside += size
        else:
            weights[name] = size
    return {
        "weights": weights,
        "waiting": aside,
        "dequantised": largest,
        "trained": float(trained),
        "optimizer": trained * _beside(trainer, trained // 4, on_card),
    }


def _beside(trainer: Trainer, count: int, on_card: bool) -> float:
    """What belongs to the trained weights, in their size: AdamW's moments; gradients, of few weights in double precision and of
    both halves; older copies; in memory, two checkpoints of weights and moments."""
    config = trainer.config
    gradients = 4 if count <= FEW else 1
    copies = len(trainer.algorithm.copies) + (config.optimizer.average > 0)
    copies += config.policy.lora is not None and config.policy.reference == "start"
    return 2 + gradients + copies + (0 if on_card else 6)
