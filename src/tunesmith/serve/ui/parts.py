"""What the tabs of the page share: the form of generation settings, and lines that are text whatever they hold."""

from __future__ import annotations

import html
from collections.abc import Sequence

import gradio as gr

from tunesmith.inference.history import Message
from tunesmith.serve.ui.talk import Ask

HIDDEN = "private"  # no function of the page is part of a documented API


def line(text: str) -> str:
    """A line for the status under a page, escaped."""
    return f'<p class="told" role="status">{html.escape(text)}</p>'


def conversation(turns: Sequence[Message]) -> str:
    """Questions and answers as they were written, escaped: neither Markdown nor HTML of a model is carried out."""
    if not turns:
        return '<div class="turns"><p class="none">Ask something.</p></div>'
    said = (f'<div class="turn {turn["role"]}">{html.escape(turn["content"])}</div>' for turn in turns)
    return f'<div class="turns"><div class="inside">{"".join(said)}</div></div>'


def settings_form(most: int) -> list[gr.components.Component]:
    """Fields in the order of `Ask.names()`."""
    default = Ask()
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox("", label="System message", lines=2, placeholder="where the model's template has one")
        with gr.Row():
            longest = gr.Slider(1, most, min(default.max_new_tokens, most), step=1, label="Longest answer, tokens")
            heat = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature (0: the likeliest token)")
            top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top p (1: all)")
        with gr.Row():
            top_k = gr.Slider(0, 200, default.top_k, step=1, label="Top k (0: all)")
            penalty = gr.Slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty")
            seed = gr.Textbox("", label="Seed", placeholder="a new draw each time", max_lines=1)
    return [system, longest, heat, top_p, top_k, penalty, seed]


def picker(models: Sequence[str], label: str, several: int | None = None) -> gr.Dropdown:
    """A choice of models; `several`: up to so many."""
    first = list(models[:2]) if several else models[0]
    return gr.Dropdown(list(models), value=first, label=label, multiselect=bool(several), max_choices=several)
