"""Settings with which a run fits a card: what is held, and sizes and options to paste. docs/plan.md."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from diffusionrl.config import TrainConfig
from diffusionrl.doctor.needs import Needs, find_needs
from diffusionrl.doctor.resources import clock, largest
from diffusionrl.errors import UserError

CONTEXT = 0.6e9
"""Bytes of a card that are CUDA's own, and its libraries'. Not measured."""
FULL = 0.9
"""Of what is left, the share that a run may hold: the allocator keeps more than is in use. Not measured."""
_MOST = 64  # samples or rows at once that are proposed, if fewer are not configured
_EMBEDDING = ("--policy.dtype bfloat16", "--policy.quantization int8", "--policy.quantization nf4")
_NETWORKS = ("--policy.offload-text-encoders", *_EMBEDDING)
_OPTIONS = {
    "embedding": _EMBEDDING,
    "sampling": ("--policy.offload-text-encoders", "--policy.vae-slicing", "--policy.vae-tiling", *_EMBEDDING),
    "updates": ("--policy.offload-text-encoders", "--policy.dtype bfloat16", "--policy.gradient-checkpointing", *_EMBEDDING[1:]),
}
"""What helps where the most is held, in the order in which it is tried: what costs least comes first."""


@dataclass(frozen=True)
class Card:
    """Attributes:
    bytes: its memory.
    own: it has memory of its own; else it is the machine's.
    """

    bytes: float
    own: bool

    @property
    def usable(self) -> float:
        return FULL * (self.bytes - (CONTEXT if self.own else 0))


@dataclass(frozen=True)
class Plan:
    """Attributes:
    options: that were added to the configured ones.
    batch, micro: sizes of ``sampling.batch_size`` and ``algorithm.micro_batch_size``; 0 where nothing fits.
    """

    card: Card
    needs: Needs
    options: tuple[str, ...]
    batch: int
    micro: int

    @property
    def fits(self) -> bool:
        return bool(self.batch and self.micro)

    @property
    def peaks(self) -> dict[str, float]:
        return self.needs.peaks(max(1, self.batch), max(1, self.micro))

    @property
    def pasted(self) -> str:
        """The options of ``diffusionrl train``."""
        sizes = (f"--sampling.batch-size {self.batch}", f"--algorithm.micro-batch-size {self.micro}")
        return " ".join((*sizes, *self.options))


def read_card(text: str) -> Card:
    """ "24 GB", or "24": in units of 10^9 bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|G)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) * 1e9 <= CONTEXT:
        raise UserError(f"card {text!r} is none: give its memory, such as '24 GB'")
    return Card(float(match[1]) * 1e9, True)


def make_plan(config: TrainConfig, card: Card, find: Callable[[TrainConfig, bool], Needs] = find_needs) -> Plan:
    """The first settings that fit: those that are configured, then with one more option each time, of those that help where the
    most is held. Prompts and samples a step stay as they are.

    Raises:
        UserError: the model cannot be planned.
    """
    options: list[str] = []
    while True:
        needs = find(_with(config, options), card.own)
        peaks = needs.peaks(1, 1)
        when = max(peaks, key=lambda phase: peaks[phase])
        if peaks[when] <= card.usable:
            break
        phase = "sampling" if when == "an evaluation" else when
        added = next((each for each in _OPTIONS[phase] if _helps(each, config, options, card)), None)
        if added is None:
            break
        options = [each for each in options if each.split()[0] != added.split()[0]] + [added]
    update = min(needs.rows[0], max(_MOST, config.algorithm.micro_batch_size))
    sampled = min(config.samples_per_step, max(_MOST, config.sampling.batch_size))

    def fits(batch: int, micro: int, phases: tuple[str, ...]) -> bool:
        found = needs.peaks(batch, micro)
        return all(found[phase] <= card.usable for phase in (*phases, "embedding"))

    batch = largest(_power(sampled), lambda n: fits(n, 1, ("sampling", "an evaluation")))
    micro = largest(_power(update), lambda n: fits(1, n, ("updates",)))
    return Plan(card, needs, tuple(options), batch, micro)


def _power(size: int) -> int:
    """The largest power of 2 up to it."""
    return 1 << (size.bit_length() - 1)


_FIELDS = {
    "--policy.offload-text-encoders": {"offload_text_encoders": True},
    "--policy.vae-slicing": {"vae_slicing": True},
    "--policy.vae-tiling": {"vae_tiling": True},
    "--policy.dtype bfloat16": {"dtype": "bfloat16"},
    "--policy.gradient-checkpointing": {"gradient_checkpointing": True},
    "--policy.quantization int8": {"quantization": "int8"},
    "--policy.quantization nf4": {"quantization": "nf4"},
}


def _with(config: TrainConfig, options: list[str]) -> TrainConfig:
    changes = {name: value for option in options for name, value in _FIELDS[option].items()}
    return replace(config, policy=replace(config.policy, **changes))  # type: ignore[arg-type]


def _helps(option: str, config: TrainConfig, options: list[str], card: Card) -> bool:
    """Whether an option is neither on, nor one that cannot be."""
    policy = _with(config, options).policy
    (name, value), *_ = _FIELDS[option].items()
    if getattr(policy, name) == value or (name == "quantization" and policy.quantization == "nf4"):
        return False
    if policy.training == "full" and name in ("dtype", "quantization"):
        return False
    return card.own or (name != "offload_text_encoders" and value != "nf4")


def layout(plan: Plan, rate: float | None = None) -> str:
    """As text.

    Args:
        rate: floating point operations a second that the card sustains; None: no time is told.
    """
    needs, config = plan.needs, plan.needs.config
    weights = ", ".join(f"{name} {_gb(size)}" for name, size in needs.weights.items())
    batch, micro = max(1, plan.batch), max(1, plan.micro)
    lines = [
        f"{needs.about}: {config.algorithm.name}, {config.prompts_per_step} prompts x {config.samples_per_prompt} a step, "
        f"{config.policy.dtype}, planned by its settings alone",
        "",
        f"weights       {_gb(sum(needs.weights.values())):>9}  {weights}",
        f"trained       {_gb(needs.trained + needs.optimizer):>9}  {needs.trained / 4e6:.1f} M weights, gradients, AdamW, copies",
        f"samples       {_gb(needs.sample * config.samples_per_step):>9}  of a step, until it is trained on",
        f"activations   {_gb(needs.denoise.peak(batch)):>9}  of a denoising step with {batch} at once",
        f"              {_gb(needs.decode.peak(min(batch, 16))):>9}  of decoding {min(batch, 16)}",
        f"              {_gb(needs.update.peak(micro)):>9}  of an update with {micro} rows at once",
        f"              {_gb(needs.embedding):>9}  of embedding a prompt"
        + (f", for which text encoders come: {_gb(needs.waiting)}" if needs.waiting else ""),
        "",
        *(f"{phase:<14}{_gb(size):>9}  at the peak" for phase, size in plan.peaks.items()),
        "",
        f"{_gb(plan.card.bytes)} of memory, of which {_gb(plan.card.usable)} are planned with",
    ]
    lines.append(f"fits:         {plan.pasted}" if plan.fits else "does not fit, even one at a time with every option that helps")
    operations = needs.operations()
    time = "" if rate is None else f": at least {clock(operations / rate)} at the {rate / 1e12:g} TFLOP/s that were given"
    lines.append(f"a step:       {operations / 1e12:.3g} TFLOP{time}, without the reward")
    if rate is not None:
        lines.append(f"the run:      {clock(config.last_step * operations / rate)} for {config.last_step} steps, without evaluations")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
