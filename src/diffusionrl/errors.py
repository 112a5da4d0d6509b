"""The one error that a user causes and a user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 1000  # characters of a message that comes from elsewhere


class UserError(ValueError):
    """What was wrong, where, and what to do. The command line prints it without a traceback and exits with code 2."""


def one_of(kind: str, name: str, known: Iterable[str], more: str = "") -> UserError:
    """The error for a name that is not known, with the nearest one that is."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{meant} There are {', '.join(known)}{more}")


def require(condition: bool, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


class RunStopped(RuntimeError):
    """A run that had to end early, and why. The command line prints it without a traceback and exits with code 1."""


def clean(said: object) -> str:
    """A message from elsewhere, for terminals, files and pages: one line, without control sequences, of bounded length."""
    try:
        text = str(said)[: 2 * _LONGEST]
    except Exception as error:  # an exception may not even be able to say what it is
        text = f"{type(said).__name__}, which raises {type(error).__name__} when it is asked for its message"
    text = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def describe(error: BaseException) -> str:
    """What foreign code raised, in a line. Whatever a ``UserError`` says stands for itself."""
    if isinstance(error, UserError):
        return clean(error)
    return clean(f"{type(error).__name__}: {clean(error)}")
