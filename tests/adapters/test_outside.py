"""A method in one file outside of the package: trained, saved, verified, loaded again; and never run unless the user
names it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.laws import laws
from tests.laws.small import build, disturb, logits_of, sample_row
from tests.tiny import edit_json, words

from tunesmith.adapters import attach, find_method, kinds, open_method, outside
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.errors import AdapterError, ConfigError

pytestmark = pytest.mark.usefixtures("single_thread")
PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(autouse=True)
def forget(monkeypatch) -> Iterator[None]:
    """No test leaves a method behind."""
    monkeypatch.setattr(outside, "_opened", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("tunesmith_method_"):
            del sys.modules[name]


@pytest.fixture
def toy(tmp_path) -> Path:
    """The method of docs/adding-a-method.md as a file of the user's own."""
    (block,) = re.findall(r"^```python\n(.*?METHOD = .*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    path = tmp_path / "mine" / "toy.py"
    path.parent.mkdir()
    path.write_text(block, encoding="utf-8")
    return path


@pytest.fixture
def trap(toy, tmp_path) -> tuple[Path, Path]:
    """A method that works and says so in a file when it is run: (its path, that file)."""
    marker = tmp_path / "was_run"
    path = tmp_path / "evil.py"
    path.write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        + toy.read_text(encoding="utf-8").replace("from __future__ import annotations\n", ""),
        encoding="utf-8",
    )
    return path, marker


def given(base, reviews, out, **settings) -> list[str]:
    return words(base, reviews, out, **{"adapter__rank": None, "evaluate__samples": 0, **settings})


def test_a_file_of_ones_own_is_trained_saved_verified_and_loaded(
    toy, command, tiny_base, tiny_reviews, tmp_path
) -> None:
    """The whole way through the command line; verify loads it in a fresh process, which is handed the file."""
    code, out, err = command("train", *given(tiny_base, tiny_reviews, tmp_path / "runs", adapter__kind=str(toy)))
    assert code == 0, err
    run = Path(out.strip())
    assert json.loads((run / "verify.json").read_text())["ok"]
    saved = [(run / "config.yaml").read_text(), (run / "adapter" / "tunesmith.json").read_text()]
    assert all("gain" in text and ".py" not in text for text in saved), "what is saved names the method, not its file"
    outside._opened.clear()  # a new session
    for words_ in (("verify", run), ("generate", run, "--prompt", "A joy.", "--max-new-tokens", 2)):
        code, _, err = command(*words_)
        assert code != 0
    assert "there is no method 'gain'" in err and "--method-file FILE.py" in err
    for words_ in (("verify", run), ("generate", run, "--prompt", "A joy.", "--max-new-tokens", 2)):
        outside._opened.clear()
        code, out, err = command(*words_, "--method-file", toy)
        assert code == 0, out + err


def test_a_yaml_may_name_it_and_a_relative_path_counts_from_where_the_command_is_run(
    toy, command, in_process, tiny_base, tiny_reviews, tmp_path, monkeypatch
) -> None:
    config = tmp_path / "somewhere" / "mine.yaml"
    config.parent.mkdir()
    config.write_text("adapter:\n  kind: mine/toy.py\n  target_modules: [q_proj]\n", encoding="utf-8")
    rest = given(tiny_base, tiny_reviews, tmp_path / "runs", train__epochs=2, train__save_steps=2)
    code, _, err = command("train", config, *rest)
    assert code == 2 and "mine/toy.py: no such file, looked for at" in err
    monkeypatch.chdir(tmp_path)
    assert command("plan", config, *[w for w in rest if "=" in w], "-m", tiny_base, "-d", tiny_reviews)[0] == 0
    code, out, err = command("train", config, *rest)
    assert code == 0, err
    run = Path(out.strip())
    shutil.rmtree(run / "adapter")
    outside._opened.clear()
    code, _, err = command("train", "--resume", run)
    assert code == 2 and "there is no method 'gain'" in err
    code, _, err = command("train", "--resume", run, "--method-file", toy)
    assert code == 0 and (run / "adapter" / "adapter.safetensors").is_file(), err


def test_a_part_of_a_mixed_method_may_be_a_file(toy, command, in_process, tiny_base, tiny_reviews, tmp_path) -> None:
    parts = [{"kind": "lora", "rank": 2}, {"kind": str(toy)}]
    code, out, err = command(
        "train", *given(tiny_base, tiny_reviews, tmp_path, adapter__kind="mixed", adapter__parts=parts)
    )
    assert code == 0, err
    settings = json.loads((Path(out.strip()) / "adapter" / "tunesmith.json").read_text())["settings"]
    assert [part["kind"] for part in settings["parts"]] == ["lora", "gain"]


def saved(folder: Path, kind: str, settings: dict | None = None) -> Path:
    """An adapter folder of somebody's that says it is of this kind."""
    folder.mkdir(parents=True)
    (folder / "tunesmith.json").write_text(json.dumps({"format": 1, "kind": kind, "settings": settings or {}}))
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, folder / "adapter.safetensors")
    return folder


def test_a_file_that_an_adapter_names_is_never_run(trap, command, tiny_base, tmp_path) -> None:
    evil, marker = trap
    for number, (kind, settings) in enumerate(
        [
            (str(evil), {}),
            ("../evil.py", {}),
            ("mixed", {"parts": [{"kind": "lora"}, {"kind": str(evil)}]}),
        ]
    ):
        folder = saved(tmp_path / f"a{number}" / "adapter", kind, settings)
        shutil.copy(evil, folder / "evil.py")
        with pytest.raises(AdapterError, match="a file that a run or an adapter names is never opened"):
            load_adapter(folder, build())
        for words_ in (
            ("verify", folder, "--base", tiny_base),
            ("generate", folder, "-m", tiny_base, "--prompt", "x"),
            ("evaluate", folder, "--base", tiny_base, "--data", tmp_path),
            ("merge", folder, "--base", tiny_base, "--out", tmp_path / "merged"),
            ("inspect", folder),
        ):
            command(*words_)
            assert not marker.exists(), f"{words_[0]} ran a file that an adapter named"


@pytest.mark.parametrize("how", ["resumed", "resumed at a checkpoint", "given"])
def test_a_file_that_a_run_names_is_never_run(
    trap, command, in_process, tiny_base, tiny_reviews, tmp_path, how: str
) -> None:
    """A real run whose configuration somebody has changed, given as a run or as a configuration file."""
    evil, marker = trap
    code, out, err = command("train", *given(tiny_base, tiny_reviews, tmp_path / "runs", adapter__rank=2))
    assert code == 0, err
    run = Path(out.strip())
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("kind: lora", f"kind: {evil}"), encoding="utf-8")
    edit_json(run / "adapter" / "tunesmith.json", kind=str(evil))
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter.safetensors")
    shutil.copy(evil, run)
    checkpoint = next(run.glob("checkpoint-*"))
    words_ = {
        "resumed": ("train", "--resume", run),
        "resumed at a checkpoint": ("train", "--resume", checkpoint),
        "given": ("train", config, "--name", "other"),
    }[how]
    code, _, err = command(*words_)
    assert code == 2 and "is never opened" in err and not marker.exists()
    for other in (("verify", run), ("generate", run, "--prompt", "x"), ("evaluate", run), ("inspect", run)):
        command(*other)
        assert not marker.exists(), f"{other[0]} ran a file that a run named"


def test_the_trap_works(trap) -> None:
    """Opened by the user, that same file runs: the tests above bite."""
    evil, marker = trap
    assert open_method(evil).kind == "gain" and marker.exists()


def test_obeys_the_laws_like_any_other(toy) -> None:
    method = open_method(toy)
    assert "gain" in kinds() and find_method("gain") is method is find_method(str(toy)) is open_method(toy)
    for law in (*laws.ALWAYS, *laws.DETERMINISTIC, laws.compiled_is_eager):
        law(laws.Case(method))
    model = build()
    disturb(attach(model, {"kind": str(toy)}))
    assert not torch.equal(logits_of(model, *sample_row()), logits_of(model, *sample_row(), adapters=()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "cannot be run: SyntaxError"),
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
        ("import no_such_library", "cannot be run: ModuleNotFoundError"),
        ("x = 1", "sets no METHOD"),
        ("class M:\n    kind = 'm'\nMETHOD = M()", r"METHOD has no settings, learning_rate, identity_at_init\(\)"),
        ("from tunesmith.adapters.lora import METHOD", "'lora' is the name of another method"),
    ],
)
def test_a_file_that_is_no_method_is_refused_in_one_line(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"bad.py: .*{said}") as caught:
        open_method(path)
    assert "\n" not in str(caught.value) and not outside.opened()
    with pytest.raises(ConfigError, match=r"gone.py: no such file, looked for at /.*gone.py"):
        open_method(tmp_path / "gone.py")


def test_two_files_cannot_have_one_name(toy, tmp_path) -> None:
    open_method(toy)
    other = shutil.copy(toy, tmp_path / "again.py")
    with pytest.raises(ConfigError, match="'gain' is the name of another method"):
        open_method(other)
