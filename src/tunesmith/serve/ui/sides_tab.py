"""One question to several models at once, their answers side by side."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import gradio as gr

from tunesmith.errors import RequestError
from tunesmith.serve.engine import Engine
from tunesmith.serve.ui.parts import HIDDEN, line, picker, settings_form
from tunesmith.serve.ui.talk import Ask, answers, choices, guarded

MOST = 4  # models beside each other


def sides(engine: Engine, most: int, text: str, models: list[str], *form: object) -> Generator[list[Any]]:
    """The states of the columns and of the status while all answer."""

    def states() -> Generator[list[Any]]:
        if not models:
            raise RequestError("choose at least one model")
        ask = Ask(*form)  # type: ignore[arg-type]
        for texts, told in answers(engine, models[:MOST], [], text, ask, most):
            yield [*columns(models[:MOST], texts), line(told)]

    yield from guarded(states, lambda error: [*[gr.skip()] * MOST, line(f"error: {error}")])


def columns(models: list[str], texts: list[str]) -> list[Any]:
    """A column for each model, the others out of sight."""
    shown = [gr.Textbox(text, label=model, visible=True) for model, text in zip(models, texts, strict=True)]
    return [*shown, *[gr.Textbox("", visible=False)] * (MOST - len(shown))]


def sides_tab(engine: Engine, most: int) -> gr.Dropdown:
    """Lay the tab out; returns the choice of models."""
    models = picker(choices(engine), f"Answered by (up to {MOST})", MOST)
    text = gr.Textbox("", label="Question", lines=3, max_lines=12, elem_id="both-question")
    with gr.Row():
        send = gr.Button("Ask all", variant="primary")
        stop = gr.Button("Stop")
    with gr.Row():
        shown = [
            gr.Textbox(lines=12, max_lines=40, label=f"answer {number + 1}", visible=number < 2, interactive=False,
                       buttons=["copy"], elem_classes="side")
            for number in range(MOST)
        ]  # fmt: skip
    told = gr.HTML(line(""))
    form = settings_form(most)

    def run(text: str, models: list[str], *values: object) -> Generator[list[Any]]:
        yield from sides(engine, most, text, models, *values)

    running = send.click(run, [text, models, *form], [*shown, told], show_progress="hidden", api_visibility=HIDDEN)
    stop.click(None, cancels=[running], api_visibility=HIDDEN)
    return models
