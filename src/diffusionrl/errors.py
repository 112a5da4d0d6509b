"""The one error that a user causes and a user can mend."""


class UserError(ValueError):
    """What was wrong, where, and what to do. The command line prints it without a traceback and exits with code 2."""


class RunStopped(RuntimeError):
    """A run that had to end early, and why. The command line prints it without a traceback and exits with code 1."""
