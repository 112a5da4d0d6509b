"""How far a run is: one live line on a terminal, a line a step elsewhere.

The live line is rewritten by a carriage return and blanks alone. No cursor is hidden and no mode is set, so there is nothing
that a killed process could leave behind. Evaluations stay on lines of their own.
"""

import shutil
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

GONE = (OSError, ValueError, AttributeError)
"""What a print raises where the stream is broken, closed or none at all, or has no such letters: the run goes on without it."""


class Progress:
    """The lines of one run."""

    def __init__(self, steps: int, samples_per_step: int) -> None:
        self._steps, self._samples_per_step = steps, samples_per_step
        self._live = 0  # characters of the live line; 0 where there is none
        self.begin(0)

    def begin(self, step: int) -> None:
        """Time is counted from here."""
        self._first_step, self._began = step, time.perf_counter()

    def show(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        line = self._line(metrics)
        passing = "eval/reward" not in metrics
        if "reward/mean" not in metrics:
            self.begin(metrics["step"])
        with suppress(*GONE):  # the terminal may be gone; the run is not
            if not sys.stdout.isatty():
                print(line, flush=True)
                return
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and could not be rewritten
            line = line[:width] if passing else line
            sys.stdout.write("\r" + line.ljust(min(self._live, width)) + ("" if passing else "\n"))
            sys.stdout.flush()
            self._live = len(line) if passing else 0

    def close(self) -> None:
        """Leave the live line, if there is one, as it stands."""
        if self._live:
            self._live = 0
            with suppress(*GONE):
                print(flush=True)

    def _line(self, metrics: dict[str, Any]) -> str:
        """Made to fit 80 columns; the speed is in samples a second."""
        step, queries = metrics["step"], f"queries {metrics['queries']}"
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        left = []
        if "reward/mean" in metrics:
            parts.append(f"reward {metrics['reward/mean']:.3f} ± {metrics['reward/std']:.3f}")
            if step > self._first_step:
                seconds = (time.perf_counter() - self._began) / (step - self._first_step)
                queries += f" ({self._samples_per_step / seconds:.3g}/s)"
                left = [f"{timedelta(seconds=round(seconds * (self._steps - step)))} left"]
        parts += [queries, *left]
        if "eval/reward" in metrics:
            parts.append(f"evaluation {metrics['eval/reward']:.3f} ± {metrics['eval/reward_se']:.3f}")
        return "  ".join(parts)
