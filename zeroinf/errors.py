"""Every error zeroinf raises on purpose, with the exit code of the process that ends with it.

    ZeroinfError                  1  something failed; the message says what
    ├── UsageError                2  a flag, a value or an input the user can correct
    │   ├── ModelError            2  no such model, no weights in it, no tokenizer, none that generates text
    │   ├── InputError            2  requests that cannot be read, or none at all
    │   └── OutputError           2  the output exists already or cannot be written
    ├── DoesNotFitError           3  memory or disk is too small for what was asked
    ├── EnvironmentProblem        4  this machine lacks something: a GPU, a compiler, a right
    ├── RequestsFailedError       5  the job finished, but some requests were refused or came to nothing
    ├── StoreError                1  a store of weights is damaged, in use, or cannot be read or written
    ├── RankError                 1  another rank died, or the ranks cannot reach each other
    ├── ClusterError              1  no node of a cluster can go on; their own code where all failed alike
    └── InterruptedRunError     130  Ctrl-C; 143 after SIGTERM, 129 SIGHUP, 138 SIGUSR1

A message says what happened and with which value; the hint says what to do about it. Nothing below `zeroinf.cli`
prints an error or ends the process: it raises one of these, and the command line turns it into two lines and a code.
"""

from __future__ import annotations


class ZeroinfError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ZeroinfError):
    """A flag, a value or an input that the user can correct."""

    exit_code = 2


class ModelError(UsageError):
    """The model does not exist, is not complete, or does not generate text."""


class InputError(UsageError):
    """Requests that cannot be read, or none at all."""


class OutputError(UsageError):
    """The output exists already or cannot be written."""


class DoesNotFitError(ZeroinfError):
    """Memory or disk is too small for what was asked."""

    exit_code = 3


class EnvironmentProblem(ZeroinfError):  # noqa: N818 - "EnvironmentError" is a builtin alias of OSError
    """The machine lacks something that was asked for."""

    exit_code = 4


class RequestsFailedError(ZeroinfError):
    """The job finished, but some requests were refused or came to nothing."""

    exit_code = 5


class StoreError(ZeroinfError):
    """A store of weights on disk is damaged, in use, or cannot be read or written."""


class RankError(ZeroinfError):
    """Another rank died, or the ranks cannot reach each other."""


class ClusterError(ZeroinfError):
    """No node of a cluster can go on with the job."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class InterruptedRunError(ZeroinfError):
    """The user or the system asked the run to stop."""

    exit_code = 130

    def __init__(self, message: str, *, hint: str | None = None, signal_number: int = 2) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number
