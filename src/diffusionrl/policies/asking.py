"""A diffusers pipeline as five questions: grid, start, denoise, after, decode. It is asked by calling it.

Its scheduler gives way to a ``Listener``; ``prepare_latents`` and the text encoding are overridden on the instance, so that
latents are those that are asked about, and what was made of a prompt once is kept.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.data.media import open_image
from diffusionrl.data.prompts import Prompt, keep_newest
from diffusionrl.errors import UserError
from diffusionrl.policies.encoders import WaitingEncoders
from diffusionrl.policies.listener import Enough, Listener, Offer, networks_run_once
from diffusionrl.policies.memory import Layout, Ragged, bytes_in, find_place, learn_layout, put_together, replace_leaf
from diffusionrl.transitions import Grid, NoiseLevels

REMEMBERED = 2048  # prompts at most: there may be millions of them
REMEMBERED_BYTES = 2 << 30  # of what was made of them, on the device
_IMAGES = 64  # decoded, of the newest prompts
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_ENCODERS = ("encode_prompt", "_encode_prompt")


def check_class(kind: type) -> Callable[..., Any]:
    """The call of a pipeline class, without ``torch.no_grad``.

    Raises:
        UserError: pipelines of this class cannot be asked; the message says which question fails.
    """
    plain = getattr(kind.__call__, "__wrapped__", None)
    if plain is None:
        raise UserError(
            f"{kind.__name__} cannot be asked to denoise: its call is not one that torch.no_grad was wrapped around"
        )
    if not hasattr(kind, "prepare_latents"):
        raise UserError(f"{kind.__name__} cannot be asked where sampling starts: it has no prepare_latents")
    if "output_type" not in inspect.signature(plain).parameters:
        raise UserError(f"{kind.__name__} cannot be asked to decode: its call takes no output_type")
    return plain


class AskedPipeline:
    """A pipeline with a listener for a scheduler.

    Args:
        steps: denoising steps of a real call: given in every one, as some pipelines make schedules from it.
        arguments: of every call: sizes, and whatever else the user wants.
        negative_prompt: for guidance; None leaves it to the pipeline.
        encoders: those that are on the device only while prompts are embedded.

    Attributes:
        ways: how several samples can go in one call: "lists" of prompts, or "counts" of one prompt's samples. Found by trying.

    Raises:
        UserError: it cannot be asked; the message says which question fails.
    """

    def __init__(
        self, pipeline: Any, steps: int, arguments: Mapping[str, Any], negative_prompt: str | None, encoders: WaitingEncoders
    ) -> None:
        self.pipeline, self.steps, self.arguments, self.negative_prompt = pipeline, steps, dict(arguments), negative_prompt
        self._encoders = encoders
        self.plain_call = check_class(type(pipeline))
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        unknown = sorted(set(self.arguments) - set(self.parameters))
        if unknown:
            raise UserError(
                f"{type(pipeline).__name__} takes no {', '.join(unknown)} (sampling.call, height, width, num_frames); it takes "
                f"{', '.join(name for name in self.parameters if name not in ('self', 'kwargs'))}"
            )
        if negative_prompt is not None and ("negative_prompt" not in self.parameters or self._embeds_guidance):
            raise UserError(f"sampling.negative_prompt: {type(pipeline).__name__} has no guidance that leads away from one")
        self.count_argument = next((name for name in _COUNTS if name in self.parameters), None)
        pipeline.set_progress_bar_config(disable=True)
        self.native = pipeline.scheduler
        pipeline.__dict__["scheduler"] = self.listener = Listener(self.native)  # as an attribute alone: it is not to be saved
        self.ways: tuple[str, ...] = ()
        self.lists = True  # in the call that is being made
        self.place: int | None = None
        self._x: Tensor | None = None
        self._rows: list[Prompt] = []
        self._ordinal = 0
        self._until_prepared = self._remembering = self._encoding = False
        self._generators: list[tuple[torch.Generator, int]] = []
        self._started: Any = None
        self._kept: dict[str, dict[Any, Any]] = {}
        self._layouts: dict[Any, Layout] = {}
        self._images: dict[str, dict[str, Any]] = {}
        self._override()

    def _override(self) -> None:
        pipeline = self.pipeline
        self._prepare = pipeline.prepare_latents
        pipeline.prepare_latents = self._prepared
        for name in _ENCODERS:
            if hasattr(pipeline, name):
                setattr(pipeline, name, self._encoder(getattr(pipeline, name)))
        if hasattr(pipeline, "get_timesteps"):  # the cut by strength belongs to the grid, not to the times that are asked for
            cut = pipeline.get_timesteps

            def get_timesteps(*given: Any, **named: Any) -> Any:
                if self.listener.offer is None:
                    return cut(*given, **named)
                return self.listener.timesteps, max(1, len(self.listener.timesteps))

            pipeline.get_timesteps = get_timesteps

    # What the pipeline asks, and is answered

    def _encoder(self, native: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(native)
        count = next((name for name in _COUNTS if name in signature.parameters), None)

        def encode(*given: Any, **named: Any) -> Any:
            if self._encoding:  # one encoder calls the other: what the outer one gives is kept
                return native(*given, **named)
            arguments = signature.bind(*given, **named).arguments
            rows = self._rows if self.lists or (count and arguments.get(count, 1) > 1) else self._rows[:1]
            ordinal, self._ordinal = self._ordinal, self._ordinal + 1
            said = repr([(k, v) for k, v in arguments.items() if k != count and isinstance(v, bool | int | float | type(None))])
            singles = []
            for row, prompt in enumerate(rows):
                own = {
                    name: [v[row]] if isinstance(v, list) and len(v) == len(self._rows) else v for name, v in arguments.items()
                }
                if count in own:
                    own[count] = 1
                texts = repr([(k, v) for k, v in own.items() if isinstance(v, str | list) and "Image" not in repr(v)])
                key = ("encode", native.__name__, ordinal, said, texts)
                kept = self._kept.setdefault(prompt.key, {})
                if key not in kept:
                    kept[key] = self._encode(native, **own)
                singles.append(kept[key])
            return self._together(
                ("encode", native.__name__, ordinal, said, self.lists), singles, lambda: self._encode(native, *given, **named)
            )

        return encode

    def _encode(self, native: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self._encoding = True
        try:
            with torch.no_grad(), self._encoders.needed():
                return native(*given, **named)
        finally:
            self._encoding = False

    def _prepared(self, *given: Any, **named: Any) -> Any:
        if self._x is None:  # they are wanted as the pipeline makes them
            made = self._prepare(*given, **named)
            if self._remembering:  # by the prompt's own draws, whatever samples draw
                self._kept.setdefault(self._rows[0].key, {})["prepared"] = made
            self._started, self.listener.prepared = made, True
            if self._until_prepared:
                raise Enough
            return made
        singles = [self._kept[prompt.key]["prepared"] for prompt in self._rows]
        made = self._together(("prepared", self.lists), singles, lambda: self._prepare(*given, **named))
        for generator, draw in self._generators:  # what is drawn from here on is the same in every call
            generator.manual_seed(draw)
        return replace_leaf(made, self.place, self._x)

    def _together(self, key: Any, singles: Sequence[Any], native: Callable[[], Any]) -> Any:
        if len(singles) == 1:
            return singles[0]
        if key not in self._layouts:
            with torch.no_grad():
                self._layouts[key] = learn_layout(singles, native())
        return put_together(self._layouts[key], singles)

    # Calls

    def _call(
        self, prompts: Sequence[Prompt], guidance: float, output_type: str = "latent", draws: Sequence[int] | None = None
    ) -> Any:
        """Call the pipeline for so many rows; None where it was left.

        Args:
            draws: seeds of what the pipeline draws itself for each row, by default of its prompt.
        """
        arguments: dict[str, Any] = dict(self.arguments)
        texts = [prompt.text for prompt in prompts]
        if "prompt" in self.parameters:
            arguments["prompt"] = texts if self.lists else texts[0]
        arguments |= self._opened(prompts[0])  # then all rows are of one prompt
        if not self.lists and len(prompts) > 1:
            assert self.count_argument is not None
            arguments[self.count_argument] = len(prompts)
        arguments |= self._guided(guidance, len(prompts))
        if "generator" in self.parameters:
            draws = draws or [seeds.address(0, f"condition/{prompt.key}") for prompt in prompts]
            self._generators = [(torch.Generator().manual_seed(draw), draw) for draw in draws]
            arguments["generator"] = [generator for generator, _ in self._generators]
        arguments |= {"num_inference_steps": self.steps, "output_type": output_type, "return_dict": False}
        arguments = {name: value for name, value in arguments.items() if name in self.parameters}
        self._rows, self._ordinal = list(prompts), 0
        with suppress(Enough):
            return self.plain_call(self.pipeline, **arguments)[0]
        return None

    def _opened(self, prompt: Prompt) -> dict[str, Any]:
        """The images of a prompt, decoded once."""
        if prompt.media and prompt.key not in self._images:
            self._images[prompt.key] = {name: open_image(medium) for name, medium in prompt.media.items()}
            keep_newest(self._images, _IMAGES)
        return self._images[prompt.key] if prompt.media else {}

    @cached_property
    def _embeds_guidance(self) -> bool:
        configs = [getattr(part, "config", None) for part in self.pipeline.components.values()]
        return any(getattr(config, "guidance_embeds", False) for config in configs)

    @property
    def given_negative_prompt(self) -> str | None:
        """What is handed over: with ``true_cfg_scale`` there is no guidance without one."""
        return self.negative_prompt or (" " if self.guidance_argument == "true_cfg_scale" else None)

    @property
    def guidance_argument(self) -> str | None:
        """What takes the guidance: ``true_cfg_scale`` where a pipeline has that and its network takes no embedded one."""
        names = ("guidance_scale",) if self._embeds_guidance else ("true_cfg_scale", "guidance_scale")
        return next((name for name in names if name in self.parameters), None)

    def _guided(self, guidance: float, count: int) -> dict[str, Any]:
        """Guidance as this pipeline takes it: embedded, or classifier-free."""
        argument, negative = self.guidance_argument, self.given_negative_prompt
        given: dict[str, Any] = {} if argument is None else {argument: guidance}
        if negative is not None and "negative_prompt" in self.parameters:
            given["negative_prompt"] = [negative] * count if self.lists else negative
        return given

    @contextmanager
    def _asking(self, offer: Offer | None, x: Tensor | None, answers: Sequence[Tensor] = ()) -> Any:
        listener = self.listener
        listener.offer, listener.answers, listener.heard, self._x = offer, list(answers), [], x
        try:
            yield listener.heard
        finally:
            listener.offer, listener.answers, self._x = None, [], None

    def _in_calls(self, prompts: Sequence[Prompt], ask: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """What is asked of all rows, in as few calls as the pipeline takes; ``ask`` is given rows, (B,)."""
        rows = torch.arange(len(prompts), device=device)
        if len(prompts) == 1:
            self.lists = "lists" in self.ways or not self.ways
            return ask(rows)
        if "lists" in self.ways and not any(prompt.media for prompt in prompts):
            self.lists = True
            try:
                return ask(rows)
            except Ragged:
                pass
        self.lists = False
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt.key if "counts" in self.ways else str(row), []).append(row)
        answers = torch.cat([ask(torch.tensor(group, device=device)) for group in groups.values()])
        return answers[torch.tensor([row for group in groups.values() for row in group]).argsort().to(answers.device)]

    # The questions

    def run_through(self, prompt: Prompt, guidance: float) -> tuple[Grid, Tensor, list[str]]:
        """The grid of a call, its first latents, and the names of the networks that its loop calls.

        The networks run in the first step alone; in the others, their outputs are given again.

        Raises:
            UserError: the loop does not call ``step`` once for each of the scheduler's times.
        """
        listener = self.listener
        with (
            self._asking(None, None) as heard,
            networks_run_once(self.pipeline.components, listener) as called,
            torch.no_grad(),
        ):
            self._call([prompt], guidance)
        kind, grid = type(self.pipeline).__name__, listener.grid
        if not heard or grid is None:
            raise UserError(f"{kind} cannot be asked for its grid: its loop never calls the scheduler's step")
        times = torch.stack([each.timestep.float().cpu().reshape(-1)[0] for each in heard])
        if not torch.equal(times, grid.timesteps[len(grid) - len(times) :]):
            raise UserError(
                f"{kind} cannot be asked for its grid: its loop steps at the times {times.tolist()}, "
                f"and its scheduler made {grid.timesteps.tolist()}"
            )
        first = heard[0].sample
        self.place = find_place(first, self._started)
        last = slice(len(grid) - len(times), None)
        columns = (grid.timesteps, grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
        return Grid(*(column[last] for column in columns)), first, called

    def start(self, prompts: Sequence[Prompt], draws: Sequence[int], guidance: float, device: torch.device) -> Tensor:
        """The first latents, as the pipeline makes them, (B, ...); ``draws`` are a seed for each."""
        self.remember(prompts, guidance)
        return self._in_calls(prompts, lambda rows: self._start(_of(prompts, rows), _of(draws, rows), guidance), device)

    def _start(self, prompts: Sequence[Prompt], draws: Sequence[int] | None, guidance: float) -> Tensor:
        self._until_prepared = True
        try:
            with self._asking(None, None), torch.no_grad():
                self._call(prompts, guidance, draws=draws)
        finally:
            self._until_prepared = False
        made: Any = self._started
        return made if self.place is None else made[self.place]

    def remember(self, prompts: Sequence[Prompt], guidance: float) -> None:
        """Have the pipeline make of each prompt what it makes of it, if that is not kept."""
        with self._encoders.together():
            for prompt in {prompt.key: prompt for prompt in prompts}.values():
                for name in prompt.media:
                    if name not in self.parameters:
                        kind = type(self.pipeline).__name__
                        raise UserError(f"{kind} takes no {name}, which the prompt {prompt.text!r} names")
                if "prepared" not in self._kept.get(prompt.key, {}):
                    self.lists, self._remembering = "lists" in self.ways or not self.ways, True
                    try:
                        self._start([prompt], None, guidance)
                    finally:
                        self._remembering = False
                self._kept[prompt.key] = self._kept.pop(prompt.key)  # as the newest
        room = REMEMBERED_BYTES // max(1, bytes_in(self._kept[prompts[-1].key]))  # prompts are about as large as one another
        keep_newest(self._kept, max(len(prompts), min(REMEMBERED, room)))

    def denoise(self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float, repeats: int = 1) -> Tensor:
        """What the network says of x.

        Args:
            levels: (B,). Where they differ, the network is told each row's own, ``repeats`` times over.
        """

        def ask(rows: Tensor) -> Tensor:
            with self._asking(self._offer([levels[rows]], x.device, repeats), x[rows]) as heard:
                self._call(_of(prompts, rows), guidance)
            return heard[0].output

        self.remember(prompts, guidance)
        return self._in_calls(prompts, ask, x.device)

    def after(
        self,
        y: Tensor,
        x: Tensor,
        levels: NoiseLevels,
        following: NoiseLevels | None,
        prompts: Sequence[Prompt],
        guidance: float,
    ) -> Tensor:
        """What the pipeline makes of y after the step from x: what the next step is given, or where there is none, what the
        loop ends with. All rows are at one level."""

        def ask(rows: Tensor) -> Tensor:
            offer = self._offer([each[rows] for each in (levels, following) if each is not None], x.device)
            with self._asking(offer, x[rows], [y[rows]]) as heard, torch.no_grad():
                ended = self._call(_of(prompts, rows), guidance)
            return ended if following is None else heard[1].sample

        self.remember(prompts, guidance)
        return self._in_calls(prompts, ask, x.device)

    def decode(self, latents: Tensor, prompts: Sequence[Prompt], guidance: float) -> Tensor:
        """Samples of latents, with gradient where there is one."""

        def ask(rows: Tensor) -> Tensor:
            with self._asking(
                Offer(torch.empty(0, device=latents.device), torch.zeros(1, device=latents.device)), latents[rows]
            ):
                return torch.as_tensor(self._call(_of(prompts, rows), guidance, "pt"))

        self.remember(prompts, guidance)
        return self._in_calls(prompts, ask, latents.device)

    def _offer(self, levels: Sequence[NoiseLevels], device: torch.device, repeats: int = 1) -> Offer:
        times, sigmas = [], []
        for each in levels:
            alike = bool((each.timesteps == each.timesteps[0]).all())
            sigma = self.listener.schedule.native_sigma(each.alpha, each.sigma)
            times.append(each.timesteps[0] if alike else each.timesteps.repeat(repeats))
            sigmas.append(sigma[0] if alike else sigma.repeat(repeats))
        stacked = torch.stack(sigmas).to(device)
        offered = torch.stack(times).to(device, self.native.timesteps.dtype)
        return Offer(offered, torch.cat([stacked, torch.zeros_like(stacked[:1])]))


def _of(values: Sequence[Any], rows: Tensor) -> list[Any]:
    return [values[row] for row in rows.tolist()]
