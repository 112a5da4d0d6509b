"""Mirrors of metrics.jsonl: TensorBoard, Weights & Biases, MLflow and Trackio, through accelerate's trackers.

Each lives in a thread of its own. One that fails is left out from there on, with a warning; those that hang cost the run
``PATIENCE`` seconds at its end, all of them together.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from diffusionrl.errors import UserError

PATIENCE = 5.0
IMAGES = 8
"""How many of an evaluation's images a tracker gets, always those of the same seeds."""
_NEEDS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",), "trackio": ("trackio",)}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a tracker's package is not installed."""
    for name in names:
        if not any(find_spec(package) for package in _NEEDS[name]):
            raise UserError(f"--track {name} needs its package: pip install {_NEEDS[name][0]}")


def make_tracker(name: str, run_dir: Path, settings: dict[str, Any]) -> Any:
    """accelerate's tracker of that name, started, with the run's settings in it."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(run_dir / "trackers")} if kind.requires_logging_directory else {}
    tracker = kind(run_dir.name, **where)
    tracker.start()
    tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
    return tracker


class Mirror(threading.Thread):
    """One tracker. A daemon, so that it cannot keep the process from ending.

    Args:
        make: returns an object with ``log(values, step=...)`` and ``finish()``, and ``log_images(values, step=...)`` if it can.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name=f"tracker {name}")
        self._make = make
        self._layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        self._lines: SimpleQueue[tuple[dict[str, Any], Sequence[Path]] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        try:
            tracker = self._make()
            while (handed := self._lines.get()) is not None:
                line, images = handed
                tracker.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
                if images and hasattr(tracker, "log_images"):
                    pixels = np.stack([np.asarray(Image.open(file)) for file in images])
                    tracker.log_images({"eval/images": pixels}, step=line["step"], **self._layout)
            tracker.finish()
        except BaseException as error:  # whatever a tracker does, it is not the run's concern
            print(f"warning: {self.name} failed and is left out from here on: {type(error).__name__}: {error}", file=sys.stderr)

    def log(self, line: dict[str, Any], images: Sequence[Path] = ()) -> None:
        """Hand over one line of metrics and the images that belong to it, as files; never waits."""
        self._lines.put((line, images))

    def close(self, deadline: float) -> None:
        """Let it finish until ``deadline`` (of ``time.monotonic``)."""
        self._lines.put(None)
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            print(f"warning: {self.name} does not finish and is left behind", file=sys.stderr)


def close_all(mirrors: Sequence[Mirror]) -> None:
    """Wait for all of them together, at most ``PATIENCE`` seconds."""
    deadline = time.monotonic() + PATIENCE
    for mirror in mirrors:
        mirror.close(deadline)
