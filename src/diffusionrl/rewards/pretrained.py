"""Networks of rewards from folders and the hub, by transformers: whole, or not at all.

transformers is imported where it is first needed: ``serve-reward`` has to start beside any version of it, see
docs/serve_reward.md.
"""

from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError

from diffusionrl import devices
from diffusionrl.errors import UserError
from diffusionrl.runs.hub import cached_first

Source = tuple[str, str | None]
"""A folder or hub id, and its commit; see ``hub.locate``."""

BROKEN = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises where files are not there, or are not what it takes them for."""


def load_network(what: str, auto_class: str, source: Source, optional: tuple[str, ...] = ()) -> Any:
    """In float32, without gradients, on the best device.

    Args:
        what: the network in words, for errors.
        auto_class: the name of one of transformers' classes.
        optional: beginnings of the names of weights that are not used and may be missing.

    Raises:
        UserError: it does not load, or its file lacks weights or has some of another size, in whose place transformers would
            put random ones.
    """
    import transformers

    load = getattr(transformers, auto_class).from_pretrained
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that all of them can be named
    try:
        network, info = cached_first(partial(load, use_safetensors=True, dtype=torch.float32, **told), *source)
    except BROKEN as error:
        raise UserError(f"{what} could not be loaded: {error}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(optional))
    resized = sorted(f"{name}, {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"])
    for fault, names in (("lack", missing), ("do not fit", resized)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{what} could not be loaded: its weights {fault} {'; '.join(names[:3])}{more}, which would be random; "
                "give a checkpoint that is whole"
            )
    return network.eval().requires_grad_(False).to(devices.choose())


def load_tokenizer(what: str, source: Source) -> Any:
    """Raises UserError where it does not load."""
    from transformers import AutoTokenizer

    try:
        return cached_first(AutoTokenizer.from_pretrained, *source)
    except BROKEN as error:
        raise UserError(f"{what} could not be loaded: {error}") from error


def load_image_settings(what: str, source: Source) -> dict[str, Any]:
    """How images have to be prepared: "size" ("shortest_edge", or "height" and "width"), "image_mean", "image_std", and
    whatever else is there.

    Raises:
        UserError: there are none, or one of these is not among them.
    """
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        settings, _ = cached_first(BaseImageProcessor.get_image_processor_dict, *source)
    except BROKEN as error:
        raise UserError(f"{what} could not be loaded: {error}") from error
    size = settings.get("size")
    settings["size"] = size = {"shortest_edge": size} if isinstance(size, int) else size
    sized = isinstance(size, dict) and ("shortest_edge" in size or {"height", "width"} <= size.keys())
    coloured = {key: isinstance(settings.get(key), list) and len(settings[key]) == 3 for key in ("image_mean", "image_std")}
    for key, good in {"size": sized, **coloured}.items():
        if not good:
            needed = "a shortest_edge, or a height and a width" if key == "size" else "three numbers"
            raise UserError(
                f"{what}: preprocessor_config.json of {source[0]} has {settings.get(key)!r} for {key}, which must be {needed}: "
                "copy the file that was published with the weights"
            )
    return settings
