"""Errors that a user can cause or mend. Everything else is a bug of ours and keeps its traceback.

A message names what was wrong, where, and what to do, on one line. The command line prints
it and exits with `exit_code`; the server will map the class to an HTTP status.
"""


class TokenmillError(Exception):
    """An error whose message is meant for the user."""

    exit_code = 1


class UsageError(TokenmillError):
    """A flag, an argument, an environment variable or a request field has a value we refuse."""

    exit_code = 2


class ModelNotFoundError(UsageError):
    """No model goes by that name, or it cannot be fetched from here."""


class ModelFileError(TokenmillError):
    """A model file is truncated, damaged, malicious, or has the wrong checksum."""


class UnsupportedModelError(TokenmillError):
    """The file is sound, but asks for an architecture, tensor type or option we do not have."""


class CapacityError(TokenmillError):
    """Disk, memory or context is too small for what was asked."""


class CollectiveError(TokenmillError):
    """A collective operation failed on this rank: a peer is gone, late, or does something else."""
