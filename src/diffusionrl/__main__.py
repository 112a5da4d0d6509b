"""``python -m diffusionrl``."""

import sys

from diffusionrl.cli import main

sys.exit(main())
