"""Every error that Tunesmith raises on purpose: one line that says what is wrong, where, and what to do.

TunesmithError                exit code 2: bad input or configuration
|-- ConfigError               a key, a value or a combination of settings
|-- DataError                 a data file, or a row of it
|-- TemplateError             a prompt template
|-- TokenizerError            tokenizer files, or a tokenizer that does not fit the model
|-- ModelError                model files: names, shapes, missing weights, unknown architecture
|-- AdapterError              adapter files, or a method that cannot be attached
|   |-- CannotMerge           a method that cannot be folded into the base weights, with the reason
|   `-- CannotExchange        an adapter that PEFT's format cannot say exactly, with the reason
|-- CatalogError              a name that cannot be resolved or downloaded
|-- CheckpointError           a checkpoint that is incomplete or belongs to another run
|-- DamagedRun                a run folder that is not what was written
|-- GenerationError           inconsistent generation settings
|-- RequestError              a request that a server does not answer; `status` is its HTTP status
|-- JudgeError                a judge that cannot be reached, or refuses
|-- ResourceError             exit code 3
|   |-- OutOfMemory
|   `-- DiskError
|-- Interrupted               exit code 130: stopped by the user, with a checkpoint
`-- CheckFailed               exit code 4
    |-- VerificationError     what was saved is not what was trained
    `-- NumericalError        a value that is not finite, or a training signal that is dead
"""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable

_SHORT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class TunesmithError(Exception):
    """Base of all of Tunesmith's errors; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(TunesmithError):
    """A configuration key, value or combination is wrong."""


class DataError(TunesmithError):
    """A data file or one of its rows is wrong; the message names file and line."""


class TemplateError(TunesmithError):
    """A prompt template is unknown, malformed or unsafe."""


class TokenizerError(TunesmithError):
    """Tokenizer files are wrong, or do not fit the model."""


class ModelError(TunesmithError):
    """Model files are wrong, incomplete or of an unknown architecture."""


class AdapterError(TunesmithError):
    """Adapter files are wrong, or a method cannot be attached to this model."""


class CannotMerge(AdapterError):
    """This method cannot be folded into the base weights; the message says why."""


class CannotExchange(AdapterError):
    """PEFT would compute something else with this adapter; the message says why. It is saved in our own format."""


class CatalogError(TunesmithError):
    """A model or data name cannot be resolved or fetched."""


class CheckpointError(TunesmithError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class DamagedRun(TunesmithError):
    """A finished run's folder is not what was written; the message says which file. It is named and left out."""


class GenerationError(TunesmithError):
    """Generation settings contradict each other or are out of range."""


class RequestError(TunesmithError):
    """A request to a server is refused, or cannot be answered now; `status` is what HTTP calls it, `code` its name."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class JudgeError(TunesmithError):
    """A judge of a tournament cannot be reached or refuses; what it said before is kept."""


class ResourceError(TunesmithError):
    """The machine ran out of something."""

    exit_code = 3


class OutOfMemory(ResourceError):
    """Memory ran out; the message says what needed how much."""


class DiskError(ResourceError):
    """A write failed; the message gives the path and the bytes needed."""


class Interrupted(TunesmithError):
    """The user stopped a run; the message says how to go on."""

    exit_code = 130


class CheckFailed(TunesmithError):
    """A check that Tunesmith makes by default failed."""

    exit_code = 4


class VerificationError(CheckFailed):
    """What was saved does not do what was trained."""


class NumericalError(CheckFailed):
    """A loss, gradient or activation is not finite, or training cannot move."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error of whatever library means that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")  # an error of torch's can only be raised when torch is there
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT_OF_MEMORY)
