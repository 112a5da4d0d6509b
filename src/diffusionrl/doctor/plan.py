"""Settings with which a run fits a card: what is held, and sizes and options to paste. docs/plan.md."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusionrl.config import PolicyConfig, TrainConfig
from diffusionrl.doctor.needs import DECODED, Needs, find_needs
from diffusionrl.doctor.resources import clock, largest
from diffusionrl.errors import UserError

CONTEXT = 0.6e9
"""Bytes of a card that are CUDA's own, and its libraries'. Not measured."""
FULL = 0.9
"""Of what is left, the share that a run may hold: the allocator keeps more than is in use. Not measured."""
_MOST = 64  # samples or rows at once that are proposed, if fewer are not configured
_EMBEDDING = ("--policy.dtype bfloat16", "--policy.quantization int8", "--policy.quantization nf4")
_SLICING = "--policy.vae-slicing"
_OPTIONS = {
    "embedding": _EMBEDDING,
    "sampling": ("--policy.offload-text-encoders", "--policy.dtype bfloat16", "--policy.vae-tiling", *_EMBEDDING[1:]),
    "updates": (
        "--policy.offload-text-encoders",
        "--policy.dtype bfloat16",
        "--policy.gradient-checkpointing",
        *_EMBEDDING[1:],
    ),
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
    config: with the options that were added.
    options: these.
    batch, micro: sizes of ``sampling.batch_size`` and ``algorithm.micro_batch_size``; 0 where nothing fits.
    """

    config: TrainConfig
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
        return self.needs.peaks(self.config, max(1, self.batch), max(1, self.micro))

    @property
    def decoding_limits(self) -> bool:
        """Whether it is decoding that keeps a batch small."""
        twice = 2 * self.batch
        return 0 < self.batch < DECODED and self.needs.decode.peak(twice) > self.needs.denoise.peak(twice)

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


Find = Callable[[TrainConfig, bool], Needs]


def make_plan(config: TrainConfig, card: Card, find: Find | None = None) -> Plan:
    """The first settings that fit: those that are configured, then with one more option each time, of those that help where the
    most is held. Prompts and samples a step stay as they are.

    Args:
        find: in the place of ``find_needs``, for several cards.

    Raises:
        UserError: the model cannot be planned.
    """
    search = _Search(config, card, find or Findings())
    search.fit_one()
    plan = search.sizes()
    if _SLICING not in plan.options and plan.decoding_limits and search.add([_SLICING]):
        plan = search.sizes()
    return plan


class _Search:
    def __init__(self, config: TrainConfig, card: Card, find: Find) -> None:
        self.card, self._find, self._asked, self._refused = card, find, config, set[str]()
        self.config, self.options, self.needs = config, list[str](), find(config, card.own)

    def add(self, helping: Sequence[str]) -> bool:
        """The first of some options that is neither on, nor one that cannot be. Returns whether there was one."""
        for option in helping:
            if option in self._refused or not _helps(option, self.config, self.card):
                continue
            options = [each for each in self.options if each.split()[0] != option.split()[0]] + [option]
            config = _with(self._asked, options)
            try:
                self.needs = self._find(config, self.card.own)
            except UserError:  # a network that has no such switch
                self._refused.add(option)
                continue
            self.config, self.options = config, options
            return True
        return False

    def fit_one(self) -> None:
        """Add options until one sample and one row at a time fit, or none is left that helps."""
        while True:
            peaks = self.needs.peaks(self.config, 1, 1)
            when = max(peaks, key=lambda phase: peaks[phase])
            helping = _OPTIONS["sampling" if when == "an evaluation" else when]
            if peaks[when] <= self.card.usable or not self.add(helping):
                return

    def sizes(self) -> Plan:
        """With the largest batches that fit."""
        update = min(self.needs.rows[0], max(_MOST, self.config.algorithm.micro_batch_size))
        sampled = min(self.config.samples_per_step, max(_MOST, self.config.sampling.batch_size))
        batch = largest(_power(sampled), lambda n: self._fits(n, 1, "sampling", "an evaluation"))
        micro = largest(_power(update), lambda n: self._fits(1, n, "updates"))
        return Plan(self.config, self.card, self.needs, tuple(self.options), batch, micro)

    def _fits(self, batch: int, micro: int, *phases: str) -> bool:
        found = self.needs.peaks(self.config, batch, micro)
        return all(found[phase] <= self.card.usable for phase in (*phases, "embedding"))


class Findings:
    """``find_needs``, and what it has found: a quantised base and waiting encoders hold other weights, and compute the same."""

    def __init__(self) -> None:
        self._found: dict[tuple[TrainConfig, bool], Needs] = {}

    def __call__(self, config: TrainConfig, on_card: bool) -> Needs:
        key = replace(config, policy=replace(config.policy, quantization="none", offload_text_encoders=False)), on_card
        if key not in self._found:
            self._found[key] = find_needs(*key)
        return self._found[key]


def _power(size: int) -> int:
    """The largest power of 2 up to it."""
    return 1 << (size.bit_length() - 1)


_FIELDS: dict[str, dict[str, Any]] = {
    "--policy.offload-text-encoders": {"offload_text_encoders": True},
    _SLICING: {"vae_slicing": True},
    "--policy.vae-tiling": {"vae_tiling": True},
    "--policy.dtype bfloat16": {"dtype": "bfloat16"},
    "--policy.gradient-checkpointing": {"gradient_checkpointing": True},
    "--policy.quantization int8": {"quantization": "int8"},
    "--policy.quantization nf4": {"quantization": "nf4"},
}


def _with(config: TrainConfig, options: list[str]) -> TrainConfig:
    changes = {name: value for option in options for name, value in _FIELDS[option].items()}
    return replace(config, policy=replace(config.policy, **changes))


def _helps(option: str, config: TrainConfig, card: Card) -> bool:
    """Whether an option is neither on, nor one that cannot be."""
    policy = config.policy
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
    needs, config = plan.needs, plan.config
    batch, micro = max(1, plan.batch), max(1, plan.micro)
    held, decoded = needs.held(config.policy), min(batch, DECODED)
    came = f", for which text encoders of {_gb(held['waiting'])} come" if held["waiting"] else ""
    rows = [
        ("weights", held["networks"] + held["text encoders"], _parts(needs, config.policy)),
        ("trained", held["trained"], f"{needs.trained / 4e6:.1f} M weights, their gradients, AdamW's moments, copies"),
        ("samples", needs.sample * config.samples_per_step, "of a step, until it has been trained on"),
        ("activations", needs.denoise.peak(batch), f"of a denoising step, {batch} at once"),
        ("", needs.decode.peak(decoded), f"of decoding, {decoded} at once"),
        ("", needs.update.peak(micro), f"of an update, {micro} rows at once"),
        ("", needs.embedding, f"of embedding a prompt{came}"),
        *(("at the peak" if i == 0 else "", size, phase) for i, (phase, size) in enumerate(plan.peaks.items())),
    ]
    told = [f"{name:<12} {_gb(size):>8}  {what}" for name, size, what in rows]
    title = (
        f"{needs.about}, {config.algorithm.name}, {config.prompts_per_step} prompts x {config.samples_per_prompt} a step, in "
        f"{config.policy.dtype}: planned from its settings, nothing was measured"
    )
    room = f"{_gb(plan.card.bytes)} of memory, of which a run may take {_gb(plan.card.usable)}"
    fits = f"it fits with\n\n    {plan.pasted}" if plan.fits else "it does not fit, with all that helps and one at a time"
    return "\n".join([title, "", *told, "", f"{room}: {fits}", "", _time(plan, rate)])


def _parts(needs: Needs, policy: PolicyConfig) -> str:
    """Which networks are on the device, in bytes as they are before they are quantised."""
    here = [name for name in needs.weights if not (policy.offload_text_encoders and name in needs.encoders)]
    few = f"; its linear layers in {policy.quantization}" if policy.quantization != "none" else ""
    return ", ".join(f"{name} {_gb(needs.weights[name])}" for name in here) + few


def _time(plan: Plan, rate: float | None) -> str:
    config, operations = plan.config, plan.needs.operations(plan.config)
    counted = f"a step takes {operations / 1e12:.3g} TFLOP, and the reward"
    if rate is None:
        return f"{counted}; --rate, TFLOP/s that the card sustains, makes a time of it"
    step = operations / rate
    run = f"{clock(config.last_step * step)} for {config.last_step} steps, without evaluations"
    return f"{counted}: at {rate / 1e12:g} TFLOP/s, as was given, {clock(step)} without the reward; {run}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
