"""The command line. A command is imported only when it is asked for, and torch only when it runs."""

import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import NoReturn

from diffusionrl.cli.streams import steady_streams
from diffusionrl.config.presets import PRESETS
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.interruption import Interrupted, ignore, noted

START_AGAIN = 75  # EX_TEMPFAIL: a scheduler should start the same command again
USAGE = f"""usage: diffusionrl COMMAND [OPTIONS]

  train         tune a model towards a reward     [--preset NAME] [--config FILE.yaml] [OPTIONS]
  doctor        try one tiny step of what "train" would do with the same options, and say what is wrong; with --control, what
                a few steps on noise do to the scores
  plan          what of a card's memory "train" would need with the same options, and settings that fit   [--card "24 GB"]
  sample        make images from a model or a run; with --search best-of-n, demon or particles, those that --reward likes
  evaluate      score a model, a LoRA or a run on fixed seeds, alone or against a baseline
  classify      which prompt fits an image, by a diffusion model       IMAGE ... --prompts "a cat" "a dog"
  choose        the better of two images, by a person on a page of this machine   FOLDER, RUN or --model NAME
  report        write a run's report.html again   RUN
  compare       several runs on one page          RUN RUN ... [--out compare.html]
  export        write the weights of an earlier checkpoint          RUN [--step N] [--out FOLDER]
  push          upload what a run exported to the hub     RUN REPO_ID
  serve-reward  score images over HTTP            NAME [OPTIONS]

"diffusionrl COMMAND --help" lists the options. Every field of the configuration is one (--algorithm.clip-range 1e-4).
Options win over the YAML file, which wins over the preset (default: emoji, or emoji-flow for that model).
Presets: {textwrap.fill(", ".join(PRESETS), 110, subsequent_indent="  ", break_on_hyphens=False)}
"""
COMMANDS = (
    *("train", "doctor", "plan", "sample", "evaluate", "classify", "choose", "report", "compare", "export", "push"),
    "serve-reward",
)
"""Each is a module beside this one, with a function ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a run that had to stop or that the doctor fails, 2 for what the user can
    mend, 75 for a run that a signal stopped and that the same command takes up again."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        with noted() if arguments[0] == "train" else nullcontext():
            command = import_module(f"diffusionrl.cli.{arguments[0].replace('-', '_')}")
            return command.run(arguments[1:]) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if error.saved_in is None:
            print(f"stopped by {error} before there was anything to save", file=sys.stderr)
        else:
            print(f"saved and stopped by {error}; go on with the same command and --run-dir {error.saved_in}", file=sys.stderr)
        return START_AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """The command line as a process. Python would wait for every thread at its end, and a reward's or tracker's may hang."""
    steady_streams()
    with noted() if sys.argv[1:2] == ["train"] else nullcontext():  # beyond the end of the command, for a second signal
        code = main()
        ignore()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
