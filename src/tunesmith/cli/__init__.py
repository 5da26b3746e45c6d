"""The command line: `tunesmith COMMAND`. Each command parses, calls one function of a room below, and shows the result.

No module of this package imports torch, transformers or pydantic at the top: `--help` has to answer at once.
"""

from tunesmith.cli import (
    combine,
    compare,
    data,
    evaluate,
    export,
    forgetting,
    merge,
    predict,
    quantize,
    serve,
    show,
    spectrum,
    tournament,
    train,
    ui,
    use,
    verify,
)
from tunesmith.cli.shell import app, main

__all__ = [
    "app",
    "combine",
    "compare",
    "data",
    "evaluate",
    "export",
    "forgetting",
    "main",
    "merge",
    "predict",
    "quantize",
    "serve",
    "show",
    "spectrum",
    "tournament",
    "train",
    "ui",
    "use",
    "verify",
]
