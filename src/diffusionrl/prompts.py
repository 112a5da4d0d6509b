"""Prompts: built-in sets, text files and JSONL files. Read and checked before torch is imported."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionrl.emoji.vocabulary import prompt_sets
from diffusionrl.errors import UserError

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
"""Built-in sets beside those of the embedded world, a file each."""
MAX_LENGTH = 10_000  # characters


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever its file says beside it, which is handed to the reward."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: str) -> list[Prompt]:
    """A built-in set by name; a ``.jsonl`` file, one object with "prompt" a line; any other file, one prompt a line.

    Blank lines are skipped.

    Raises:
        UserError: naming file and line.
    """
    built_in = prompt_sets()
    if source in built_in:
        return [Prompt(text) for text in built_in[source]]
    files = {file.stem: file for file in sorted(PROMPT_SETS.glob("*.txt"))}
    path = files.get(source, Path(source))
    if not path.is_file():
        raise UserError(f"prompts {source!r}: no such file, and no built-in set ({', '.join([*built_in, *files])})")
    prompts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from error
        if text:
            prompt = _from_json(text, path, number) if path.suffix == ".jsonl" else Prompt(text)
            _check(prompt.text, path, number)
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one a line")
    return prompts


def _check(text: str, path: Path, number: int) -> None:
    """Raises UserError where a text cannot be meant as a prompt."""
    if len(text) > MAX_LENGTH:
        raise UserError(f"{path}:{number}: {len(text):,} characters in one prompt, at most {MAX_LENGTH:,}: one prompt a line")
    if "\0" in text:
        raise UserError(f"{path}:{number}: a NUL character at column {text.index(chr(0)) + 1}: is this a text file?")


def _from_json(text: str, path: Path, number: int) -> Prompt:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise UserError(f'{path}:{number}: not JSON ({error}); each line is an object like {{"prompt": "a cat"}}') from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        found = f"has the columns {sorted(entry)}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise UserError(f'{path}:{number}: no "prompt" with text in it (the line {found})')
    return Prompt(entry.pop("prompt").strip(), entry)
