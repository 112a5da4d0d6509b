"""``python -m diffusionrl``."""

from diffusionrl.cli import entry

entry()
