"""OpenAI's own client and LangChain's chat model, unchanged, streaming and not."""

from __future__ import annotations

import math
import os

import pytest
from tests.serve.conftest import KEY, LETTERS, SPECS

from tunesmith.inference import GenerationSettings, generate

os.environ["LANGSMITH_TRACING"] = "false"
openai = pytest.importorskip("openai", reason="NOT TESTED: pip install openai")
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def alone(live, model: str, settings: GenerationSettings, messages=TALK, prompt: str | None = None):
    """What `generate` answers by itself."""
    with live.engine.registry.using(model) as entry:
        ids = entry.chat(messages) if prompt is None else entry.text(prompt)
        return generate(entry.model, [ids], settings, eos_ids=entry.tokenizer.eos_ids, tokenizer=entry.tokenizer,
                        adapters=entry.seams)  # fmt: skip


def test_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-base", *sorted(SPECS)]
    assert client.models.retrieve("alpha").id == "alpha"
    with pytest.raises(openai.NotFoundError, match="did you mean 'alpha'"):
        client.models.retrieve("alpah")


@pytest.mark.parametrize("model", LETTERS)
def test_a_chat_is_answered_as_the_engine_does_alone(client, live, model) -> None:
    own = alone(live, model, GenerationSettings(max_new_tokens=9))[0]
    reply = client.chat.completions.create(model=model, messages=TALK, temperature=0, max_tokens=9)
    assert reply.choices[0].message.content == own.text and set(own.text) <= set(LETTERS[model])
    assert reply.choices[0].finish_reason == "length" and reply.object == "chat.completion"
    assert reply.usage.completion_tokens == 9
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9 and reply.model in (model, "tiny-base")
    pieces = list(
        client.chat.completions.create(
            model=model,
            messages=TALK,
            temperature=0,
            max_completion_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == own.text
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage.total_tokens == reply.usage.total_tokens and pieces[-1].choices == []
    assert len([p for p in pieces if p.choices and p.choices[0].delta.content]) == 9, "a token at a time"


def test_several_answers_are_drawn_as_by_generate(client, live) -> None:
    settings = GenerationSettings(max_new_tokens=8, temperature=0.9, top_p=0.8, n=3, seed=7)
    own = [answer.text for answer in alone(live, "base", settings)]
    asked = {"model": "base", "messages": TALK, "max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "n": 3, "seed": 7}
    reply = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in reply.choices] == own and len(set(own)) > 1
    assert reply.usage.completion_tokens == 24
    texts = ["", "", ""]
    for piece in client.chat.completions.create(**asked, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert texts == own


def test_greedy_takes_what_clients_send_with_it(client) -> None:
    reply = client.chat.completions.create(
        model="alpha", messages=TALK, temperature=0, top_p=0.9, n=2, max_tokens=4, presence_penalty=0, user="me",
        response_format={"type": "text"}, extra_body={"top_k": 3},
    )  # fmt: skip
    assert reply.choices[0].message.content == reply.choices[1].message.content


def test_a_stop_string_ends_it_and_is_cut_off(client, live) -> None:
    whole = alone(live, "base", GenerationSettings(max_new_tokens=12))[0].text
    stop = whole[4:6]
    reply = client.chat.completions.create(model="base", messages=TALK, temperature=0, max_tokens=12, stop=[stop, "zz"])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == whole[: whole.index(stop)]


def test_tokens_are_told_with_their_chances(client) -> None:
    asked = {"model": "beta", "messages": TALK, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    told = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(told) == 5
    for each in told:
        assert bytes(each.bytes).decode() == each.token and each.logprob == each.top_logprobs[0].logprob
        assert each.token == each.top_logprobs[0].token and len(each.top_logprobs) == 3
        assert sum(math.exp(one.logprob) for one in each.top_logprobs) <= 1 + 1e-5
    streamed = [
        each
        for piece in client.chat.completions.create(**asked, stream=True)
        if piece.choices[0].logprobs
        for each in piece.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in told]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in told], abs=1e-4)


def test_plain_completions_of_texts_and_tokens(client, live) -> None:
    own = alone(live, "gamma", GenerationSettings(max_new_tokens=6), prompt="Dear")[0].text
    ids = live.engine.registry.tokenizer.encode("Dear")
    for prompt in ("Dear", ids, ["Dear"], [ids]):
        reply = client.completions.create(model="gamma", prompt=prompt, temperature=0, max_tokens=6)
        assert [choice.text for choice in reply.choices] == [own]
    reply = client.completions.create(model="gamma", prompt=["Dear", "Oh"], temperature=1, seed=3, n=2, logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert all(len(choice.text) == 16 for choice in reply.choices), "OpenAI's default length"
    told = reply.choices[0].logprobs
    assert "".join(told.tokens) == reply.choices[0].text and len(told.token_logprobs) == 16
    assert told.text_offset == list(range(16)) and len(told.top_logprobs[0]) == 2
    pieces = client.completions.create(model="gamma", prompt="Dear", temperature=0, max_tokens=6, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == own


def test_errors_are_openais(client, live) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="../../etc/passwd", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="messages.*field 'content' is empty"):
        client.chat.completions.create(model="alpha", messages=[{"role": "user", "content": ""}])
    with pytest.raises(openai.BadRequestError, match="must end with the user"):
        client.chat.completions.create(model="alpha", messages=[*TALK, {"role": "assistant", "content": "So."}])
    with pytest.raises(openai.BadRequestError, match="leave no room in the model's context"):
        client.completions.create(model="alpha", prompt=[5] * 512, stream=True)
    with pytest.raises(openai.BadRequestError, match="outside of the model's vocabulary"):
        client.completions.create(model="alpha", prompt=[5, 100_000])
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong" * 4, max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
    assert live.settled()


def test_history_goes_through_the_template(client, live) -> None:
    talk = [
        *TALK,
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    plain = [*talk[:3], {"role": "user", "content": "And?"}]
    own = alone(live, "delta", GenerationSettings(max_new_tokens=7), plain)[0].text
    reply = client.chat.completions.create(model="delta", messages=talk, temperature=0, max_tokens=7)
    assert reply.choices[0].message.content == own
    again = client.chat.completions.create(model="delta", messages=talk, temperature=0, max_tokens=7)
    assert again.choices[0].message.content == own
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 1


def test_langchains_chat_model(live) -> None:
    chat = pytest.importorskip("langchain_openai", reason="NOT TESTED: pip install langchain-openai").ChatOpenAI
    for model in ("alpha", "base"):
        own = alone(live, model, GenerationSettings(max_new_tokens=6))[0].text
        made = chat(model=model, base_url=f"{live.url}/v1", api_key=KEY, temperature=0, max_tokens=6, max_retries=0)
        talk = [("system", "Be brief."), ("human", "Say something.")]
        answer = made.invoke(talk)
        assert answer.content == own and answer.usage_metadata["output_tokens"] == 6
        pieces = list(made.stream(talk))
        assert "".join(piece.content for piece in pieces) == own and len(pieces) > 5
        assert [reply.content for reply in made.batch([talk, talk])] == [own, own]
