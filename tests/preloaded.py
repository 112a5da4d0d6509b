"""The last that the server imports which the tests fork processes from: what every run would begin with is done once."""

import gc

from diffusers import DDIMScheduler
from PIL import Image
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import diffusionrl.cli.train  # noqa: F401
from diffusionrl.cli.parsing import parse_train

get_checkpoint_conversion_mapping("")  # which compiles a thousand regular expressions
parse_train([])  # which reads what all settings are
Image.init()
assert DDIMScheduler().compatibles  # imports them all
gc.freeze()  # what is shared stays so
