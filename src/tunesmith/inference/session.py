"""A conversation: its history through the template, and a cache that keeps what the next turn begins with.

history + question -> template -> tokens -> [ drop from the cache what differs, feed only the rest ] -> answer
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.data.encode import Prompt
from tunesmith.errors import GenerationError
from tunesmith.inference.answers import Answer, Generation, Job
from tunesmith.inference.generate import FIRST_ROOM, decode, evaluation_mode, make_job, new_answer, stream
from tunesmith.inference.history import Message, Turns, fitting
from tunesmith.inference.prefill import (
    attached_adapters,
    check_adapters,
    check_prompt,
    context_limit,
    forward_last,
    pack_prompts,
)
from tunesmith.inference.sample import GenerationSettings
from tunesmith.model.cache import Cache
from tunesmith.model.llama import Llama

if TYPE_CHECKING:
    from tunesmith.data.segments import Template
    from tunesmith.model.sight import Picture
    from tunesmith.tokenizer import Tokenizer


class ChatSession:
    """Talks with a model through a template, turn by turn.

    `adapters`: the attached ones that act (None: all, (): the bare base). `templates` gives adapters templates of
    their own, taken when `use` switches to them. `settings.stop` is extended by the template's own stop strings.
    `notices` collects lines that the user should see once; `last` is the latest answer with the reason why it ended.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        template: Template,
        settings: GenerationSettings | None = None,
        *,
        system: str | None = None,
        adapters: tuple[str, ...] | None = None,
        templates: Mapping[str, Template] | None = None,
    ) -> None:
        check_adapters(model, adapters)
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or GenerationSettings()
        self.system = system
        self.adapters = adapters
        self.picture: Picture | None = None
        self.messages: list[Message] = []
        self.notices: list[str] = []
        self.last: Generation | None = None
        self._base_template, self._templates = template, dict(templates or {})
        self._cache: Cache | None = None
        self._held: list[int] = []  # the tokens whose keys and values the cache holds
        self._told: set[str] = set()
        self.template = self._templates.get(adapters[0], template) if adapters else template

    @property
    def names(self) -> list[str]:
        """The attached adapters."""
        return attached_adapters(self.model)

    def use(self, adapter: str | None) -> None:
        """Let this adapter alone act from now on, with its own template; None: the bare base. Raises AdapterError."""
        chosen = () if adapter is None else (adapter,)
        check_adapters(self.model, chosen)
        self.adapters = chosen
        self.template = self._base_template if adapter is None else self._templates.get(adapter, self._base_template)
        self._forget()  # its keys and values are another model's

    def show(self, picture: Picture | None) -> None:
        """Let the conversation be about this image from now on; None: about none. Raises GenerationError.

        What was said stays; it is read anew, with the image.
        """
        if picture is not None and not self.model.needs(self.adapters).looks:
            acting = ", ".join(self.names if self.adapters is None else self.adapters) or "the bare base"
            raise GenerationError(f"nothing here looks at images ({acting} does not); use an adapter that does")
        self.picture = picture
        self._forget()

    def reset(self) -> None:
        """Forget the conversation; system text, settings and adapter stay."""
        self.messages = []
        self._forget()

    def undo(self) -> str | None:
        """Take back the last question and its answer; returns the question, None where there is none."""
        if not self.messages:
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def say(self, text: str) -> Generator[str]:
        """Answer `text`, piece by piece.

        However the answer ends, by itself, by closing the iterator or by Ctrl-C, what was shown of it joins the
        history; an answer without text leaves the history as it was. Raises DataError, TemplateError,
        GenerationError.
        """
        prompt = self._prompt(text)
        shown: list[str] = []
        self.last = None
        try:
            for piece in self._answer(prompt):
                shown.append(piece)
                yield piece
        except KeyboardInterrupt:
            self._forget()  # it may have struck between two writes
            raise
        finally:
            answer = "".join(shown)
            if answer.strip():
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _answer(self, prompt: Prompt) -> Iterator[str]:
        stop = tuple(dict.fromkeys((*self.settings.stop, *self.template.stop)))
        settings = replace(self.settings, stop=stop, n=1)
        eos = self.tokenizer.eos_ids
        if settings.beams > 1:
            pieces = stream(
                self.model, [prompt], settings, eos_ids=eos, tokenizer=self.tokenizer, adapters=self.adapters
            )  # fmt: skip
            for piece in pieces:
                self.last = piece.result
                yield piece.text
            return
        job = make_job(self.model, settings, eos, self.tokenizer, self.adapters)
        answer = new_answer(job, 0, prompt, seed=settings.seed, adapters=self.adapters)
        try:
            with evaluation_mode(self.model):
                cache, logits = self._feed(job, prompt)
                for piece in decode(job, [answer], cache, logits):
                    self.last = piece.result
                    if piece.text:
                        yield piece.text
        finally:
            self._remember(prompt, answer)

    @torch.inference_mode()
    def _feed(self, job: Job, prompt: Prompt) -> tuple[Cache, Tensor]:
        """The cache with exactly `prompt` in it, and the logits after it; only what it does not hold is computed."""
        if self._cache is None:
            room = min(job.settings.max_new_tokens, FIRST_ROOM)
            self._cache = Cache(self.model.config, 1, len(prompt) + room, self.model.dtype, self.model.device)
        needs = self.model.needs(self.adapters)
        known, whole = 0, needs.by_answer  # an earlier prompt's end is edited in the cache, and is no end now
        for held, token in zip(self._held, prompt[:-1], strict=False):  # the last token is fed: its logits are needed
            if held != token or whole:
                break
            known += 1
        self._cache.truncate(0, known)
        self._held = self._held[:known]
        rest = Prompt(prompt[known:], prompt.picture)
        fresh, layout = pack_prompts([rest], False, self.model.device, [needs])
        return self._cache, forward_last(
            self.model, fresh.tolist(), layout, self._cache, [self.adapters], [len(fresh) - 1]
        )

    def _remember(self, prompt: Prompt, answer: Answer) -> None:
        if self._cache is not None:
            self._held = [*prompt, *answer.ids][: self._cache.lengths[0] - self._cache.virtual[0]]

    def _forget(self) -> None:
        self._cache, self._held = None, []

    def _prompt(self, text: str) -> Prompt:
        """The tokens of history and question; the oldest exchanges go where the context is too short for all."""
        limit = context_limit(self.model.config)
        most = self.settings.max_new_tokens
        asked = Turns(self.system, self.messages, text, self.picture)
        ids, notices = fitting(asked, self.template, self.tokenizer, limit, most)
        for line in notices:
            self._tell(line)
        check_prompt(self.model.config, ids, "this conversation")
        return ids

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.notices.append(line)


def transcript(session: ChatSession) -> dict[str, list[Message]]:
    """The conversation as a row of the `messages` schema. Raises GenerationError where nothing was said."""
    if not session.messages:
        raise GenerationError("nothing was said yet, so there is nothing to save")
    system = [{"role": "system", "content": session.system}] if session.system else []
    return {"messages": [*system, *session.messages]}
