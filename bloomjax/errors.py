"""Errors meant for users: one line that says what was expected, what was found, what to do.

The entries (`bloomjax.cli`) print the line and leave with the error's exit code; anything else is
a defect of ours and leaves with 1.
"""


class UserError(Exception):
    """Base of all errors that a user can mend. `exit_code` is the process's exit status."""

    exit_code = 2


class ConfigError(UserError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class InputError(UserError):
    """A file, a corpus or a checkpoint was refused."""

    exit_code = 3


class DoesNotFitError(UserError):
    """Memory, mesh or disk is too small for what was asked."""

    exit_code = 4


class NonFiniteError(UserError):
    """Training stopped: gradients were not finite several times in a row."""

    exit_code = 5


class PeerLostError(UserError):
    """Another process of this run died or got stuck."""

    exit_code = 6
