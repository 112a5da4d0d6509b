"""Where weights come from: a folder, or the hub at one commit, and from the hub only what is not in its cache yet; and how an
export goes to the hub."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusionrl.errors import UserError
from diffusionrl.paths import describe, expand, is_there

PINNED = {
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}


PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def is_single_file(model: str) -> bool:
    """Whether a model's name says one file of weights."""
    return model.endswith(".safetensors")


def local_folder(model: str) -> Path | None:
    """The folder that a model's name says, or None where it reads as a hub id.

    Raises:
        UserError: it reads as a folder, and there is none.
    """
    path = expand(model)
    if path.is_dir():
        return path
    if is_there(path):
        raise UserError(
            f"model {model!r} is {describe(path)}, and no .safetensors file: give one, or a folder in diffusers' format"
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"model {model!r} was not found: give 'emoji', a folder, a hub id owner/name, or a .safetensors file")
    if path.parent.is_dir() and not _is_cached(model):
        near = get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
        meant = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(
            f"model {model!r} was not found: {path.parent} is a folder here, and there is no {path.name} in it{meant} (a hub "
            "id of that owner is asked for from another working directory)"
        )
    return None


def _is_cached(model: str) -> bool:
    """The hub's cache has something of this model."""
    cache = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    return expand(Path(cache) / f"models--{model.replace('/', '--')}").is_dir()


def locate(model: str, revision: str | None) -> tuple[str, str | None]:
    """A folder, or a hub id with the commit it is pinned to.

    Raises:
        UserError: no such folder, or a hub id without a commit.
    """
    folder = local_folder(model)
    if folder is not None:
        return str(folder), None
    pinned = revision or PINNED.get(model)
    if pinned is None:
        raise UserError(f"give the revision of {model!r}, a commit of the hub: a reward that changes overnight is no measure")
    return model, pinned


def cached_first(load: Callable[..., Any], source: str, revision: str | None = None, **settings: Any) -> Any:
    """``load(source, revision=..., ...)`` from the folder or the cache; the network is asked only for what is not there."""
    try:
        return load(source, revision=revision, local_files_only=True, **settings)
    except OSError:
        if Path(source).is_dir():
            raise
        _reach_hub()
        return load(source, revision=revision, **settings)


def _reach_hub() -> None:
    """Raises OSError at once where nothing answers: the client alone tries again and again, for some 24 seconds."""
    from huggingface_hub import constants, get_session, is_offline_mode  # here: ``serve-reward`` runs without it

    if is_offline_mode():
        return  # the client says it itself
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # its HTTP library's own
        raise OSError(f"{constants.ENDPOINT} cannot be reached ({error}): look at the network, or give a folder") from error


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder to a model repository, which is made if it is not there. Returns its address.

    Raises:
        UserError: no token, no network, or the hub refused.
    """
    from huggingface_hub import HfApi  # here: ``serve-reward`` runs without it

    hub = HfApi()
    try:
        address = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload from diffusionrl")
    except Exception as error:  # the client's own, its HTTP library's and the operating system's
        said = " ".join(str(error).split())
        raise UserError(
            f"the hub did not take {repo_id}: {type(error).__name__}: {said}. Everything is still in {folder}. Log in with "
            "'hf auth login' or set HF_TOKEN (a token that may write), look at the network, and give the same command again"
        ) from error
    return str(address)
