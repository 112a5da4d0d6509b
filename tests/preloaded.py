"""The last that the server imports which the tests fork processes from: what every run would begin with is done once."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("")  # which compiles a thousand regular expressions
gc.freeze()  # what is shared stays so
