"""Tunesmith: parameter-efficient fine-tuning of LLaMA models, with proof that what was saved works.

The public face is five functions, each imported when it is first used, so that `import tunesmith` loads no torch:

    load      a model and its tokenizer, by name or path        attach    an adapter to a model
    train     a configuration, to a run folder                  verify    an adapter folder, against its base
    generate  text, with the base or an adapter
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import attach, generate, load, verify

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "generate", "load", "train", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tunesmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}; the public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(ModuleType):
    """`train` is a public function and also a room (the sub-package tunesmith.train).

    The import system binds a sub-package as an attribute of its parent, and would hide the function from then on.
    """

    @property
    def train(self) -> Any:
        from tunesmith import api

        return api.train

    @train.setter
    def train(self, room: ModuleType) -> None:
        """Leave the attribute alone: `from tunesmith.train import ...` finds the room in sys.modules."""


sys.modules[__name__].__class__ = _Face
