"""The model's own chat template, and where in its rendering the answers and the users' texts lie.

The boundary of an answer is not searched for. The template is rendered up to the question with its generation prompt,
and up to the answer; the first must be a prefix of the second, and what comes after it is the answer with its end of
turn. A template with {% generation %} blocks says itself what is an answer.

What a user wrote is told from what the template wrote by rendering the same roles once with stand-ins for the texts.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

from tunesmith.data.sandbox import SHARED, Program
from tunesmith.data.schemas import Row, Turn
from tunesmith.data.segments import PROBE, Answers, Segment, Template, last_only, raw_text, refuse_text
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tunesmith.tokenizer import Tokenizer

GOLDEN_DATE = "2024-01-01T00:00:00"  # templates that print the date still have one golden rendering
STAND_IN = re.compile("\ue0f0(\\d+)\ue0f1")
GENERATION = re.compile(r"\{%-?\+?\s*generation\b")

Span = tuple[int, int]
Skeleton = list[tuple[str, int]]  # the template's text, then the message whose text follows (-1: none, the end)


class ChatTemplate(Template):
    """A jinja chat template, rendered in the sandbox. `stop` is its end-of-turn token where that is not EOS."""

    def __init__(self, text: str, tokenizer: Tokenizer, name: str = "chat") -> None:
        self.name = name
        self._text = text
        self._eos = "" if tokenizer.eos_id is None else tokenizer.token(tokenizer.eos_id)
        bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        self._special = special_pattern(tokenizer)
        self._program = Program(text, {"bos_token": bos, "eos_token": self._eos, "tools": None, "documents": None})
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        SHARED.check(self._program)
        self.stop = self._end_of_turn({tokenizer.token(i) for i in tokenizer.eos_ids})

    def segments(self, row: Row, *, answers: Answers = "all") -> tuple[Segment, ...]:
        """Render the conversation; raw text stays as it is, with EOS."""
        return raw_text(row, self._eos) if row.kind == "text" else self._segments(row, answers)

    def prompt(self, row: Row) -> tuple[Segment, ...]:
        """Render everything before the last answer, with the generation prompt."""
        if row.kind == "text":
            refuse_text(row, self.name)
        turns = row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns
        text = self._render([_job(turns, True)], row.source)[0]
        return self._cut(row, turns, text, [], True)

    def source(self) -> dict[str, Any]:
        """Return {"kind": "chat", "name", "text"}."""
        return {"kind": "chat", "name": self.name, "text": self._text}

    def golden(self) -> list[list[object]]:
        """Render the probe conversation as if on a fixed date."""
        segments = self._segments(PROBE, "all", now=GOLDEN_DATE)
        return [[s.text, s.supervised, s.special] for s in segments]

    def _segments(self, row: Row, answers: Answers, now: str | None = None) -> tuple[Segment, ...]:
        turns = row.turns
        places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        flags = last_only([turns[i].supervised for i in places], answers)
        if GENERATION.search(self._text):
            text, spans = self._marked(row, places, flags, now)
        else:
            wanted = [i for i, flag in zip(places, flags, strict=True) if flag]
            text, spans = self._by_prefix(row, wanted, now)
        return self._cut(row, turns, text, [self._to_end_of_turn(text, span) for span in spans], False)

    def _by_prefix(self, row: Row, wanted: list[int], now: str | None) -> tuple[str, list[Span]]:
        """Where the answers lie: after what is rendered up to the question, in what is rendered up to the answer."""
        turns = row.turns
        jobs = [_job(turns, False)]
        for i in wanted:
            jobs.append(_job(turns[:i], True))
            if i < len(turns) - 1:
                jobs.append(_job(turns[: i + 1], False))
        text, *parts = self._render(jobs, row.source, now=now)
        spans = []
        for i in wanted:
            before = parts.pop(0)
            upto = parts.pop(0) if i < len(turns) - 1 else text
            if not upto.startswith(before) or not text.startswith(upto.rstrip()):
                raise TemplateError(
                    f"{row.source}: this chat template renders what comes before answer {i} in another way once the "
                    "answer or later messages follow, so where the answer begins is not known; mark it "
                    '"loss": false, add {% generation %} blocks, or use data.template=alpaca'
                )
            spans.append((len(before), min(len(upto), len(text))))
        return text, spans

    def _marked(self, row: Row, places: list[int], flags: list[bool], now: str | None) -> tuple[str, list[Span]]:
        """Where the answers lie by the template's own {% generation %} blocks."""
        nonce = secrets.token_hex(8)  # a text cannot contain what it cannot know
        markers = (f"\ue0f2{nonce}", f"\ue0f3{nonce}")
        marked = self._render([_job(row.turns, False)], row.source, markers=markers, now=now)[0]
        pieces = re.split("[\ue0f2\ue0f3]" + nonce, marked)
        if len(pieces) != 2 * len(places) + 1:
            raise TemplateError(
                f"{row.source}: the chat template has {len(pieces) // 2} {{% generation %}} blocks for {len(places)} "
                "answers; it must mark each answer once"
            )
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        spans = [(ends[2 * k + 1], ends[2 * k + 2]) for k in range(len(places)) if flags[k]]
        return "".join(pieces), spans

    def _to_end_of_turn(self, text: str, span: Span) -> Span:
        """End an answer at its end-of-turn token: the newline after it is never generated."""
        matches = list(self._special.finditer(text, *span))
        if matches and not text[matches[-1].end() : span[1]].strip():
            return span[0], matches[-1].end()
        return span

    def _cut(self, row: Row, turns: tuple[Turn, ...], text: str, answers: list[Span], ask: bool) -> tuple[Segment, ...]:
        """Cut the rendering at every change of supervised or of author."""
        own = self._authors(row, turns, text, ask)
        edges = sorted({0, len(text), *(edge for span in (*answers, *own) for edge in span)})
        out = []
        for start, end in zip(edges, edges[1:], strict=False):
            supervised = any(a <= start and end <= b for a, b in answers)
            special = not any(a <= start and end <= b for a, b in own)
            out.append(Segment(text[start:end], supervised, special))
        return tuple(out)

    def _authors(self, row: Row, turns: tuple[Turn, ...], text: str, ask: bool) -> list[Span]:
        """Spans of `text` that are the messages' own texts."""
        texts = [turn.text for turn in turns]
        spans = self._follow(self._skeleton(turns, ask), texts, text)
        if spans is not None:
            return spans
        for turn in turns:
            found = self._special.search(turn.text)
            if found:
                raise TemplateError(
                    f"{row.source}: the {turn.role} text contains {found.group()!r}, a special token of this model, "
                    "and this chat template changes texts so that they cannot be kept apart; remove it from the row"
                )
        return []

    def _skeleton(self, turns: tuple[Turn, ...], ask: bool) -> Skeleton | None:
        """Render these roles with stand-ins for the texts, once."""
        key = (*(turn.role for turn in turns), "ask" if ask else "")
        if key not in self._skeletons:
            stand_ins = tuple(Turn(turn.role, f"\ue0f0{i}\ue0f1") for i, turn in enumerate(turns))
            try:
                parts = STAND_IN.split(self._render([_job(stand_ins, ask)], "")[0])
            except TemplateError:  # it wants something of its texts: their places remain unknown
                self._skeletons[key] = None
            else:
                self._skeletons[key] = list(zip(parts[::2], [*map(int, parts[1::2]), -1], strict=True))
        return self._skeletons[key]

    @staticmethod
    def _follow(skeleton: Skeleton | None, texts: list[str], text: str) -> list[Span] | None:
        """Lay the skeleton over the rendering; templates may strip the texts. None where it does not fit."""
        if skeleton is None:
            return None
        at = 0
        spans: list[Span] = []
        for k, (literal, i) in enumerate(skeleton):
            if not text.startswith(literal, at):
                return None
            at += len(literal)
            if i < 0:
                return spans if at == len(text) else None
            follows = skeleton[k + 1][0]
            forms = (texts[i], texts[i].rstrip(), texts[i].lstrip(), texts[i].strip())
            form = next((f for f in forms if text.startswith(f + follows, at)), None)
            if form is None:
                return None
            spans.append((at, at + len(form)))
            at += len(form)
        return None

    def _render(self, jobs: list[dict[str, Any]], source: str, **options: Any) -> list[str]:
        try:
            return SHARED.render(self._program, jobs, **options)
        except TemplateError as error:
            raise TemplateError(f"{source}: {error}" if source else str(error)) from None

    def _end_of_turn(self, eos: set[str]) -> tuple[str, ...]:
        """The token that ends an answer in this template, where it is another than EOS."""
        said = "".join(s.text for s in self._segments(PROBE, "all") if s.supervised and s.special)
        ends = self._special.findall(said)
        return tuple(end for end in ends[-1:] if end not in eos)


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return the pattern of every special-token string, longest first; it matches nothing where there are none."""
    tokens = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _job(turns: tuple[Turn, ...], ask: bool) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return {"messages": messages, "add_generation_prompt": ask}
