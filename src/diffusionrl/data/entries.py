"""One prompt: what a line, a row or an entry of a file says, and whether it can be meant."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffusionrl.errors import UserError
from diffusionrl.paths import is_there

MAX_LENGTH = 10_000  # characters
_MEDIA = ("image", "mask_image", "control_image")
"""Keys of an entry that name an image for the pipeline, under the names of its arguments."""
_TARGET = "target"
"""Key of an entry that may name an image for rewards."""
_FLAG = re.compile(r"(?:^|\s)(--[A-Za-z][\w-]*(?=[\s=]|$)|-[A-Za-z](?=\s+[\d.]))")
"""As prompts of other tools end: "a castle --n trees --w 512", "a castle -W 512"."""
_EXAMPLE = '{"prompt": "a cat"}'


@dataclass(frozen=True)
class Prompt:
    """What a sample is made from.

    Attributes:
        metadata: whatever its file says beside it, which is handed to the reward, and to a model of one's own. From Python it
            may hold arrays and tensors, which are part of what the model is asked.
        media: images that the pipeline takes beside the text, by the name of its argument: paths, or PIL images.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Of what a model makes of it: prompts of one key are alike to it."""
        arrays = {name: each for name, each in self.metadata.items() if is_array(each)}
        if not (self.media or arrays):
            return self.text
        seen = self.media | arrays
        named = [(name, str(each) if isinstance(each, Path) else content_of(each)) for name, each in seen.items()]
        return f"{self.text}\0{named}"


def is_array(value: Any) -> bool:
    """NumPy's, or a tensor; no image of PIL's."""
    return hasattr(value, "__array__") and hasattr(value, "dtype")


def content_of(medium: Any) -> str:
    """A hash of an image (a file or PIL's) or of an array. Raises UserError where it cannot be read."""
    if is_array(medium):
        values = np.ascontiguousarray(medium)
        return hashlib.blake2b(f"{values.dtype}{values.shape}".encode() + values.tobytes(), digest_size=32).hexdigest()
    if not isinstance(medium, Path):
        return hashlib.blake2b(f"{medium.mode}{medium.size}".encode() + medium.tobytes(), digest_size=32).hexdigest()
    try:
        with medium.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise UserError(f"image {medium} of a prompt cannot be read: {error}") from error


def in_json(value: Any) -> str:
    """For ``json.dumps`` where it knows no better: an array or image by its content, anything else as it is written."""
    return content_of(value) if is_array(value) or hasattr(value, "tobytes") else str(value)


def from_text(text: str, where: str) -> Prompt:
    """A line of a text file. Raises UserError for JSON among text, and for options of another tool."""
    if text[0] in "[{" and isinstance(_json_or_none(text), dict | list):
        raise UserError(f"{where}: a line of JSON in a text file: write all lines as JSON, like {_EXAMPLE}, or none")
    flag = _FLAG.search(text)
    if flag:
        raise UserError(
            f"{where}: {flag[1]} reads as an option of another tool, and would be part of the prompt: take it out (settings of "
            f"all prompts are --sampling.negative-prompt, --sampling.num-steps, --seed ...). A text that is meant so is "
            f"written as JSON, a line {_EXAMPLE}"
        )
    return checked(Prompt(text), where)


def from_json(text: str, folder: Path, where: str) -> Prompt:
    """A line of JSON. Raises UserError."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line is an object like {_EXAMPLE}") from error
    return from_entry(entry, folder, where)


def from_entry(entry: Any, folder: Path, where: str) -> Prompt:
    """A text, or an object with "prompt", which may name images relative to ``folder``. Raises UserError for anything else."""
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        found = f"has the columns {sorted(map(str, entry))}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise UserError(f'{where}: no "prompt" with text in it (the line {found}); it is like {_EXAMPLE}')
    if str(entry.get("negative_prompt") or "").strip():
        raise UserError(
            f"{where}: a prompt has no negative_prompt of its own, so this one would do nothing: --sampling.negative-prompt is "
            "one for all. Take it out, or give it another name, and rewards get it"
        )
    media = _media(entry, folder, where)
    rest = {key: value for key, value in entry.items() if key != "prompt"}
    target = folder / str(rest.get(_TARGET, ""))
    if _TARGET in rest and is_there(target) and target.is_file():
        rest[_TARGET] = str(target)
    return checked(Prompt(entry["prompt"].strip(), rest | {name: str(file) for name, file in media.items()}, media), where)


def checked(prompt: Prompt, where: str) -> Prompt:
    """Raises UserError where a text cannot be meant as a prompt."""
    text = prompt.text
    if len(text) > MAX_LENGTH:
        raise UserError(f"{where}: {len(text):,} characters in one prompt, at most {MAX_LENGTH:,}: one prompt a line")
    if "\0" in text:
        raise UserError(f"{where}: a NUL character at column {text.index(chr(0)) + 1}: is this a text file?")
    check_encodes(text, where)
    return prompt


def check_encodes(text: str, where: str) -> None:
    """Raises UserError for half a character, such as the first part of an emoji: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a character at column {error.start + 1} (a lone {text[error.start]!a}): mend or remove it"
        ) from error


def _media(entry: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The images that an entry names. Raises UserError for one that is not there."""
    media = {}
    for name in _MEDIA:
        if not is_array(entry.get(name)) and entry.get(name) not in (None, ""):
            file = folder / str(entry[name])
            try:
                found = file.is_file()
            except (OSError, ValueError):  # no name for a file
                found = False
            if not found:
                raise UserError(f"{where}: {name} {entry[name]!r} is no file beside it ({file})")
            media[name] = file
    return media


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
