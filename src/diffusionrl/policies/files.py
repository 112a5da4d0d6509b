"""Where a model's files are (the embedded ones, a folder, the hub), what pipeline they are of, and its networks: whole, or not
at all."""

import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel

from diffusionrl.errors import UserError
from diffusionrl.runs.hub import cached_first, local_folder

_WEIGHTS = Path(__file__).parent.parent / "emoji" / "weights"
EMBEDDED_MODEL = _WEIGHTS / "pipeline"
_EMBEDDED = {"emoji": EMBEDDED_MODEL, "emoji-flow": _WEIGHTS / "flow"}
_NAMED = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors")
_SHOWN = 3  # names in an error


def folder_of(model: str) -> Path | None:
    """The local folder of a model, or None for a hub id. Raises UserError where it reads as a folder, and there is none."""
    return _EMBEDDED.get(model) or local_folder(model)


def file_of(model: str, name: str) -> Path:
    """A file of a folder, or of the hub. Raises UserError where the hub does not give it."""
    folder = folder_of(model)
    if folder is not None:
        return folder / name
    try:
        return Path(cached_first(hf_hub_download, model, filename=name))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} is no folder here, and the hub did not give it: {error}") from error


def read_index(model: str) -> dict[str, Any]:
    """A model's ``model_index.json``. Raises UserError where there is none, or no pipeline in it."""
    index = file_of(model, "model_index.json")
    if not index.is_file():
        raise UserError(f"{index.parent} is no diffusers pipeline: it has no model_index.json")
    try:
        found = json.loads(index.read_text())
        str(found["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} does not say what pipeline it is of: {type(error).__name__}: {error}") from error
    return dict(found)


def find_class(model: str) -> Any:
    """The pipeline class of a model, one of diffusers' own.

    Raises:
        UserError: there is no such model, it is no pipeline, or its class is not in diffusers.
    """
    name = str(read_index(model)["_class_name"])
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(
            f"model {model!r} is a {name}, and diffusers {diffusers.__version__} has no such pipeline: upgrade diffusers, or "
            "load it yourself and hand it over in Python"
        )
    return found


def left_out(kind: Any, model: str, index: Mapping[str, Any]) -> dict[str, None]:
    """Parts that a pipeline does without, each as None: those that its index has none of, and the safety checker, with its
    feature extractor where a folder has none."""
    taken, folder = inspect.signature(kind).parameters, folder_of(model)
    absent = [name for name, value in index.items() if value == [None, None] and name in taken]
    if "safety_checker" in taken:
        absent.append("safety_checker")
        if folder is not None and "feature_extractor" in taken and not (folder / "feature_extractor").is_dir():
            absent.append("feature_extractor")
    return dict.fromkeys(absent)


def find_networks(index: Mapping[str, Any], absent: Collection[str]) -> dict[str, Any]:
    """The classes of the parts that have weights, by name, but for those that are absent.

    Raises:
        UserError: an installed library has no such class.
    """
    found = {}
    for name, entry in index.items():
        if name in absent or not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            continue
        try:
            part = simple_get_class_obj(*entry)
        except (AttributeError, ImportError, ValueError) as error:
            raise UserError(f"its {name} is a {'.'.join(entry)}, which is not installed: {error}") from error
        if issubclass(part, torch.nn.Module):
            found[name] = part
    return found


def fetch(kind: Any, model: str, parts: Mapping[str, Any], local_files_only: bool) -> Path:
    """The folder of a model; of a hub id the one in the cache, downloaded but for the parts that are given: weights in
    safetensors, in fp16 where there are no others.

    Raises:
        OSError: they are not there.
    """
    folder = folder_of(model)
    if folder is not None:
        return folder
    wanted = {**parts, "use_safetensors": True, "local_files_only": local_files_only}
    try:
        return Path(kind.download(model, **wanted))
    except OSError as plain:
        if type(plain) is not OSError:  # no network, say: that is not to say that there are none
            raise
        try:
            return Path(kind.download(model, variant="fp16", **wanted))
        except (OSError, ValueError):
            raise plain from None


def variants_in(folder: Path) -> set[str | None]:
    """Of the weights in a network's folder; None is the plain one."""
    return {match["variant"] for file in folder.glob("*.safetensors") if (match := _NAMED.fullmatch(file.name))}


def load_network(
    kind: Any, folder: Path, name: str, dtype: torch.dtype, quantization_config: Any = None
) -> tuple[Any, str | None]:
    """A network of a pipeline, and the variant of its weights: fp16, or another, where there are no plain ones.

    Raises:
        UserError: its file lacks weights, which would be random, or holds some that it has no place for.
        OSError: there is no such file.
    """
    part = folder / name if (folder / name).is_dir() else folder  # where diffusers looks next
    found = variants_in(part)
    pickles = [] if found else sorted(each.name for each in part.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{part} holds its weights as {listed(pickles)}, pickles, which may run code when they are read: convert them "
            "once, if you trust them, by the script in the repository's examples/: python convert_to_safetensors.py "
            f"{pickles[0]} {pickles[0].removeprefix('pytorch_').removesuffix('.bin')}.safetensors"
        )
    variant = None if None in found else min(found, key=lambda each: (each != "fp16", each), default=None)
    settings: dict[str, Any] = {"variant": variant, "use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    if issubclass(kind, PreTrainedModel):
        settings["ignore_mismatched_sizes"] = True  # so that they can be named
    network, info = kind.from_pretrained(str(part), **settings)
    nowhere = [key for key, weight in network.named_parameters() if weight.is_meta]  # though an index of shards names them
    missing = {*info["missing_keys"], *nowhere}
    if missing:
        raise UserError(f"{part} lacks weights, which would be random: {listed(missing)}")
    if info["mismatched_keys"]:
        names = [name for name, *_ in info["mismatched_keys"]]
        raise UserError(f"{part} holds weights of another size than its config.json says: {listed(names)}")
    if info["unexpected_keys"]:
        raise UserError(
            f"{part} holds weights that its config.json has no place for: {listed(info['unexpected_keys'])}. If it is whole "
            "without them, save_pretrained in diffusers writes it without them"
        )
    return network, variant


def listed(names: Collection[str]) -> str:
    """How many there are, and the first."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(sorted(names)[:_SHOWN])}{more})"
