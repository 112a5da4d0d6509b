"""What a run would hold in memory and compute, found on shapes alone: no weights are read, nothing is computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms import make_algorithm
from diffusionrl.config import PolicyConfig, TrainConfig
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.doctor.meter import Meter
from diffusionrl.doctor.resources import something_to_learn, whole_step
from diffusionrl.doctor.savings import BITS
from diffusionrl.doctor.shapes import build_pipeline
from diffusionrl.doctor.update import rows_of_an_update
from diffusionrl.errors import UserError
from diffusionrl.foreign.names import is_code
from diffusionrl.policies.encoders import encoders_of
from diffusionrl.policies.loading import check_model, configuration_of, policy_of
from diffusionrl.policies.quantization import is_denoiser
from diffusionrl.rewards import Scores, as_mixture, differentiable
from diffusionrl.sampling.rollout import Rollout, denoise_step, make_table
from diffusionrl.training.optimization import FEW, accumulate_gradient
from diffusionrl.training.parts import follow
from diffusionrl.training.trainer import Trainer

DECODED = 16
"""Samples at once, at most."""


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
        weights: of the pipeline's networks, by part, without what is trained.
        encoders: the parts that read prompts.
        linear: of the denoising networks' linear layers, which can be quantised: all of them, and the largest.
        trained: of the trained weights.
        optimizer: of what belongs to them: AdamW's moments, gradients while they are added up, older copies.
        denoise, decode, update: activations of a denoising step and of decoding, by samples; of an update, by rows.
        embedding: activations of embedding a prompt.
        latent: of one latent.
        sample: of what a step keeps of a sample, until it has been trained on.
        evaluated: of what an evaluation keeps of one.
        num_steps: denoising steps.
        rows: of the largest update of a step, and of all of them together.
        width: bits of a weight.
    """

    weights: dict[str, float]
    encoders: tuple[str, ...]
    linear: tuple[float, float]
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
    width: int
    about: str

    def held(self, policy: PolicyConfig) -> dict[str, float]:
        """What is there all the time, by what it is; and "waiting", text encoders that wait elsewhere."""
        quantised = policy.quantization != "none"
        saved = self.linear[0] * (1 - BITS[policy.quantization] / self.width) if quantised else 0.0
        waiting = self.encoders if policy.offload_text_encoders else ()
        return {
            "networks": sum(size for name, size in self.weights.items() if name not in self.encoders) - saved,
            "text encoders": sum(self.weights[name] for name in self.encoders if name not in waiting),
            "trained": self.trained + self.optimizer,
            "waiting": sum(self.weights[name] for name in waiting),
        }

    def peaks(self, config: TrainConfig, batch: int, micro: int) -> dict[str, float]:
        """The most that is held in each phase of a step, and in an evaluation."""
        held = self.held(config.policy)
        waiting = held.pop("waiting")
        resident, layer = sum(held.values()), self.linear[1] if config.policy.quantization != "none" else 0.0
        found = {"embedding": resident + waiting + self.embedding}
        for phase, kept, count in (
            ("sampling", self.sample, config.samples_per_step),
            ("an evaluation", self.evaluated, config.evaluation.num_samples),
        ):
            n = min(batch, count)
            chain = self.latent * self.num_steps * n  # of the noise, as of the latents and of their means
            decoding = self.decode.peak(min(n, DECODED))
            during = max(max(self.denoise.peak(n) + layer, decoding) + 3 * chain, 5 * chain)
            found[phase] = resident + kept * count + max(during, kept * count)  # samples are put together in the end
        found["updates"] = resident + self.sample * config.samples_per_step + self.update.peak(micro) + layer
        return found

    def operations(self, config: TrainConfig) -> float:
        """Floating point operations of a training step."""
        count = config.samples_per_step
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
    if is_code(config.model):
        raise UserError("plan reads the settings of a diffusers pipeline, and a model of your own has none: try the doctor")
    prompts = load_prompts(config.prompts, config.max_broken_prompts)
    check_model(config.model, config.model_config)
    with Meter() as meter:
        try:
            policy = _policy_of(config, prompts[0], meter, on_card)
            return _measured(meter, Trainer(policy, _brightness, prompts, make_algorithm(config), config), on_card)
        except UserError:
            raise
        except Exception as error:  # of a library that asks for values where there are none, or of settings that do not fit
            raise UserError(
                f"model {config.model!r} cannot be planned by its settings: {type(error).__name__}: {error}. The doctor tries "
                "one step of it, with its weights"
            ) from error


def _policy_of(config: TrainConfig, example: Prompt, meter: Meter, on_card: bool) -> Any:
    """Without weights."""
    source = configuration_of(config.model, config.model_config)
    pipeline = build_pipeline(source, getattr(torch, config.policy.dtype), meter, on_card)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
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
    rollout, advantages, rows = make_up(trainer)
    works = works_of(trainer, rollout, advantages, rows)
    first = trainer.prompts[0]
    both = rollout.table.grid.levels[torch.tensor([0, len(rollout.table) - 1])]
    with torch.no_grad():
        for guidance in (None, config.sampling.guidance):  # whatever is tried or kept the first time
            policy.denoise(policy.start([first] * 2, [0, 1]), both, [first] * 2, guidance)
        before = meter.restart()
        unseen = [replace(first, text=first.text[1:] or "unseen")]
        policy.denoise(policy.start(unseen, [0]), both[:1], unseen, config.sampling.guidance)
        embedding = meter.peak - before
    updates = [len(each) for each in whole_step(trainer, rollout, advantages)]
    kept = [each for each in (rollout.latents, rollout.log_probs, rollout.steps, rollout.means) if each is not None]
    image = 0 if on_card else rollout.images[0].nbytes
    chain = len(rollout.table) + 1 if trainer.monitor.has_reference else 1
    latent = rollout.latents[0, 0].nbytes
    return Needs(
        **_weights(trainer, on_card),
        denoise=_work(meter, works["denoise"], 4),
        decode=_work(meter, works["decode"], 2),  # whose images are real
        update=_work(meter, works["update"], 4),
        embedding=embedding,
        latent=latent,
        sample=sum(each[0].nbytes for each in kept) + image,
        evaluated=latent * chain + image,
        num_steps=len(rollout.table),
        rows=(max(updates), sum(updates)),
        width=8 * getattr(torch, config.policy.dtype).itemsize,
        about=str(policy.about.get("pipeline", "StableDiffusionPipeline")),
    )


def works_of(trainer: Trainer, rollout: Rollout, advantages: Tensor, rows: Tensor) -> dict[str, Callable[[int], object]]:
    """What a run does most of the time, each for a batch of n: a denoising step, decoding, and the gradient of n rows."""
    policy, algorithm, config, first = trainer.policy, trainer.algorithm, trainer.config, trainer.prompts[0]

    def start(n: int) -> Tensor:
        return policy.start([first] * n, [seeds.address(config.seed, "plan", 0, i) for i in range(n)])

    @torch.no_grad()
    def denoise(n: int) -> None:
        steps = torch.zeros(n, dtype=torch.long)
        denoise_step(policy, rollout.table, start(n), steps, [first] * n, config.sampling.guidance)

    def update(n: int) -> None:
        configured, alike = algorithm.micro_batch_size, rows[rows[:, 0] == rows[0, 0]]  # of one sample
        algorithm.micro_batch_size = n
        try:
            accumulate_gradient(algorithm, policy, rollout, alike[torch.arange(n) % len(alike)], advantages)
        finally:
            algorithm.micro_batch_size = configured
            trainer.state.optimization.adamw.zero_grad()

    return {"denoise": denoise, "decode": lambda n: policy.decode(start(n), [first] * n), "update": update}


def _work(meter: Meter, work: Callable[[int], object], n: int) -> Work:
    """From a batch of 1 and one of n."""
    found = []
    for size in (1, n):
        before, operations = meter.restart(), meter.operations
        work(size)
        found.append((meter.peak - before, meter.operations - operations))
    slopes = [(large - small) / (n - 1) for small, large in zip(*found, strict=True)]
    starts = [small - slope for small, slope in zip(found[0], slopes, strict=True)]
    return Work((starts[0], slopes[0]), (starts[1], slopes[1]))


def make_up(trainer: Trainer) -> tuple[Rollout, Tensor, Tensor]:
    """Two groups of samples, all zero, of which every other one is good; their advantages; and rows of an update."""
    policy, config, needs = trainer.policy, trainer.config, trainer.algorithm.needs
    table = trainer.algorithm.table(make_table(policy, config.sampling), config.seed, 1)
    group = max(2, min(config.samples_per_prompt, 4))
    prompts = [prompt for prompt in (list(trainer.prompts) * 2)[:2] for _ in range(group)]
    count, steps, whole = len(prompts), len(table), needs != "endpoints"

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(count, *shape)

    rollout = Rollout(
        table,
        prompts,
        zeros(steps + 1 if whole else 1, *policy.latent_shape),
        zeros(steps if whole else 0),
        zeros(*policy.sample_shape),
        Scores(torch.tensor([1.0, 0.0]).repeat(count // 2).double(), torch.ones(count, dtype=torch.bool)),
        {"rollout": 1.0, "reward": 0.0},
        group,
        config.sampling.batch_size,
        zeros(steps, *policy.latent_shape) if policy.edits and whole else None,
        policy.sampling_rate,
        reward=as_mixture(_brightness),
        means=zeros(steps, *policy.latent_shape) if needs == "means" else None,
    )
    follow(trainer.policy, trainer.algorithm, 0)  # older copies
    rollout, advantages = something_to_learn(trainer, rollout)
    return rollout, advantages, rows_of_an_update(trainer, rollout, advantages)


def _weights(trainer: Trainer, on_card: bool) -> dict[str, Any]:
    """The first attributes of ``Needs``."""
    policy: Any = trainer.policy
    own, parts = {id(weight) for weight in policy.trainable().values()}, policy.pipeline.components
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    layers = [layer for part in networks.values() if is_denoiser(type(part)) for layer in part.modules()]
    linear = [layer.weight for layer in layers if isinstance(layer, torch.nn.Linear) and id(layer.weight) not in own]
    trained = sum(weight.nbytes for weight in policy.trainable().values())
    return {
        "weights": {
            name: float(sum(each.nbytes for each in (*part.parameters(), *part.buffers()) if id(each) not in own))
            for name, part in networks.items()
        },
        "encoders": tuple(encoders_of(parts)),
        "linear": (float(sum(each.nbytes for each in linear)), float(max((each.nbytes for each in linear), default=0))),
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
