"""A model in one safetensors file, in the layout of the repository that it came from, as other tools share it.

diffusers converts such a file (``from_single_file``). What a network lacks it leaves without values, and what has no place in
it is dropped. So the conversion is run on the file's header first: on weights without values, which remember the names that
they are made of. What is missing or left over is known before a weight is read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import pipelines
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_utils import (
    SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
    SingleFileComponentError,
    fetch_diffusers_config,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from diffusionrl.errors import UserError
from diffusionrl.policies.files import (
    find_class,
    find_networks,
    folder_of,
    left_out,
    listed,
    load_network,
    read_index,
    variants_in,
)
from diffusionrl.runs.hub import PICKLES, cached_first, is_single_file

_SETTINGS = ["*.json", "*.txt", "*.model"]  # of a repository, all but the weights
_MAIN = {"unet", "transformer"}  # without which a file is no model
_UNUSED = ("logit_scale", *SD_2_TEXT_ENCODER_KEYS_TO_IGNORE)  # of text encoders: what no pipeline asks them for


class _Header(torch.Tensor):
    """A weight of a file without its values; ``made_of`` are the names in the file that it comes from."""

    made_of: frozenset[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to:  # there is nothing to move or to round
            return args[0]
        made = super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        sources = [each.made_of for each in tree_leaves((args, kwargs)) if isinstance(each, cls)]
        for each in tree_leaves(made):
            if isinstance(each, cls):
                each.made_of = frozenset().union(*sources)
        return made


@dataclass(frozen=True)
class SingleFile:
    """What a file holds of a pipeline.

    Attributes:
        config: the folder or the hub id of the pipeline whose settings it has.
        inside: the networks that it holds, with their classes.
        beside: those that it does not, likewise: they are the configuration's.
        absent: parts that the pipeline does without.
        mended: networks that diffusers leaves in training mode, and their tied weights apart.
    """

    path: Path
    config: str
    inside: Mapping[str, Any]
    beside: Mapping[str, Any]
    absent: tuple[str, ...]
    mended: tuple[str, ...]

    @property
    def about(self) -> dict[str, Any]:
        """For env.json: see ``runs.usage``."""
        beside = {name: [part.__module__.partition(".")[0], part.__name__] for name, part in self.beside.items()}
        return {"config": self.config, "beside": beside, "absent": list(self.absent), "mended": list(self.mended)}


def find_file(model: str) -> Path | None:
    """The file that a model's name says; None for a folder or a hub id.

    Raises:
        UserError: it is a pickle, or not there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return None
    if path.suffix in PICKLES:
        raise UserError(
            f"{model} is a pickle, which can run code when it is read: take the .safetensors file of the same model, or "
            "convert it once, if you trust it, by the script in the repository's examples/: python convert_to_safetensors.py "
            f"{model} {path.with_suffix('.safetensors').name}"
        )
    if not is_single_file(model):
        return None
    if not path.is_file():
        raise UserError(f"model {model!r} was not found: there is no such file")
    return path


def look_into(path: Path, config: str | None) -> SingleFile:
    """What a file holds of the pipeline that ``config`` describes; None: that which diffusers takes it for.

    Raises:
        UserError: it is no safetensors file; the configuration is not there, or of another model; or it lacks weights, or
            holds others.
    """
    headers = _read_headers(path)
    known = config or _infer_config(path, headers)
    try:
        return cached_first(_convert, known, path=path, headers=headers)
    except (UserError, OSError) as error:
        said = f"as {known} describes it" if config else f"taken for {known} where no model_config is given"
        raise UserError(f"{path}, {said}: {error}") from error


def _infer_config(path: Path, headers: Mapping[str, _Header]) -> str:
    try:
        return str(fetch_diffusers_config(headers)["pretrained_model_name_or_path"])
    except Exception as error:  # it looks at names and shapes that it expects
        raise UserError(f"diffusers does not know what {path} is of: say it by model_config") from error


def _read_headers(path: Path) -> dict[str, _Header]:
    found = {}
    try:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                found[name] = torch.empty_like(weights.get_tensor(name), device="meta").as_subclass(_Header)
                found[name].made_of = frozenset([name])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    return found


def _convert(
    config: str,
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    path: Path,
    headers: Mapping[str, _Header],
) -> SingleFile:
    """See ``look_into``. Raises OSError where a part of the configuration is not there."""
    kind, index, folder = find_class(config), read_index(config), folder_of(config)
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"diffusers loads a {kind.__name__} from folders alone")
    if folder is None:
        folder = Path(snapshot_download(config, allow_patterns=_SETTINGS, local_files_only=local_files_only))
    absent = left_out(kind, config, index)
    inside, beside, mended = {}, {}, []
    left = dict(headers)  # which diffusers takes apart, network by network in this order
    for name, part in sorted(find_networks(index, absent).items()):
        network = _make(name, part, index[name], left, folder)
        if network is None:
            beside[name] = part
            continue
        inside[name] = part
        if network.training:
            mended.append(name)
            network.tie_weights()
        _check(name, network, headers)
    for name in beside.keys() & _MAIN:
        raise UserError(f"the file holds no {name} of a {kind.__name__}; its weights are {listed(headers)}")
    for name in beside:
        if folder_of(config) and not variants_in(folder / name):
            raise UserError(f"the file holds no {name}, and {folder} has no weights for it: give a folder or hub id that has")
    return SingleFile(path, config, inside, beside, tuple(absent), tuple(mended))


def _make(name: str, part: Any, entry: list[str], headers: dict[str, _Header], folder: Path) -> Any:
    """A network of headers, as diffusers makes it of a file; None where the file has nothing of it."""
    if not issubclass(part, (FromOriginalModelMixin, PreTrainedModel)):
        return None
    own = hasattr(pipelines, entry[0])
    settings = {"local_files_only": True, "device": "meta"}
    try:
        return load_single_file_sub_model(*entry, name, headers, pipelines, own, str(folder), **settings)
    except SingleFileComponentError:
        return None
    except OSError:
        raise
    except Exception as error:  # whatever a conversion comes across in a file of another model
        said = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise UserError(
            f"diffusers makes no {part.__name__} ({name}) of it ({said}): it lacks weights, or is of another family or size"
        ) from error


def _check(name: str, network: Any, headers: Mapping[str, _Header]) -> None:
    """Raises UserError where a network lacks weights, or where its place in the file holds more than it takes."""
    made = network.state_dict()
    missing = [key for key, weight in made.items() if weight.is_meta and not isinstance(weight, _Header)]
    if missing:
        raise UserError(f"the file lacks weights of the {name}, which would be random: {listed(missing)}")
    used = frozenset().union(*(weight.made_of for weight in made.values() if isinstance(weight, _Header)))
    place = os.path.commonpath([key.replace(".", "/") for key in used]).replace("/", ".")
    within = {key for key, weight in headers.items() if key.startswith(place) and weight.is_floating_point()}
    surplus = {key for key in within - used if not key.endswith(_UNUSED)}
    if surplus:
        raise UserError(f"the file holds weights that the {name} has no place for: {listed(surplus)}")


def load_file(
    kind: Any, file: SingleFile, folder: Path, parts: dict[str, Any], dtype: torch.dtype, quantized: Mapping[str, Any]
) -> Any:
    """The pipeline of a file.

    Args:
        folder: of its configuration.
        parts: of the pipeline that are not taken from the file.
        quantized: see ``quantization_settings``.
    """
    settings = {"config": str(folder), "local_files_only": True}
    precisions = dict.fromkeys(quantized, dtype) | {"vae": torch.float32}  # where it stays
    for name in precisions.keys() & file.inside:
        load = file.inside[name].from_single_file
        parts[name] = load(str(file.path), subfolder=name, torch_dtype=precisions[name], **settings)
        if name in quantized:  # not by from_single_file, which takes the weights for quantised ones
            with TemporaryDirectory() as written:
                parts[name].save_pretrained(written)
                parts[name], _ = load_network(file.inside[name], Path(written), name, dtype, quantized[name])
    pipeline = kind.from_single_file(str(file.path), torch_dtype=dtype, **settings, **parts)
    for name in file.mended:
        getattr(pipeline, name).eval().tie_weights()
    return pipeline
