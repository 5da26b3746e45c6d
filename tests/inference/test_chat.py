"""Chat: a kept cache changes nothing but the work; the terminal does what its commands say."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.templates import get_template
from tunesmith.errors import AdapterError, DataError, GenerationError
from tunesmith.inference import ChatSession, GenerationSettings, generate, run_chat
from tunesmith.inference.chat import Terminal, visible

SETTINGS = GenerationSettings(max_new_tokens=20)


@pytest.fixture
def template(chat_tokenizer):
    return get_template("chat", chat_tokenizer)


@pytest.fixture
def session(chat_model, chat_tokenizer, template) -> ChatSession:
    return ChatSession(chat_model, chat_tokenizer, template, SETTINGS)


def fresh(session: ChatSession, messages: list[dict[str, str]], **kwargs) -> str:
    """The answer to a conversation without any cache."""
    ids = encode_prompt(chat_row(messages), session.template, session.tokenizer)
    settings = session.settings.changed(stop=session.template.stop)
    eos = session.tokenizer.eos_ids
    return generate(session.model, [ids], settings, eos_ids=eos, tokenizer=session.tokenizer, **kwargs)[0].text


def ask(session: ChatSession, text: str) -> str:
    return "".join(session.say(text))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Counter:
    """How many tokens each pass of the model was given; may strike like Ctrl-C."""

    def __init__(self, model, strike_at: int = -1) -> None:
        self.passes: list[int] = []
        run = model.run

        def counted(tokens, ctx):
            self.passes.append(len(tokens))
            if len(self.passes) == strike_at:
                raise KeyboardInterrupt
            return run(tokens, ctx)

        model.run = counted


def test_every_turn_equals_a_fresh_pass_and_feeds_only_what_is_new(session: ChatSession) -> None:
    counter = Counter(session.model)
    for text in ("hello there, how are you?", "and now?", "a third thing"):
        messages = [*session.messages, user(text)]
        held = len(session._held)
        counter.passes.clear()
        answer = ask(session, text)
        fed = list(counter.passes)
        ids = encode_prompt(chat_row(messages), session.template, session.tokenizer)
        assert len(answer) == 20
        assert answer == fresh(session, messages)
        assert fed[0] == len(ids) - held
        assert fed[1:] == [1] * 19
        assert held == 0 or fed[0] < 20 + len(text) + 40 < len(ids)
        assert session.messages == [*messages, {"role": "assistant", "content": answer}]
        assert session.last is not None
        assert session.last.finish_reason == "length"


def test_a_changed_system_text_and_a_reset_reach_back(session: ChatSession) -> None:
    ask(session, "hello")
    session.system = "be brief"
    messages = [{"role": "system", "content": "be brief"}, *session.messages, user("again")]
    assert ask(session, "again") == fresh(session, messages)
    session.reset()
    messages = [{"role": "system", "content": "be brief"}, user("hello")]
    assert ask(session, "hello") == fresh(session, messages)
    assert len(session.messages) == 2


def test_the_same_question_twice_still_has_a_token_to_feed(session: ChatSession) -> None:
    first = ask(session, "hello")
    session.messages = []
    assert ask(session, "hello") == first


class Shift(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, value, host, ctx, given):
        return value * self.by


def test_adapters_are_switched_by_name_with_their_own_template(chat_model, chat_tokenizer, template) -> None:
    for name, by in (("left", 3.0), ("right", -2.0)):
        chat_model.model.layers[0].self_attn.v_proj.edit[name] = Shift(by)
    own = get_template("alpaca", chat_tokenizer)
    session = ChatSession(chat_model, chat_tokenizer, template, SETTINGS, adapters=(), templates={"right": own})
    base = ask(session, "hello")
    said = {}
    for name in ("left", "right", None, "left"):
        session.use(name)
        messages = [*session.messages, user("more")]
        chosen = () if name is None else (name,)
        said[name] = ask(session, "more")
        assert said[name] == fresh(session, messages, adapters=chosen)
        assert session.template is (own if name == "right" else template)
    session.use(None)
    session.reset()
    assert ask(session, "hello") == base
    assert len(set(said.values())) == 3
    with pytest.raises(AdapterError, match="adapter 'lift' is not attached; did you mean 'left'"):
        session.use("lift")


def test_ctrl_c_keeps_what_was_said_and_the_next_turn_is_right(session: ChatSession) -> None:
    whole = fresh(session, [user("hello")])
    Counter(session.model, strike_at=6)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        for piece in session.say("hello"):
            heard.append(piece)
    assert "".join(heard) == whole[:5]
    assert session.messages[-1]["content"] == whole[:5]
    messages = [*session.messages, user("go on")]
    assert ask(session, "go on") == fresh(session, messages)


def test_closing_the_stream_keeps_the_cache(session: ChatSession) -> None:
    stream = session.say("hello")
    heard = [next(stream) for _ in range(4)]
    stream.close()
    assert session.messages[-1]["content"] == "".join(heard)
    assert len(session._held) > 10
    messages = [*session.messages, user("go on")]
    assert ask(session, "go on") == fresh(session, messages)


def test_an_answer_without_text_is_not_remembered(session: ChatSession) -> None:
    session.settings = SETTINGS.changed(stop=(fresh(session, [user("hello")])[0],))
    assert ask(session, "hello") == ""
    assert session.messages == []


def test_beams_answer_too(session: ChatSession) -> None:
    session.settings = SETTINGS.changed(beams=3)
    assert ask(session, "hello") == fresh(session, [user("hello")])
    assert len(session.messages) == 2


def test_a_template_of_one_exchange_says_once_that_turns_stand_alone(chat_model, chat_tokenizer) -> None:
    single = get_template("Q: {instruction}\nA: {output}", chat_tokenizer)
    session = ChatSession(chat_model, chat_tokenizer, single, SETTINGS)
    first = ask(session, "hello")
    assert session.notices == []
    assert ask(session, "hello") == first
    ask(session, "hello")
    assert len(session.notices) == 1
    assert "every turn stands by itself" in session.notices[0]


def test_the_oldest_turns_go_where_the_context_is_short(twins_maker, chat_tokenizer, template) -> None:
    model = twins_maker(seed=4, scale=1.5, vocab=258, max_position_embeddings=300).ours
    session = ChatSession(model, chat_tokenizer, template, SETTINGS)
    session.messages = [m for i in range(4) for m in (user(f"{i}" * 20), {"role": "assistant", "content": "b" * 20})]
    session.messages[0]["content"] = "0" * 60
    kept = session.messages[2:]
    assert ask(session, "last") == fresh(session, [*kept, user("last")])
    assert any("oldest turns are left out" in line for line in session.notices)
    with pytest.raises(GenerationError, match="this conversation: .* tokens leave no room"):
        ask(session, "x" * 400)


def talk(session: ChatSession, typed: str) -> tuple[list[str], str]:
    """What piped input prints to stdout, line by line, and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    Terminal(session, io.StringIO(typed), out, err, interactive=False).run()
    return out.getvalue().splitlines(), err.getvalue()


def test_piped_input_is_answered_line_by_line(chat_model, chat_tokenizer, template) -> None:
    out, err = io.StringIO(), io.StringIO()
    typed = io.StringIO("hello\n\nmore")
    run_chat(chat_model, chat_tokenizer, template, settings=SETTINGS, stdin=typed, stdout=out, stderr=err)
    probe = ChatSession(chat_model, chat_tokenizer, template, SETTINGS)
    assert out.getvalue().splitlines() == [ask(probe, "hello"), ask(probe, "more")]
    assert "cut off after 20 tokens" in err.getvalue()
    assert "> " not in out.getvalue() + err.getvalue()


def test_messages_of_several_lines(session: ChatSession) -> None:
    talk(session, 'one\\\ntwo\n"""three\nfour"""\n"""\nfive\n\nsix\n"""\n//slash\nseven\\')
    said = [m["content"] for m in session.messages if m["role"] == "user"]
    assert said == ["one\ntwo", "three\nfour", "five\n\nsix", "/slash", "seven\n"]


def test_commands(session: ChatSession, tmp_path: Path) -> None:
    session.model.model.layers[0].self_attn.v_proj.edit["left"] = Shift(3.0)
    file = tmp_path / "talk.jsonl"
    typed = [
        "/help", "/settings temperature=0.7 top_p=0.9 seed=3 max_new_tokens=5", "/system be kind", "/adapter",
        "/adapter off", "hello", f"/save {file}", "/reset",
        "/settings stop=\\n\\n temperature=0 top_p=none", "/exit", "never read",
    ]  # fmt: skip
    out, err = talk(session, "\n".join(typed))
    assert len(out) == 1
    assert all(name in err for name in ("/adapter", "/system", "/reset", "/settings", "/save", "/exit"))
    assert "adapter: left\n" in err
    assert "adapter: off (the bare base); also attached: left" in err
    assert session.adapters == ()
    assert session.system == "be kind"
    assert session.messages == []
    assert session.settings == GenerationSettings(max_new_tokens=5, seed=3, stop=("\n\n",))
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"] == out[0]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/rest", "/rest: no such command; did you mean '/reset'?"),
        ("/settings temprature=1", "unknown setting 'temprature'; did you mean 'temperature'"),
        ("/settings temperature", "write name=value"),
        ("/settings temperature=hot", "'hot' is not a number"),
        ("/settings top_p=0.5", "top_p=0.5 has no effect with temperature=0"),
        ("/settings max_new_tokens=none top_k=-1", "top_k=-1: must be"),
        ("/save", "name a file"),
        ("/save {tmp}", "is there already"),
        ("/save {tmp}/x.jsonl", "nothing was said yet"),
        ("/adapter left", "adapter 'left' is not attached (attached: none)"),
    ],
)
def test_a_wrong_command_is_one_line_and_the_talk_goes_on(session: ChatSession, tmp_path: Path, typed, said) -> None:
    typed = typed.replace("{tmp}", str(tmp_path))
    with pytest.raises((GenerationError, AdapterError)) as error:  # piped: a script should stop
        talk(session, typed)
    assert said in str(error.value)
    out, err = io.StringIO(), io.StringIO()
    Terminal(session, io.StringIO(f"{typed}\nhello\n"), out, err, interactive=True).run()
    assert said in err.getvalue()
    assert len(out.getvalue().splitlines()) == 1


def test_ctrl_c_in_the_terminal_stops_the_answer_only(session: ChatSession) -> None:
    Counter(session.model, strike_at=4)
    out, err = talk(session, "hello\nmore\n")
    assert len(out) == 2
    assert len(out[0]) == 3
    assert len(out[1]) == 20
    assert "[stopped]" in err


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert visible("a\x1b[2Jb\tc\nd\x9b\u202e é漢") == "a\ufffd[2Jb\tc\nd\ufffd\ufffd é漢"


def test_history_and_taking_back(session: ChatSession) -> None:
    session.system = "be kind"
    out, err = talk(session, "/history\nhello\nmore\n/history\n/undo\n/reset\n")
    assert "nothing was said yet" in err
    assert f"system: be kind\nuser: hello\nassistant: {out[0]}\nuser: more\nassistant: {out[1]}\n" in err
    assert "taken back: more" in err
    with pytest.raises(GenerationError, match="/undo: nothing was said yet"):
        talk(session, "/undo\n")


def test_an_answer_after_taking_back_is_as_if_nothing_had_been_said(session: ChatSession) -> None:
    first = ask(session, "hello")
    ask(session, "more")
    assert session.undo() == "more"
    messages = [user("hello"), {"role": "assistant", "content": first}, user("other")]
    assert ask(session, "other") == fresh(session, messages)


def test_input_that_is_no_text_is_named(session: ChatSession) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"hello\n\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(DataError, match="stdin: is not UTF-8"):
        Terminal(session, stream, io.StringIO(), io.StringIO(), interactive=False).run()
