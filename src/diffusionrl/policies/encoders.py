"""Where a pipeline runs, and text encoders that wait in main memory, on the device only while prompts are embedded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import empty_device_cache
from transformers import PreTrainedModel


def run_on(pipeline: Any, device: torch.device) -> None:
    """Tell a pipeline its device. In every call it would look into every module of its parts for that, and take the place of
    an encoder that waits for its own."""
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "_execution_device": device})


def encoders_of(components: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that are models of transformers: what it reads prompts with."""
    return {name: part for name, part in components.items() if isinstance(part, PreTrainedModel)}


class WaitingEncoders:
    """Encoders that leave the device, and come back while they are ``needed``.

    One that is called outside of that, such as an image encoder that a pipeline asks in every call, stays from then on.
    """

    def __init__(self, encoders: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._waiting, self._device, self._depth, self._here = dict(encoders), device, 0, False
        for name, encoder in encoders.items():
            encoder.to("cpu").register_forward_pre_hook(self._stay_if_called(name))

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Within it, they are on the device."""
        with self.together():
            if self._waiting and not self._here:
                self._move(self._device)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Once they came, they stay to the end of it: they are moved once for many prompts."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._here and not self._depth:
                self._move(torch.device("cpu"))
                empty_device_cache(self._device.type)

    def _move(self, device: torch.device) -> None:
        self._here = device == self._device
        for encoder in self._waiting.values():
            encoder.to(device)

    def _stay_if_called(self, name: str) -> Callable[..., None]:
        def stay(encoder: torch.nn.Module, given: Any) -> None:
            if not self._depth and name in self._waiting:
                self._waiting.pop(name).to(self._device)

        return stay
