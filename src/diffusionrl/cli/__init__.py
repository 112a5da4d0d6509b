"""The command line, a file a command."""

from diffusionrl.cli.commands import START_AGAIN, entry, main
from diffusionrl.cli.parsing import parse_train

__all__ = ["START_AGAIN", "entry", "main", "parse_train"]
