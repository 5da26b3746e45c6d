"""A form that shows data as a run would see it, plans the run, and starts it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tunesmith.adapters import kinds
from tunesmith.data.catalog import CATALOG
from tunesmith.serve.ui.jobs import Jobs, words
from tunesmith.serve.ui.parts import HIDDEN
from tunesmith.serve.ui.talk import guarded

# the keys of the configuration behind the fields, in their order
KEYS = (
    "model.path", "data.train", "data.template", "data.limit", "adapter.kind", "train.epochs", "train.learning_rate",
    "name",
)  # fmt: skip
PREVIEW, PLAN, TRAIN = ("data", "preview"), ("plan",), ("train",)


def command(jobs: Jobs, folder: Path, name: Sequence[str], *values: object) -> Generator[str]:
    """Run one of the commands with what the form holds; what it says, as it comes."""

    def states() -> Generator[str]:
        *fields, more = values
        given = words({**dict(zip(KEYS, fields, strict=True)), "output_dir": folder}, str(more or ""))
        jobs.start(name, given)
        yield from jobs.follow()

    yield from guarded(states, lambda error: f"error: {error}")


def train_tab(jobs: Jobs, folder: Path, model: str) -> tuple[gr.Textbox, Callable[[], Generator[str]]]:
    """Lay the tab out; returns the field of what a command says, and what follows a command that runs."""
    known = {kind: [name for name, item in CATALOG.items() if item.kind == kind] for kind in ("model", "data")}
    with gr.Row():
        base = gr.Dropdown(
            list(dict.fromkeys([model, *known["model"]])), value=model, label="Base model", allow_custom_value=True
        )
        data = gr.Dropdown(
            known["data"], value=known["data"][0], label="Data: file, folder or name", allow_custom_value=True
        )
        template = gr.Textbox("", label="Template", placeholder="chat: the model's own", max_lines=1)
        limit = gr.Textbox("", label="Rows at most", placeholder="all", max_lines=1)
    with gr.Row():
        method = gr.Dropdown(sorted(kinds()), value="lora", label="Method")
        epochs = gr.Textbox("1", label="Epochs", max_lines=1)
        rate = gr.Textbox("", label="Learning rate", placeholder="the method's", max_lines=1)
        name = gr.Textbox("", label="Name of the run", placeholder="made of the above", max_lines=1)
    more = gr.Textbox(
        "",
        label="More settings, a line each",
        lines=3,
        placeholder="adapter.rank=16\ntrain.memory=auto",
        elem_id="more",
    )
    with gr.Row():
        preview = gr.Button("Preview data")
        plan = gr.Button("Plan")
        start = gr.Button("Train", variant="primary")
        stop = gr.Button("Stop", variant="stop")
    said = gr.Textbox(
        "", label="What it says", lines=18, max_lines=30, interactive=False, elem_id="said", autoscroll=True
    )
    form = [base, data, template, limit, method, epochs, rate, name, more]

    def runner(words: Sequence[str]) -> Callable[..., Generator[str]]:
        def run(*values: object) -> Generator[str]:
            yield from command(jobs, folder, words, *values)

        return run

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": HIDDEN}
    for button, what in ((preview, PREVIEW), (plan, PLAN), (start, TRAIN)):
        button.click(runner(what), form, said, **quiet)
    stop.click(lambda: jobs.stop(), None, None, **quiet)

    def follow() -> Generator[str]:
        if jobs.running:
            yield from jobs.follow()
        else:
            yield jobs.text()

    return said, follow
