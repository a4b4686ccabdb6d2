"""Every error that this library raises on purpose.

    DeblurError
    |-- InputError        (ValueError)         an argument, a configuration value or an image is not acceptable
    |-- ModelError        (ValueError)         a file is not a model, checkpoint or bundle of ours, or is damaged
    |-- MissingFileError  (FileNotFoundError)  a path that must exist does not, or is of the wrong kind
    |-- OutputError       (OSError)            a result cannot be written where it was asked for
    |-- MemoryLimitError  (MemoryError)        not even a small tile of the image fits into memory
    |-- ProviderError     (RuntimeError)       an execution provider is unknown, absent, or did not run the model
    |-- VerificationError (RuntimeError)       a model failed the proof that it equals its reference
    |-- TrainingError     (RuntimeError)       training cannot go on
    `-- MissingExtraError (ImportError)        an optional dependency is not installed, or too old

Each leaf is also the builtin that it stands for, so callers may catch either.  A message is one line that says
what was wrong, where, and what to do about it: the command line prints it as it is and exits with status 2.
"""

from math import inf
from textwrap import shorten


class DeblurError(Exception):
    """Base of every error below."""


class InputError(DeblurError, ValueError):
    """An argument, a configuration value or an image is not acceptable."""


class ModelError(DeblurError, ValueError):
    """A file is not a model, checkpoint or bundle of ours, or it is damaged."""


class MissingFileError(DeblurError, FileNotFoundError):
    """A path that must exist does not, is of the wrong kind, or may not be read."""


class OutputError(DeblurError, OSError):
    """A result cannot be written where it was asked for."""


class MemoryLimitError(DeblurError, MemoryError):
    """Not even a small tile of the image fits into memory."""


class ProviderError(DeblurError, RuntimeError):
    """An execution provider is unknown, absent, or did not run the model."""


class VerificationError(DeblurError, RuntimeError):
    """A model failed the proof that it equals its reference."""


class TrainingError(DeblurError, RuntimeError):
    """Training cannot go on."""


class MissingExtraError(DeblurError, ImportError):
    """An optional dependency is not installed, or is too old."""


def one_line(error: BaseException, most: int = 400) -> str:
    """Somebody else's message on one line; what is longer than ``most`` ends after a whole word, and shows it."""
    return shorten(str(error), most, placeholder=" ...") or type(error).__name__


def about(source: object, error: BaseException) -> str:
    """One line on why the file ``source`` was not restored, which names it once."""
    text = str(error) if isinstance(error, DeblurError) else f"it cannot be restored: {error or type(error).__name__}"
    return text if str(source) in text else f"{source}: {text}"


def check_bounds(config: object, **bounds: tuple[float, float | None]) -> None:
    """Raises ValueError for the first of these attributes that is not a number from the least to the most allowed one.

    Without a most, any finite one that is no less is allowed.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if not (least <= value < inf if most is None else least <= value <= most):
            raise ValueError(f"{name} is {value}; allowed: {least} {'or more' if most is None else f'to {most}'}")
