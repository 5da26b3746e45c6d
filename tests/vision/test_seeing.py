"""A model that learns to see: images that the test draws, a random encoder, a frozen model that knows words of colours.

It answers by the image; another image, another answer; shuffled images, or none, and it is at chance.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.small import run_packs
from tests.tiny import edit_weights, write_base, write_rows
from tests.vision.small import COLOURS, SHAPES, write_encoder, write_image

from tunesmith import api, workflow
from tunesmith.adapters import attach
from tunesmith.data.encode import encode_prompt, encode_rows
from tunesmith.data.pack import plan_packs
from tunesmith.data.schemas import read_row, recognise
from tunesmith.data.templates import get_template
from tunesmith.evaluate.choice import ChoiceSettings, measure, question
from tunesmith.evaluate.subject import Subject
from tunesmith.export.verify import verify_run
from tunesmith.inference.generate import generate
from tunesmith.inference.history import Turns
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.session import ChatSession
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer
from tunesmith.vision.open import open_image

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("single_thread")
CHANCE = 1 / len(COLOURS)
QUESTION = "Which colour?"
ASKED = ("--metrics", "exact_match")


def taught(folder: Path, steps: int = 45) -> Path:
    """A base that answers "It is red. QUESTION" with "red": it has the words, and has never seen anything."""
    base = write_base(folder)
    model, tokenizer = load_model(base), load_tokenizer(base)
    template, draw = get_template("plain", tokenizer), random.Random(0)
    adapter = attach(model, {"kind": "full"})
    optimizer = torch.optim.AdamW(list(adapter.trainable.values()), lr=1e-2)
    for _ in range(steps):
        said = [(c, draw.choice((f"It is {c}.", f"a {c} {s}"))) for c in COLOURS for s in SHAPES for _ in range(4)]
        raw = [{"instruction": f"{text} {QUESTION}", "output": colour} for colour, text in said]
        rows = [read_row(row, "said", recognise(row, "said")) for row in raw]
        examples = encode_rows(rows, template, tokenizer, cutoff=64).examples
        loss, _ = run_packs(model, plan_packs(examples, budget=2000), adapter)
        optimizer.step()
    assert loss < 0.1, "the base has not learnt its words"
    edit_weights(base, lambda tensors: tensors.update({k: model.state_dict()[k].clone() for k in tensors}))
    return base


def draw_all(folder: Path, shuffled: bool = False) -> Path:
    """Rows with images; `shuffled`: each answer has images of all colours, as many of each."""
    number = 0
    for split, count in (("train", 40), ("valid", 12)):
        rows = []
        for answer in COLOURS:
            for i in range(count):
                colour, name = list(COLOURS)[i % 3] if shuffled else answer, f"{split}-{number}.png"
                write_image(folder / "pictures" / name, colour, SHAPES[i % 2], seed=number)
                rows.append({"instruction": QUESTION, "output": answer, "image": f"pictures/{name}"})
                number += 1
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


class World:
    """A base, an encoder, images, and runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, taught(root / "base")
        self.encoder = str(write_encoder(root / "clip"))
        self.images, self.shuffled = draw_all(root / "images"), draw_all(root / "shuffled", shuffled=True)

    def train(self, name: str, adapter: dict[str, Any], rate: float, epochs: int, data: Path | None = None) -> str:
        """`tunesmith train`; what it said on stderr."""
        settings = {
            "model.dtype": "float32", "data.template": "plain", "adapter": adapter,
            "train.batch_size": 24, "train.epochs": epochs, "train.learning_rate": rate,
            "evaluate.metrics": ["exact_match"], "evaluate.samples": 1,
        }  # fmt: skip
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        where = ["--model", self.base, "--data", data or self.images, "--output-dir", self.root, "--name", name]
        code, _, said = self.run("train", *where, *words)
        assert code == 0, said
        return said

    @staticmethod
    def run(*args: object, stdin: str = "") -> tuple[int, str, str]:
        """A command: (exit code, stdout, stderr)."""
        from tunesmith.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(stdin))
            code = main([str(arg) for arg in args])
        return code, out.getvalue(), err.getvalue()

    def accuracy(self, name: str) -> float:
        """The last one that was measured while training."""
        lines = (self.root / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [found["exact_match"] for line in lines if "exact_match" in (found := json.loads(line))][-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("world")
        patch.setenv("TUNESMITH_HOME", str(root / "home"))
        patch.setattr(workflow, "verify_run", lambda *args, **given: verify_run(*args, **{**given, "fresh": False}))
        torch.set_num_threads(1)
        yield World(root)


@pytest.fixture(scope="module")
def seeing(world: World) -> Path:
    """A run of LLaMA-Adapter with images. Do not change it."""
    adapter = {"kind": "llama_adapter_image", "layers": 2, "encoder": world.encoder}
    said = world.train("seeing", adapter, 3e-2, 12)
    assert "train: 120 of 120 rows have an image" in said
    return world.root / "seeing"


@pytest.fixture(scope="module")
def blind(world: World) -> str:
    """What a run on the same rows said that looks at no image; it is in ROOT/blind."""
    return world.train("blind", {"kind": "llama_adapter", "layers": 2}, 3e-2, 2)


def test_it_sees(world: World, seeing: Path) -> None:
    assert world.accuracy("seeing") >= 0.9


@pytest.mark.parametrize(
    ("name", "spec", "rate"),
    [
        ("projected", {"kind": "image_projection"}, 1e-2),
        ("second", {"kind": "llama_adapter_v2_image", "layers": 1, "vision_width": 32}, 1e-2),
    ],
)
def test_so_do_the_others(world: World, name: str, spec: dict[str, Any], rate: float) -> None:
    world.train(name, {**spec, "encoder": world.encoder}, rate, 9)
    assert world.accuracy(name) >= 0.9


def test_shuffled_images_bring_it_to_chance(world: World, seeing: Path) -> None:
    found = {}
    for folder in (world.images, world.shuffled):
        code, out, err = world.run("evaluate", seeing, "--data", folder, "--split", "valid", "--json", *ASKED)
        assert code == 0, err
        found[folder] = json.loads(out)["exact_match"]
    assert found[world.images] == world.accuracy("seeing")
    assert abs(found[world.shuffled] - CHANCE) < 0.1, "every label has images of all colours, four of each"


def test_text_alone_is_at_chance(world: World, blind: str) -> None:
    assert abs(world.accuracy("blind") - CHANCE) < 0.01
    assert "120 of 120 rows have an image, and llama_adapter does not look at it" in blind


def test_what_was_saved_is_proved_in_a_fresh_process(seeing: Path) -> None:
    report = verify_run(seeing)
    assert report.passed, report.first_failure()
    names = [check.name for check in report.checks]
    assert "live logits" in names and "differs from base" in names


def test_generate_about_images(world: World, seeing: Path, tmp_path: Path) -> None:
    files = {c: write_image(tmp_path / "pictures" / f"{c}.png", c, "disc", seed=900) for c in COLOURS}
    rows = [{"prompt": QUESTION, "image": f"pictures/{c}.png"} for c in COLOURS]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = world.run("generate", seeing, "--file", tmp_path / "asked.jsonl")
    assert (code, out.split()) == (0, list(COLOURS)), err
    for live in ("--stream", "--no-stream"):
        told = world.run("generate", seeing, "-p", QUESTION, "--image", files["blue"], live)
        assert told[:2] == (0, "blue\n"), told[2]
    code, _, err = world.run("generate", seeing, "-p", QUESTION, "--image", tmp_path / "gone.png")
    assert code == 2 and "gone.png: no such file" in err
    code, _, err = world.run("generate", seeing, "-p", "What?", "--image", files["blue"], "--use", "base")
    assert code == 2 and "nothing here looks at images" in err


@pytest.mark.usefixtures("blind")
def test_chat_about_images(world: World, seeing: Path, tmp_path: Path) -> None:
    files = {c: write_image(tmp_path / f"{c}.png", c, "square", seed=901) for c in COLOURS}
    lines = f"{QUESTION}\n/image {files['green']}\n/reset\n{QUESTION}\n/reset\n/image\n{QUESTION}\n"
    code, out, err = world.run("chat", seeing, "--image", files["red"], stdin=lines)
    assert code == 0 and out.split() == ["red", "green", "green"], (out, err)
    assert f"image: {files['green']}" in err
    code, _, err = world.run("chat", world.root / "blind", "--image", files["red"], stdin="hello\n")
    assert code == 2 and "nothing here looks at images (default does not)" in err


def test_a_talk_about_changing_images_reads_what_a_fresh_one_reads(seeing: Path, tmp_path: Path) -> None:
    """Keys and values are kept between turns as long as the image stays, and made anew when it changes."""
    loaded = api.load(seeing)
    template = loaded.templates["default"]
    session = ChatSession(loaded.model, loaded.tokenizer, template, GenerationSettings(max_new_tokens=3))
    pictures = [open_image(write_image(tmp_path / f"{c}.png", c), "test") for c in ("red", "blue")]
    for picture in (pictures[0], pictures[0], pictures[1], None):
        if picture is not session.picture:
            session.show(picture)
        row = Turns(session.system, session.messages, QUESTION, session.picture).row(session.messages)
        prompt = encode_prompt(row, template, loaded.tokenizer)
        "".join(session.say(QUESTION))
        (alone,) = generate(
            loaded.model, [prompt], GenerationSettings(max_new_tokens=3), eos_ids=loaded.tokenizer.eos_ids
        )
        assert session.last is not None and session.last.ids == alone.ids


def test_a_run_without_images_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3, encoding="utf-8")
    adapter = f"adapter={json.dumps({'kind': 'image_projection', 'encoder': world.encoder})}"
    words = ["--model", world.base, "--data", tmp_path / "rows.jsonl", "data.template=plain", adapter]
    code, _, err = world.run("train", *words, "--output-dir", tmp_path)
    assert code == 2 and "image_projection looks at images, and no row of" in err


def test_a_missing_image_is_named_before_training(world: World, tmp_path: Path) -> None:
    rows = [{"instruction": QUESTION, "output": "red", "image": "gone.png"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    adapter = f"adapter={json.dumps({'kind': 'image_projection', 'encoder': world.encoder})}"
    words = ["--model", world.base, "--data", tmp_path / "rows.jsonl", "data.template=plain", adapter]
    code, _, err = world.run("train", *words, "--output-dir", tmp_path)
    assert code == 2 and "rows.jsonl:1: image" in err and "gone.png: no such file" in err


def test_questions_of_a_task_are_asked_about_their_images(seeing: Path, tmp_path: Path) -> None:
    loaded = api.load(seeing)
    template, adapters = api.acting(loaded)
    subject = Subject(loaded.model, loaded.tokenizer, template, adapters=adapters)
    files = [write_image(tmp_path / f"{colour}.png", colour, seed=902) for colour in COLOURS]
    asked = [question(f"q{i}", QUESTION, list(COLOURS), i, image=file) for i, file in enumerate(files)]
    settings = ChoiceSettings(template=True)
    assert measure(subject, asked, settings).figures["acc"].value == 1
    blind = [replace(one, image=None) for one in asked]
    assert abs(measure(subject, blind, settings).figures["acc"].value - CHANCE) < 0.01


def test_batches_without_an_image_are_steps_too(world: World, tmp_path: Path) -> None:
    """Where visual tokens alone are trained, such a batch has nothing to learn from; the run goes on."""
    rows = [{"instruction": f"{QUESTION} {i}", "output": "red"} for i in range(8)]
    rows[5]["image"] = str(write_image(tmp_path / "red.png", "red"))
    write_rows(tmp_path / "rows.jsonl", rows)
    adapter = {"kind": "image_projection", "encoder": world.encoder}
    words = {"adapter": adapter, "data.template": "plain", "train.batch_size": 2, "model.dtype": "float32"}
    given = [f"{key}={json.dumps(value)}" for key, value in {**words, "train.shuffle": False}.items()]
    where = ["--model", world.base, "--data", tmp_path / "rows.jsonl", "--output-dir", tmp_path, "--name", "few"]
    code, _, err = world.run("train", *where, *given)
    assert code == 0 and "1 of 8 rows have an image" in err, err
    lines = (tmp_path / "few" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    norms = [json.loads(line)["grad_norm"] for line in lines]
    assert norms[:2] == [0, 0] and norms[2] > 0 and norms[3] == 0
