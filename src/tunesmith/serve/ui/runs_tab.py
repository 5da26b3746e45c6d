"""What a run left: its report with curves and samples; of one that goes on, the curves so far."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from tunesmith.errors import RequestError
from tunesmith.serve.ui.parts import HIDDEN, line
from tunesmith.serve.ui.runs import runs, shown


def look(folder: Path, name: str | None) -> str:
    """The HTML of a run, or a line that says why there is none."""
    try:
        return shown(folder, name)
    except (RequestError, OSError) as error:
        return line(f"error: {error}")


def runs_tab(tab: gr.Tab, folder: Path) -> None:
    """Lay `tab` out; it looks for runs anew each time that it is opened."""
    with gr.Row():
        choice = gr.Dropdown(runs(folder), value=None, label=f"Runs in {folder}", scale=4, elem_id="run")
        refresh = gr.Button("Look again", scale=1)
    frame = gr.HTML(line("Choose a run."), elem_id="report")

    def fresh(name: str | None) -> tuple[gr.Dropdown, str]:
        found = runs(folder)
        name = name if name in found else (found[0] if found else None)
        return gr.Dropdown(found, value=name), look(folder, name)

    choice.input(lambda name: look(folder, name), choice, frame, api_visibility=HIDDEN)
    for event in (tab.select, refresh.click):
        event(fresh, choice, [choice, frame], api_visibility=HIDDEN)
