"""The shape of the package: imports point one way, files and functions stay short, nothing dangerous is used.

The rules walk the syntax trees of src/tunesmith; every rule is shown to bite on a planted fault.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tunesmith"
LEVELS = [  # a room imports from its own level, without circles, and from the levels after it
    {"__init__", "__main__", "cli", "api", "demo", "plan", "workflow", "prepare", "folders", "scratch", "cells"}
    | {"tournament", "predict", "evaluation", "forgetting", "spectra", "footprint", "calibrate"},
    {"compare", "serve", "export"},
    {"train", "evaluate", "inference"},
    {"data", "adapters", "vision"},
    {"model", "tokenizer"},
    {"quant"},
    {"config", "errors", "files", "hardware", "processes"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
SAYS_NOTHING = {"utils.py", "helpers.py", "misc.py", "common.py"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_FILE, MAX_FUNCTION = 400, 60


def parse(package: Path) -> dict[str, ast.Module]:
    """The syntax tree of each file, by its path below the package."""
    files = sorted(package.rglob("*.py"))
    return {path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def room(name: str) -> str:
    """The room of a file (adapters/lora.py -> adapters)."""
    return name.split("/")[0].removesuffix(".py")


def module(name: str) -> str:
    """The module of a file below the package (adapters/lora.py -> adapters.lora, adapters/__init__.py -> adapters)."""
    dotted = name.removesuffix(".py").replace("/", ".")
    return dotted if dotted == "__init__" else dotted.removesuffix(".__init__")


def eager(tree: ast.Module) -> list[ast.stmt]:
    """The imports that run when the file is imported: outside of functions and of `if TYPE_CHECKING`."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def imports(name: str, nodes, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module below the package) for each import of the package's own modules among `nodes`."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["tunesmith", *name.split("/")[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            below = [f"{base}.{alias.name}" for alias in node.names]
            names = [full if full.removeprefix("tunesmith.") in modules | LEVEL.keys() else base for full in below]
        else:
            continue
        found += [(node.lineno, n.removeprefix("tunesmith.")) for n in names if n.startswith("tunesmith.")]
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Each strongly connected set of more than one name: all that can be reached from it and reach it."""

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in arrows.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    reached = {name: reach(name) for name in arrows}
    found = {frozenset(o for o in reached[n] if n in reached.get(o, ())) for n in reached if n in reached[n]}
    return sorted(sorted(circle) for circle in found)


def check_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports against the direction of the levels, and circles between rooms or between files."""
    modules = {module(name) for name in trees}
    rows, rooms, files = [], {}, {}
    for name, tree in trees.items():
        here = room(name)
        if here not in LEVEL:
            rows.append(f"{name}: the room {here} stands on no level; add it to LEVELS and to the docs")
            continue
        for line, target in imports(name, ast.walk(tree), modules):
            there = target.split(".")[0]
            if there in LEVEL and there != here:
                if LEVEL[there] < LEVEL[here]:
                    rows.append(f"{name}:{line}: {here} imports {there}, which stands above it")
                rooms.setdefault(here, set()).add(there)
        files[module(name)] = {target for _, target in imports(name, eager(tree), modules) if target in modules}
        files[module(name)].discard(module(name))
    rows += [f"circle of rooms: {', '.join(circle)}" for circle in circles(rooms)]
    rows += [f"circle of files: {', '.join(circle)}" for circle in circles(files)]
    return rows


def check_sizes(trees: dict[str, ast.Module], package: Path) -> list[str]:
    """Files over 400 lines, functions over 60, names that say nothing, public definitions without a docstring."""
    rows = []
    for name, tree in trees.items():
        lines = len((package / name).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            rows.append(f"{name}: {lines} lines, more than {MAX_FILE}")
        if Path(name).name in SAYS_NOTHING:
            rows.append(f"{name}: a name that says nothing")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    rows.append(f"{name}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION}")
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                rows.append(f"{name}:{node.lineno}: {node.name} is public and has no docstring")
    return rows


def check_safety(trees: dict[str, ast.Module]) -> list[str]:
    """Bare asserts, pickles in any form, eval and exec."""
    rows = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assert):
                rows.append(f"{where}: a bare assert is no error message")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                base = node.module if isinstance(node, ast.ImportFrom) else ""
                heads = {(base or alias.name).split(".")[0] for alias in node.names}
                rows += [f"{where}: imports {head}" for head in sorted(heads & UNSAFE)]
                if base == "torch" and any(alias.name in ("load", "save") for alias in node.names):
                    rows.append(f"{where}: torch.load or torch.save")
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                rows.append(f"{where}: {ast.unparse(node)}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                rows.append(f"{where}: {node.func.id}()")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                rows.append(f"{where}: allow_pickle")
    return rows


def check(package: Path) -> list[str]:
    """Everything that is against the rules in a package, one line each."""
    trees = parse(package)
    return check_imports(trees) + check_sizes(trees, package) + check_safety(trees)


def test_package_keeps_its_shape():
    assert check(PACKAGE) == []


FAULTS = {
    "upwards": ({"model/a.py": "from tunesmith.train import loop\n"}, "model imports train, which stands above it"),
    "upwards, relative": ({"data/a.py": "from ..cli import main\n"}, "data imports cli, which stands above it"),
    "upwards, in a function": ({"quant/a.py": "def _f():\n    import tunesmith.model\n"}, "quant imports model"),
    "room from the package": ({"errors.py": "from tunesmith import config, data\n"}, "errors imports data"),
    "circle of two rooms": (
        {"train/a.py": "import tunesmith.evaluate\n", "evaluate/a.py": "def _f():\n    import tunesmith.train\n"},
        "circle of rooms: evaluate, train",
    ),
    "circle of three rooms": (
        {
            "train/a.py": "import tunesmith.evaluate\n",
            "evaluate/b.py": "import tunesmith.inference\n",
            "inference/c.py": "import tunesmith.train\n",
        },
        "circle of rooms: evaluate, inference, train",
    ),
    "circle of files": (
        {"data/a.py": "from tunesmith.data import b\n", "data/b.py": "from .a import x\n"},
        "circle of files: data.a, data.b",
    ),
    "unknown room": ({"magic/a.py": ""}, "the room magic stands on no level"),
    "long file": ({"data/a.py": "x = 1\n" * 401}, "401 lines"),
    "long function": ({"data/a.py": "def _f():\n" + "    x = 1\n" * 60}, "_f has 61 lines"),
    "utils": ({"data/utils.py": ""}, "a name that says nothing"),
    "no docstring": ({"data/a.py": "class Public:\n    pass\n"}, "Public is public and has no docstring"),
    "assert": ({"data/a.py": "assert 1\n"}, "a bare assert"),
    "pickle": ({"data/a.py": "import pickle\n"}, "imports pickle"),
    "from pickle": ({"data/a.py": "def _f():\n    from pickle import loads\n"}, "imports pickle"),
    "torch.load": ({"data/a.py": "import torch\nx = torch.load\n"}, "torch.load"),
    "from torch import load": ({"data/a.py": "from torch import load\n"}, "torch.load"),
    "allow_pickle": ({"data/a.py": "import numpy\nnumpy.load('x', allow_pickle=True)\n"}, "allow_pickle"),
    "eval": ({"data/a.py": "eval('1')\n"}, "eval()"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault, tmp_path):
    files, expected = FAULTS[fault]
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "tunesmith" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    rows = check(tmp_path / "tunesmith")
    assert len(rows) == 1, rows
    assert expected in rows[0]


def test_what_is_allowed_is_not_flagged(tmp_path):
    files = {
        "__init__.py": "def __getattr__(name):\n    from tunesmith import api\n    return getattr(api, name)\n",
        "api.py": "import tunesmith.train.loop\nfrom tunesmith import __version__\n",
        "train/loop.py": "from tunesmith.evaluate import run\nfrom tunesmith.errors import DataError\n",
        "evaluate/run.py": "from __future__ import annotations\nfrom .metric import f1\nmodel.eval()\n",
        "evaluate/metric.py": "if TYPE_CHECKING:\n    from tunesmith.evaluate.run import Result\n",
        "errors.py": "import torch\n",
    }
    for name, text in files.items():
        path = tmp_path / "tunesmith" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert check(tmp_path / "tunesmith") == []
