"""Write the list of methods from the methods themselves: `python -m tunesmith.adapters.reference > docs/methods.md`.

Formula and source are the docstring of a method's file, the settings its dataclass, the rest what it says of itself.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from tunesmith.adapters import find_method, kinds
from tunesmith.adapters.base import Exchangeable, Method
from tunesmith.config import validate_section
from tunesmith.config.reference import settings_table

HEAD = """# Methods

<!-- Generated from the methods: python -m tunesmith.adapters.reference > docs/methods.md -->

`adapter.kind` names one of these; the other keys under `adapter:` are its settings, and an unknown one is refused.
[Adding a method](adding-a-method.md) takes one file. [Counts](counts.md) has the sizes of these on known models,
[movie reviews](results/methods.md) what each of them reached on one task, [rates](results/rates.md) how the default
learning rates were found.

*Identity*: attached, before training, no logit has changed by a bit. *Folds*: a merge makes it part of the weights.
*PEFT*: the type under which Hugging Face PEFT reads and writes the same file, where its format can say it exactly (a
LLaMA-Adapter with one gate a layer, a prompt without infix tokens); elsewhere the file is our own. Identity and folding
are those of the default settings.

"""


def reference() -> str:
    """Return the whole of docs/methods.md."""
    methods = [find_method(kind) for kind in kinds()]
    rows = ["| kind | learning rate | identity | folds | PEFT |", "|---|---|---|---|---|"]
    rows += [_row(method) for method in methods]
    return "\n".join([HEAD + "\n".join(rows) + "\n", *(_section(method) for method in methods)])


def _row(method: Method) -> str:
    settings: Any = validate_section(method.settings, {}, "adapter")
    peft = method.peft_type if isinstance(method, Exchangeable) else "none"
    said = ["yes" if answer(settings) else "no" for answer in (method.identity_at_init, method.mergeable)]
    return f"| [`{method.kind}`](#{method.kind}) | {method.learning_rate:g} | {' | '.join(said)} | {peft} |"


def _section(method: Method) -> str:
    module = inspect.getmodule(type(method))
    text = inspect.cleandoc((module and module.__doc__) or "")
    head, _, rest = text.partition("\n\n")
    parts = [f"## {method.kind}\n", f"{' '.join(head.split())}\n"]
    if rest.strip():
        parts.append(f"```text\n{rest.rstrip()}\n```\n")
    if method.settings.__dataclass_fields__:  # type: ignore[attr-defined]
        parts.append(settings_table(method.settings, "adapter."))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
