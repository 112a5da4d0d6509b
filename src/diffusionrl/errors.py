"""The one error that a user causes and a user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


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
