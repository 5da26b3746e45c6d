"""What a user sees: whole characters, nothing of a stop string, and all of the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.inference import GenerationSettings, generate, stream
from tunesmith.inference.answers import Answer, Job
from tunesmith.inference.text import StopMatcher

EOS = 256


def answer_of(tokenizer, stop: tuple[str, ...] = (), limit: int = 1000) -> Answer:
    job = Job(None, GenerationSettings(stop=stop), frozenset({EOS}), tokenizer, logprobs=True)  # type: ignore[arg-type]
    return Answer(0, job, [1], limit, torch.Generator())


def say(answer: Answer, text: str, *, end: bool = True) -> list[str]:
    """Push the text's bytes, then EOS; the pieces shown, until the answer ended."""
    pieces = []
    for token in [*text.encode(), *([EOS] if end else [])]:
        if answer.reason is None:
            pieces.append(answer.push(token, -1.0))
    return pieces


def test_characters_are_never_split(byte_tokenizer) -> None:
    answer = answer_of(byte_tokenizer)
    pieces = say(answer, "añ漢🙂.")
    assert [p for p in pieces if p] == ["a", "ñ", "漢", "🙂", "."]
    assert answer.result().text == "añ漢🙂."
    assert answer.result().finish_reason == "eos"
    assert EOS not in answer.result().ids


@pytest.mark.parametrize("text", ["one END two", "oneEND", "END", "aENEND", "EENDx", "aEN ENDEND"])
def test_a_stop_string_is_cut_off_and_never_shown(byte_tokenizer, text: str) -> None:
    answer = answer_of(byte_tokenizer, ("END",))
    pieces = say(answer, text)
    expected = text[: text.index("END")]
    result = answer.result()
    assert "".join(pieces) == result.text == expected
    assert result.finish_reason == "stop"
    assert bytes(result.ids).decode() == expected
    assert len(result.logprobs) == len(result.ids)


def test_what_only_began_like_a_stop_string_is_shown_in_the_end(byte_tokenizer) -> None:
    answer = answer_of(byte_tokenizer, ("END",))
    assert "".join(say(answer, "the EN")) == "the EN"
    assert answer.result().finish_reason == "eos"
    answer = answer_of(byte_tokenizer, ("END",), limit=6)
    assert "".join(say(answer, "the EN", end=False)) == "the EN"
    assert answer.result().finish_reason == "length"
    assert answer.result().text == "the EN"


def test_the_start_of_a_stop_string_is_held_back(byte_tokenizer) -> None:
    answer = answer_of(byte_tokenizer, ("\n###",))
    assert say(answer, "hi\n##!", end=False) == ["h", "i", "", "", "", "\n##!"]


def test_the_first_of_several_stop_strings_wins(byte_tokenizer) -> None:
    answer = answer_of(byte_tokenizer, ("world", "lo w"))
    say(answer, "hello world")
    assert answer.result().text == "hel"


def test_a_stop_string_of_several_bytes_cuts_whole_tokens(byte_tokenizer) -> None:
    answer = answer_of(byte_tokenizer, ("é",))
    say(answer, "caféx")
    assert answer.result().text == "caf"
    assert bytes(answer.result().ids) == b"caf"


def test_a_stop_string_inside_a_token() -> None:
    class Words:
        words = ("one ", "tw##", "#o")

        def decode(self, ids, *, skip_special=True):
            return "".join(self.words[i] for i in ids)

        def streamer(self):
            words = self.words
            return type("S", (), {"push": lambda self, i: words[i], "flush": lambda self: ""})()

    answer = answer_of(Words(), ("###",))
    assert [answer.push(i, -1.0) for i in (0, 1, 2)] == ["one ", "tw", ""]
    assert answer.result().text == "one tw"
    assert answer.result().ids == (0,)


@given(
    st.text("ab\n#é", max_size=30),
    st.lists(st.text("ab\n#é", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_the_matcher_equals_a_search_in_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    # the first to be complete wins; of those complete at once, the first to begin
    at_end = {i: [s for s in stops if text[:i].endswith(s)] for i in range(len(text) + 1)}
    ends = [i for i, found in at_end.items() if found]
    assert matcher.found == bool(ends)
    if not ends:
        assert shown + matcher.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert len(shown) <= ends[0] - 1


@pytest.fixture(scope="module")
def byte_model(twins_maker):
    """A model over bytes (special tokens behind them) that babbles in ASCII."""
    model = twins_maker(seed=4, scale=1.5, vocab=260).ours
    run = model.logits

    def ascii_only(hidden, ctx):
        logits = run(hidden, ctx).clone()
        logits[:, :97], logits[:, 123:] = -torch.inf, -torch.inf
        return logits

    model.logits = ascii_only
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_stops_at_strings_in_a_batch(byte_model, byte_tokenizer, beams: int) -> None:
    prompts = [[1, 2, 3], [4], [1, 2, 9, 9]]
    settings = GenerationSettings(max_new_tokens=40, beams=beams)
    free = generate(byte_model, prompts, settings, eos_ids=(), tokenizer=byte_tokenizer)
    stops = (free[0].text[5:8], free[2].text[20:23])
    results = generate(byte_model, prompts, settings.changed(stop=stops), eos_ids=(), tokenizer=byte_tokenizer)
    assert results[0].finish_reason == "stop"
    assert not any(stop in r.text for stop in stops for r in results)
    assert results[0].ids == tuple(results[0].text.encode())
    if beams == 1:
        for before, after in zip(free, results, strict=True):
            cut = min((before.text.find(s) for s in stops if s in before.text), default=len(before.text))
            assert after.text == before.text[:cut]


def test_the_stream_is_the_text(byte_model, byte_tokenizer) -> None:
    prompts = [[1, 2, 3], [4], [1, 2, 9, 9]]
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=3, n=2, stop=("ab", "xyz"))
    heard = [""] * 6
    results = generate(
        byte_model, prompts, settings, eos_ids=(), tokenizer=byte_tokenizer,
        on_text=lambda i, text: heard.__setitem__(i, heard[i] + text),
    )  # fmt: skip
    assert heard == [r.text for r in results]
    pieces = list(stream(byte_model, prompts, settings, eos_ids=(), tokenizer=byte_tokenizer))
    assert sorted(p.index for p in pieces if p.result is not None) == list(range(6))
    assert len(pieces) > 60
