"""Chat with one model, which may change from turn to turn."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from tunesmith.errors import TunesmithError
from tunesmith.inference.history import Message
from tunesmith.serve.engine import Engine
from tunesmith.serve.ui.parts import HIDDEN, conversation, line, picker, settings_form
from tunesmith.serve.ui.talk import Ask, answers, choices, guarded, preview

State = tuple[list[Message], str, str]  # the conversation, how it is shown, the status


def asked(text: str, turns: list[Message]) -> tuple[str, list[Message], str]:
    """The question joins the conversation, in place of one that was never answered; the field is empty again."""
    turns = answered(turns)
    if text.strip():
        turns = [*turns, {"role": "user", "content": text}]
    return "", turns, conversation(turns)


def answered(turns: list[Message]) -> list[Message]:
    """The conversation without a last question that has no answer."""
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


def again(turns: list[Message]) -> tuple[list[Message], str]:
    """The conversation before its last answer."""
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return turns, conversation(turns)


def answer(
    engine: Engine, most: int, turns: list[Message], model: str, image: str | None, *form: object
) -> Generator[State]:
    """The states of the page while the last question is answered."""
    if not turns or turns[-1]["role"] != "user":
        yield turns, conversation(turns), line("")
        return

    def states() -> Generator[State]:
        ask = Ask(*form)  # type: ignore[arg-type]
        seen = None if image is None else Path(image)
        for texts, told in answers(engine, [model], turns[:-1], turns[-1]["content"], ask, most, seen):
            now = [*turns, {"role": "assistant", "content": texts[0]}]
            yield now, conversation(now), line(told)

    yield from guarded(states, lambda error: (turns, conversation(turns), line(f"error: {error}")))


def looked_at(image: str | None) -> str:
    """The small picture under the field, or why there is none."""
    if image is None:
        return ""
    try:
        return f'<img class="seen" alt="the image" src="{preview(Path(image))}">'
    except TunesmithError as error:
        return line(f"error: {error}")


def chat_tab(engine: Engine, most: int) -> gr.Dropdown:
    """Lay the tab out; returns the choice of models."""
    model = picker(choices(engine), "Answered by")
    turns = gr.State([])
    shown = gr.HTML(conversation([]), elem_id="chat")
    text = gr.Textbox(
        "",
        label="Question",
        lines=1,  # with more of them Enter would begin a line
        max_lines=12,
        placeholder="Enter sends, Shift+Enter begins a line",
        elem_id="question",
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary")
        stop = gr.Button("Stop")
        retry = gr.Button("Again")
        clear = gr.Button("Clear")
    told = gr.HTML(line(""))
    with gr.Accordion("Image, for a model that looks at images", open=False):
        image = gr.File(label="One image", file_types=["image"], type="filepath", elem_id="image")
        small = gr.HTML("")
    form = settings_form(most)

    def run(turns: list[Message], model: str, image: str | None, *values: object) -> Generator[State]:
        yield from answer(engine, most, turns, model, image, *values)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": HIDDEN}
    running = []
    for event in (send.click, text.submit):
        put = event(asked, [text, turns], [text, turns, shown], **quiet)
        running.append(put.then(run, [turns, model, image, *form], [turns, shown, told], **quiet))
    back = retry.click(again, turns, [turns, shown], **quiet)
    running.append(back.then(run, [turns, model, image, *form], [turns, shown, told], **quiet))
    image.change(looked_at, image, small, **quiet)
    stop.click(None, cancels=running, **quiet)
    clear.click(lambda: ([], conversation([]), line("")), None, [turns, shown, told], cancels=running, **quiet)
    return model
