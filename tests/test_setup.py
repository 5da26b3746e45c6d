"""The set-up: what the package declares, pins and promises about imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "peft", "pydantic", "numpy", "huggingface_hub", "tokenizers", "safetensors", "gguf"}


def python(code: str, **settings: str) -> str:
    """Run `code` in a new interpreter with this checkout on its path; give what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", name)[0]).lower()


def pins() -> dict[str, str]:
    """The exact version of each project in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def test_every_dependency_is_pinned_exactly():
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    wanted = {normal(name) for name in [*PROJECT["dependencies"], *extras]} - {"tunesmith"}
    assert wanted <= pins().keys()
    assert pins()["torch"] == "2.13.0"


def test_what_is_installed_is_what_is_pinned():
    """In the environment of `make test`; elsewhere the versions may differ, and then this says so."""
    from importlib.metadata import distributions

    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]  # not what setuptools carries inside
    found = {normal(d.metadata["Name"]): d.version.split("+")[0] for d in distributions(path=places)}
    differing = {name: (found[name], pin) for name, pin in pins().items() if found.get(name, pin) != pin}
    if differing and Path(sys.prefix) != ROOT / ".venv":
        pytest.skip(f"not the environment of make test: {differing}")
    assert differing == {}


def test_core_is_few_and_references_are_for_tests_only():
    core = {normal(name) for name in PROJECT["dependencies"]}
    assert len(core) <= 14
    assert not core & {"transformers", "peft", "accelerate", "datasets", "pandas", "scipy", "bitsandbytes"}


def test_version_is_one():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tunesmith.__version__)


def test_import_is_light():
    code = f"import sys, tunesmith; dir(tunesmith); print(*sorted({HEAVY!r} & sys.modules.keys()))"
    assert python(code) == ""


def test_face_names_what_it_has():
    assert set(tunesmith.__all__) == {"__version__", "attach", "generate", "load", "train", "verify"}
    assert set(tunesmith.__all__) <= set(dir(tunesmith))
    with pytest.raises(AttributeError, match="no attribute 'trian'; the public names are .*attach"):
        tunesmith.trian  # noqa: B018


def test_face_gives_the_functions_before_and_after_the_rooms_are_imported(tmp_path):
    """`train` is a function of the face and a sub-package too; the function must not be hidden by it."""
    package = tmp_path / "tunesmith"
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").write_text((ROOT / "src/tunesmith/__init__.py").read_text(encoding="utf-8"))
    names = ["attach", "generate", "load", "train", "verify"]
    api = "from tunesmith.train import loop\n" + "".join(f"def {name}(): return '{name}'\n" for name in names)
    (package / "api.py").write_text(api)
    (package / "train" / "__init__.py").write_text("")
    (package / "train" / "loop.py").write_text("x = 1\n")
    call = f"print(*[getattr(tunesmith, name)() for name in {names!r}])"
    for first in ("import tunesmith", "import tunesmith, tunesmith.train.loop", "from tunesmith.train import loop"):
        code = f"{first}\nimport tunesmith\n{call}\nfrom tunesmith.train.loop import x\n{call}"
        printed = python(code, PYTHONPATH=str(tmp_path)).splitlines()
        assert printed == [" ".join(names)] * 2
    code = "from tunesmith import train; print(train(), __import__('sys').modules['tunesmith.train'].__name__)"
    assert python(code, PYTHONPATH=str(tmp_path)) == "train tunesmith.train"


def test_scripts_are_sound():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make test") < text.index("make demo DEMO_ARGS=--quick")


def test_make_prints_its_plan_without_an_environment(tmp_path):
    """What make would run in a fresh clone: torch by its pin first, then the package; the demo without test tools."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    environment = {"PATH": os.environ["PATH"]}

    def plan(*arguments: str) -> str:
        command = ["make", "-n", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    demo = plan("demo", "DEMO_ARGS=--quick")
    assert demo.index("-m venv .venv") < demo.index("'torch==2.13.0'") < demo.index("-e .")
    assert demo.rstrip().endswith("-m tunesmith demo --quick")
    assert "[test]" not in demo
    test = plan("test")
    steps = ["-e '.[test]'", "ruff check", "ruff format --check", "mypy", "pytest"]
    assert [test.index(step) for step in steps] == sorted(test.index(step) for step in steps)
    assert "-m venv" in plan("demo", "PYTHON=python3.12").splitlines()[1]


def test_make_refuses_an_old_python(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "constraints.txt").write_text("")
    old = tmp_path / "python3.10"
    old.write_text(
        f"#!/bin/sh\n{sys.executable} -c \"import sys; sys.version_info = (3, 10); sys.version = '3.10.1 x'\n$2\"\n"
    )
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Tunesmith needs Python 3.11 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_address_of_a_package_index_is_named():
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links|/opt/|/root/|/work/", text), name


def test_license_is_apache():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
