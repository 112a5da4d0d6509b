"""Values that a field cannot have, whoever wrote them: the command line, a file, or a line of Python."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from diffusionrl.errors import UserError, one_of, require

LARGEST = 10**9
"""Of counts: more is a slip of the keyboard."""
_MOST_SECONDS = 10**7
_ANY_SIZE = ("seed",)
_MAY_BE_INFINITE = ("max_grad_norm", "target", "advantage_clip", "clip_range", "divergence")  # no bound, then
_SECONDS = ("timeout", "backoff", "wait")


def check_values(settings: Any, prefix: str = "") -> None:
    """Every field of a dataclass of settings, and of those within it.

    Raises:
        UserError: a value is of another type than its field, no choice of it, or no number to reckon with.
    """
    hints = _hints(type(settings))  # type: ignore[arg-type]
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_values(value, f"{name}.")
            continue
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) or not _fits(value, kind):
            choices = [
                choice for each in _kinds(kind) if typing.get_origin(each) is Literal for choice in typing.get_args(each)
            ]
            if isinstance(value, str) and choices:
                raise one_of(name, value, choices)
            raise UserError(f"{name} must be {_said(kind)}, not {value!r}")
        for index, each in enumerate(value if isinstance(value, tuple | list) else (value,)):
            if dataclasses.is_dataclass(each) and not isinstance(each, type):
                check_values(each, f"{name}.{index}.")
            _check_number(each, name, field.name)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_number(value: Any, name: str, last: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int):
        require(
            last in _ANY_SIZE or abs(value) <= LARGEST,
            f"{name} must be at most {LARGEST:,}, not one of {value.bit_length()} bits",
        )
    else:
        require(last in _MAY_BE_INFINITE or math.isfinite(value), f"{name} must be a finite number, not {value}")
    require(last not in _SECONDS or value <= _MOST_SECONDS, f"{name} must be at most {_MOST_SECONDS:,} seconds, not {value}")


def _kinds(kind: Any) -> Iterator[Any]:
    """The members of a union."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        for each in typing.get_args(kind):
            yield from _kinds(each)
    else:
        yield kind


def _fits(value: Any, kind: Any) -> bool:
    return any(_is_a(value, each) for each in _kinds(kind))


def _is_a(value: Any, kind: Any) -> bool:
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fits(value, given[0])
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in given)
    if origin is tuple:
        members = [given[0]] * len(value) if given[-1:] == (...,) and isinstance(value, tuple | list) else given
        return isinstance(value, tuple | list) and len(value) == len(members) and all(map(_fits, value, members))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, Path | str)
    return not isinstance(kind, type) or isinstance(value, kind)


def _said(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}
    said = []
    for each in _kinds(kind):
        if typing.get_origin(each) is tuple:
            said.append(f"a tuple, of {_said(typing.get_args(each)[0])} each")
        elif each is type(None):
            said.append("None")
        else:
            said.append(names.get(each, getattr(each, "__name__", str(each))))
    return " or ".join(said)
