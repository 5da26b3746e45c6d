"""What the README, docs/ and examples/ say is so: links, commands, flags, settings, functions, and code that runs."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from tests.tiny import words

import tunesmith
from tunesmith import adapters
from tunesmith.cli import app
from tunesmith.config import SECTIONS, load_run, validate_section

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tunesmith"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^\s*(?:[$#]\s+)?tunesmith\s+(.*)$")
SETTING = re.compile(r"(?<![\w./-])(model|data|train|evaluate|log|adapter)\.(\w+)=")
WRONG = ["chatt runs/A", "chat runs/A --colour", "data show x", "train train.epoch=3", "merge -q"]
MODULES = {"model.norm", "model.embed"}  # parts of the model, not settings
pytestmark = pytest.mark.usefixtures("single_thread")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str = "python") -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, and what stands between back ticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        yield from block.splitlines()
    rest = prose(text)
    yield from (line for line in rest.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", rest)


def anchors(text: str) -> set[str]:
    """The anchors that headings of a page get."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}


def commands() -> list[tuple[str, str]]:
    """(page or example, words after `tunesmith`) of every command line that is shown."""
    found = [(path.name, line) for path in PAGES for line in code_lines(path.read_text(encoding="utf-8"))]
    found += [(path.name, line) for path in EXAMPLES for line in path.read_text(encoding="utf-8").splitlines()]
    return [(name, match[1]) for name, line in found for part in line.split(" | ") if (match := COMMAND.match(part))]


def leaf(line: str) -> tuple[click.Command | None, str]:
    """The command that a line calls (None: there is none of that name), and the rest of the line."""
    group: click.Command = typer.main.get_command(app)
    rest = re.sub(r"\s#\s.*$", "", line).split()
    while rest and isinstance(children := getattr(group, "commands", None), dict):
        if rest[0] not in children:
            return None, line
        group, rest = children[rest[0]], rest[1:]
    return group, " ".join(rest)


def flags(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}


def faults(line: str) -> list[str]:
    """What is wrong with the words of a command."""
    if line.startswith(("COMMAND", "-")):
        return []
    command, rest = leaf(line)
    if command is None:
        return [f"no command in {line!r}"]
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", rest)
    known = flags(command) | {"--help"}
    wrong = [
        f"{command.name} has no {flag}" for flag in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", bare) if flag not in known
    ]
    return wrong + [f"no setting {section}.{key}" for section, key in SETTING.findall(rest) if not is_key(section, key)]


def is_key(section: str, key: str) -> bool:
    methods = [adapters.find_method(kind).settings for kind in adapters.kinds()]
    known = methods if section == "adapter" else [SECTIONS[section]]
    return any(key in one.__dataclass_fields__ for one in known) or (section, key) == ("adapter", "kind")


def run_code(code: str, folder: Path, given: dict[str, object] | None = None) -> dict[str, object]:
    """Run a block of a page as a file of its own; returns what it defined."""
    file = folder / "block.py"
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file), given or {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    links = [link for link in LINK.findall(prose(path.read_text(encoding="utf-8"))) if "://" not in link]
    for link in links:
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), (
            f"{path.name}: {link}: no such heading"
        )


def test_every_page_and_example_is_in_the_index() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(page("README.md"))}
    missing = {path.name for path in [*PAGES[1:], *EXAMPLES] if path.resolve() not in linked}
    assert not missing, f"README.md does not link {sorted(missing)}"


def test_commands_that_are_shown_exist_with_their_flags() -> None:
    found = commands()
    assert len(found) > 40 and {name for name, _ in found} >= {"README.md", "getting-started.md", "full.yaml"}
    wrong = [f"{name}: {fault}" for name, line in found for fault in faults(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_would_be_seen(line: str) -> None:
    assert faults(line)


def test_every_command_is_in_the_readme() -> None:
    table = page("README.md").split("## Commands")[1].split("\n## ")[0]
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert re.search(rf"`(tunesmith )?{name}[` ]", table), f"README.md: the table of commands has no {name}"


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^(\w+):", page("Makefile"), re.M))
    lines = [line for path in PAGES for line in code_lines(path.read_text(encoding="utf-8"))]
    shown = {match[1] for line in lines if (match := re.match(r"\s*make (?:\w+=\S+ )*([a-z]+)\b", line))}
    assert {"demo", "test", "venv"} <= shown <= targets


def test_settings_and_variables_in_the_text_exist() -> None:
    for path in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(path.read_text(encoding="utf-8"))):
            match = re.fullmatch(r"(model|data|train|evaluate|log)\.(\w+)(=.*)?", code)
            assert not match or code in MODULES or is_key(match[1], match[2]), (
                f"{path.name}: there is no setting {code}"
            )
    files = [*SOURCE.rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in {name for path in PAGES for name in re.findall(r"TUNESMITH_\w+", path.read_text(encoding="utf-8"))}:
        assert f'"{name}"' in source, f"nothing reads {name}"


def test_functions_of_the_walk_exist() -> None:
    named = re.findall(r"([\w/]+\.py):([A-Za-z_][\w.]*\w)", page("docs/walk.md"))
    assert len(named) > 40
    for file, function in named:
        assert (SOURCE / file).is_file(), f"there is no {file}"
        names: list[ast.stmt] = ast.parse((SOURCE / file).read_text(encoding="utf-8")).body
        for part in function.split("."):
            found = [node for node in names if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            assert found, f"{file} has no {function}"
            names = getattr(found[0], "body", [])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    from tunesmith.data.catalog import CATALOG
    from tunesmith.evaluate.run import find_metric
    from tunesmith.model.shapes import shapes

    run, notes = load_run(path)
    assert notes == [] and run.name == path.stem
    validate_section(adapters.find_method(run.adapter["kind"]).settings, run.adapter, "adapter")
    for metric in (*run.evaluate.metrics, run.evaluate.best):
        find_metric(metric)
    for name in (run.model.path, run.data.train):
        assert name in CATALOG or name in shapes() or (ROOT / name).is_file(), f"{path.name}: {name} is nowhere"


def test_an_example_trains(command, in_process, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    example = ROOT / "examples" / "instructions.yaml"
    code, out, err = command("train", example, "--model", tiny_base, "--output-dir", tmp_path, "--epochs", 1)
    assert code == 0, err
    assert Path(out.strip()) == tmp_path / "instructions" and (tmp_path / "instructions" / "report.html").is_file()


def test_the_python_page_runs(in_process, tiny_base, tiny_reviews, tmp_path, monkeypatch, capsys) -> None:
    first, _, model = fenced(page("docs/python-api.md"))
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    given = {"smollm2-135m-instruct": str(tiny_base), "movie-reviews": str(tiny_reviews)}
    for name, path in given.items():
        assert f'"{name}"' in first
        first = first.replace(f'"{name}"', repr(path))
    monkeypatch.chdir(tmp_path)
    space = run_code(first, tmp_path)
    assert re.match(r"[\d.]+ [\d.]+ True\n", capsys.readouterr().out)
    run_code(model, tmp_path, space)


def test_the_python_page_names_what_there_is(in_process, tiny_base, tmp_path, monkeypatch, capsys) -> None:
    from tunesmith import api

    text = page("docs/python-api.md")
    table = re.findall(r"^\| `(\w+)\((.*?)\)` \|", text, re.M)
    assert {name for name, _ in table} == set(tunesmith.__all__) - {"__version__"}
    for name, signature in table:
        known = getattr(api, name).__code__.co_varnames
        assert all(word in known for word in re.findall(r"(\w+)=", signature)), f"{name}({signature})"
    short = text.split("by their last word (")[1].split(")")[0]
    assert set(re.findall(r"`(\w+)`", short)) == set(api._SHORT)
    second = fenced(text)[1]
    assert "examples/instructions.yaml" in second
    monkeypatch.chdir(ROOT)
    more = f'"train.epochs=1", "model.path={tiny_base}", "output_dir={tmp_path}"'
    run_code(second.replace('"train.epochs=1"', more), tmp_path)
    assert str(tmp_path / "instructions") in capsys.readouterr().out


def test_python_in_every_page_compiles() -> None:
    for path in PAGES:
        for number, block in enumerate(fenced(path.read_text(encoding="utf-8")), 1):
            compile(block, f"{path.name}, block {number}", "exec")


@pytest.fixture
def gain(tmp_path, monkeypatch) -> Iterator[adapters.Method]:
    """The method of docs/adding-a-method.md, as if its file lay in the folder of methods."""
    (block,) = (code for code in fenced(page("docs/adding-a-method.md")) if "METHOD = " in code)
    (tmp_path / "gain.py").write_text(block, encoding="utf-8")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    found = (adapters._methods, adapters._called)
    for each in found:
        each.cache_clear()
    try:
        yield adapters.find_method("gain")
    finally:
        sys.modules.pop("tunesmith.adapters.gain", None)
        vars(adapters).pop("gain", None)
        for each in found:
            each.cache_clear()


def test_the_method_of_the_page_obeys_the_laws(gain) -> None:
    from tests.laws import laws

    for law in (*laws.ALWAYS, *laws.DETERMINISTIC):
        law(laws.Case(gain))
        law(laws.Case(gain, {"target_modules": "all-linear"}))


def test_the_method_of_the_page_trains(gain, command, in_process, tiny_base, tiny_reviews, tmp_path) -> None:
    given = words(tiny_base, tiny_reviews, tmp_path, adapter__kind="gain", adapter__rank=None, train__epochs=2)
    code, out, err = command("train", *given)
    assert code == 0, err
    run = Path(out.strip())
    assert (run / "adapter" / "adapter.safetensors").is_file()
    assert command("generate", run, "--prompt", "A joy.", "--max-new-tokens", 2)[0] == 0
    code, _, err = command("train", *given, "--name", "other", "adapter.targets=x")
    assert code == 2 and "adapter.targets" in err


def test_the_page_lists_every_law_and_every_seam() -> None:
    from tests.laws import laws

    text = page("docs/adding-a-method.md")
    for law in (*laws.ALWAYS, *laws.DETERMINISTIC, laws.compiled_is_eager):
        assert f"| `{law.__name__}` |" in text
    from tests.laws.small import build

    from tunesmith.model.seam import Seam

    seams = {name.rsplit(".", 1)[-1] for name, module in build().named_modules() if isinstance(module, Seam)}
    assert seams == {"input", "edit", "past", "mix", "after_attn", "after_mlp", "resid", "embed"}
    assert all(f"`{seam}`" in text for seam in seams)
