"""The engine without HTTP: the right adapter for each, bounds, cancellation, adapters that come and go."""

from __future__ import annotations

import queue
import shutil
import threading
import time

import pytest
import torch
from tests.serve.conftest import LETTERS, LORA, SPECS, make_registry, write_adapter

from tunesmith import api
from tunesmith.adapters import attach
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.errors import AdapterError, GenerationError, RequestError, TunesmithError
from tunesmith.inference import GenerationSettings, generate
from tunesmith.inference.batch import Said
from tunesmith.inference.prefill import attached_adapters
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.registry import Registry, model_name

pytestmark = pytest.mark.usefixtures("single_thread")
USER = [{"role": "user", "content": "Say something."}]
GREEDY = GenerationSettings(max_new_tokens=12)


def said(engine: Engine, model: str, messages=USER, settings: GenerationSettings = GREEDY) -> str:
    return "".join(piece.text for piece in engine.say(model, messages, settings))


def put(engine: Engine, model: str, tokens: int = 12, **more):
    """Submit without waiting; returns the ticket and its events."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    with engine.registry.using(model) as entry:
        settings = GenerationSettings(max_new_tokens=tokens)
        ticket = engine.submit(entry, engine.ask(entry, entry.chat(USER), settings, **more), events.put)
    return ticket, events


def ending(events: queue.SimpleQueue) -> Said | TunesmithError:
    while True:
        event = events.get(timeout=20)
        if isinstance(event, TunesmithError) or event.result is not None:
            return event


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def test_each_model_says_what_its_adapter_says(engine) -> None:
    for name in LETTERS:
        text = said(engine, name)
        assert len(text) == 12 and set(text) <= set(LETTERS[name])
    assert said(engine, "base") == said(engine, "tiny-base")


def test_together_they_say_what_they_say_alone(engine) -> None:
    """Greedy answers in a mixed batch equal, token for token, `generate` on the adapter alone, in float32."""
    talks = [[{"role": "user", "content": f"Question {i}: {'why ' * (i % 5)}?"}] for i in range(5)]
    asked = [(name, talk) for talk in talks for name in (*SPECS, "base")]
    tickets = []
    for name, talk in asked:
        events: queue.SimpleQueue = queue.SimpleQueue()
        with engine.registry.using(name) as entry:
            ask = engine.ask(entry, entry.chat(talk), GREEDY)
            engine.submit(entry, ask, events.put)
        tickets.append((ask, events))
    results = [ending(events).result for _, events in tickets]
    until(lambda: not engine.batch.rows)
    model, eos = engine.registry.model, engine.registry.tokenizer.eos_ids
    for (ask, _), result in zip(tickets, results, strict=True):
        own = generate(model, [ask.prompt], GREEDY, eos_ids=eos, tokenizer=engine.registry.tokenizer,
                       adapters=ask.adapters)[0]  # fmt: skip
        assert result.ids == own.ids and result.text == own.text
    assert len({result.ids for result in results}) > 8


def test_templates_travel_with_their_adapters(engine) -> None:
    with engine.registry.using("alpha") as chat, engine.registry.using("beta") as alpaca:
        assert "<|im_start|>" in chat.tokenizer.decode(chat.chat(USER), skip_special=False)
        assert "### Response:" in alpaca.tokenizer.decode(alpaca.chat(USER), skip_special=False)


def test_closing_an_answer_frees_its_slots(engine) -> None:
    talk = engine.say("alpha", USER, GenerationSettings(max_new_tokens=400))
    assert next(talk).text
    assert len(engine.batch.rows) == 1 and engine.batch.cache.bytes
    talk.close()
    until(lambda: not engine.batch.rows)
    assert engine.batch.cache.bytes == 0 and engine.inside == 0


def test_a_cancelled_ticket_leaves_in_the_same_turn(registry) -> None:
    """Driven by hand: cancelled before a turn, its slot is gone when the next step is made; so is one that waits."""
    engine = Engine(registry, Limits(answers=8, waiting=8))
    engine._thread = threading.current_thread()  # so that it counts as alive, and nobody else turns it
    tickets = [put(engine, "alpha", 400)[0] for _ in range(10)]
    engine._turn()
    assert len(engine.batch.rows) == 8 == len(engine.batch.cache.lengths)
    engine.cancel(tickets[2])
    engine.cancel(tickets[9])
    seen = []
    step = engine.batch.step
    engine.batch.step = lambda: seen.append([row.ask for row in engine.batch.rows]) or step()  # type: ignore[method-assign, func-returns-value]
    engine._turn()
    assert tickets[2].ask not in seen[0] and len(seen[0]) == 7
    asks = [row.ask for row in engine.batch.rows]
    assert tickets[8].ask in asks and tickets[9].ask not in asks and engine.waiting == 0


def test_who_is_too_many_is_turned_away(engine) -> None:
    most = engine.limits.answers + engine.limits.waiting
    with engine.seats(most):
        with pytest.raises(RequestError, match="try again later") as told, engine.seats():
            pass
        assert told.value.status == 429
    with engine.seats():
        pass


def test_waiting_and_answering_have_an_end(registry) -> None:
    engine = Engine(registry, Limits(answers=8, queue_seconds=0.05, request_seconds=0.4)).start()
    try:
        running = [put(engine, "alpha", 100_000, n=1) for _ in range(8)]
        until(lambda: len(engine.batch.rows) == 8)
        _, events = put(engine, "beta")
        late = ending(events)
        assert isinstance(late, RequestError) and late.status == 503 and "waited longer" in str(late)
        ends = [ending(events) for _, events in running]
        timed = [end for end in ends if isinstance(end, RequestError)]
        assert all(end.status == 504 and "not finished within 0.4 s" in str(end) for end in timed)
        assert len(timed) == 8 or all(len(end.result.ids) > 100 for end in ends if isinstance(end, Said))
        until(lambda: not engine.batch.rows and not engine._running)
    finally:
        engine.close()


def test_what_never_fits_is_refused_at_once(registry) -> None:
    engine = Engine(registry, Limits(answers=8, cache_bytes=1 << 16)).start()
    try:
        answer = ending(put(engine, "alpha", 400)[1])
        assert isinstance(answer, GenerationError) and "MiB of keys and values" in str(answer)
        assert ending(put(engine, "alpha", 4)[1]).result is not None
    finally:
        engine.close()


def test_an_error_that_nobody_foresaw_ends_its_requests_only(engine, monkeypatch, caplog) -> None:
    real = engine.batch.admit

    def admit(asks):
        if any(ask.adapters == beta for ask in asks):
            raise MemoryError("planted")
        return real(asks)

    with engine.registry.using("beta") as entry:
        beta = entry.seams
    monkeypatch.setattr(engine.batch, "admit", admit)
    slow, events = put(engine, "alpha", 200)
    until(lambda: slow.began)
    failed = ending(put(engine, "beta")[1])
    assert isinstance(failed, RequestError) and failed.status == 500 and "planted" in caplog.text
    assert len(ending(events).result.ids) == 200, "the other one went on"
    assert engine.alive and said(engine, "gamma")
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    assert isinstance(ending(put(engine, "alpha")[1]), RequestError)
    monkeypatch.undo()
    assert set(said(engine, "alpha")) <= set(LETTERS["alpha"])


def test_closing_tells_everyone(registry) -> None:
    engine = Engine(registry, Limits(answers=8)).start()
    waiting = [put(engine, "alpha", 400)[1] for _ in range(12)]
    engine.close()
    assert all(isinstance(ending(events), RequestError) for events in waiting) and not engine.alive
    with pytest.raises(RequestError, match="stopping"):
        put(engine, "alpha")


def test_adapters_are_replaced_and_removed_under_way(base, adapters, tmp_path) -> None:
    """What began with a version ends with it; what was read with it is forgotten; nothing is left in the seams."""
    folder = tmp_path / "own"
    shutil.copytree(adapters / "alpha", folder / "alpha")
    shutil.copytree(adapters / "delta", folder / "delta")
    registry = make_registry(base, folder, ("alpha", "delta"))
    engine = Engine(registry, Limits(answers=8)).start()
    try:
        old = {name: put(engine, name, 300) for name in ("alpha", "delta")}
        until(lambda: all(ticket.began for ticket, _ in old.values()))
        loaded = api.load(base, dtype="float32", device="cpu")
        for name in old:
            shutil.rmtree(folder / name)
            write_adapter(folder / name, loaded, SPECS[name][0], "chat", "xy", 9)
            assert engine.call(lambda name=name: registry.add(name)).result(20).version == 2
        assert registry.retired == 2
        assert set(said(engine, "alpha")) <= set("xy") and set(said(engine, "delta")) <= set("xy")
        for name, (_, events) in old.items():
            assert set(ending(events).result.text) <= set(LETTERS[name])
        until(lambda: registry.retired == 0)
        assert len(attached_adapters(registry.model)) == 2
        until(lambda: {held.key[2] for held in [*engine.batch.prefixes._held.values()]} <= {2})
        engine.call(lambda: registry.remove("alpha")).result(20)
        with pytest.raises(RequestError, match="there is no model 'alpha'"):
            said(engine, "alpha")
        engine.call(lambda: registry.remove("delta")).result(20)
        until(lambda: registry.retired == 0)
        assert attached_adapters(registry.model) == [] and registry.bank.members == []
    finally:
        engine.close()


def test_a_name_is_a_name_and_leads_nowhere_else(registry, adapters, tmp_path) -> None:
    (adapters.parent / "outside").mkdir(exist_ok=True)
    shutil.copytree(adapters / "alpha", adapters.parent / "outside" / "secret", dirs_exist_ok=True)
    link = adapters / "link"
    link.symlink_to(adapters.parent / "outside" / "secret")
    try:
        for name in ("../../etc/passwd", "../outside/secret", "..", ".", "", "a/b", "/etc", "a\x00b", "x" * 65):
            with pytest.raises(RequestError, match="cannot be a model's name"):
                registry.add(name)
        with pytest.raises(RequestError, match="holds no 'link'"):
            registry.add("link")
        assert "link" not in registry.loadable() and set(SPECS) <= set(registry.loadable())
    finally:
        link.unlink()
    with pytest.raises(RequestError, match="holds no 'alpah'; did you mean 'alpha'"):
        registry.add("alpah")
    with pytest.raises(RequestError, match="is the base"):
        registry.add("base")
    registry.folder = None
    with pytest.raises(RequestError, match="loads no adapters while it runs"):
        registry.add("alpha")


def test_what_cannot_be_routed_is_refused_with_the_reason(base, tmp_path) -> None:
    """A method that trains base weights would act on everybody's requests; the base is as it was after the refusal."""
    loaded = api.load(base, dtype="float32", device="cpu")
    adapter = attach(loaded.model, {"kind": "norms"}, "made")
    with torch.no_grad():
        next(iter(adapter.base.values())).add_(1.0)
    (tmp_path / "norms").mkdir()
    save_adapter(tmp_path / "norms", adapter, base=str(base), identity=loaded.identity)
    registry = make_registry(base, tmp_path, ())
    before = {name: p.clone() for name, p in registry.model.named_parameters()}
    with pytest.raises(AdapterError, match=r"\(norms\) trains weights of the base itself.*merge it"):
        registry.add("norms")
    assert all(torch.equal(p, before[name]) for name, p in registry.model.named_parameters())
    assert not any(p.requires_grad for p in registry.model.parameters())
    assert [entry.name for entry in registry.entries] == ["tiny-base"]


def test_another_bases_adapter_is_refused(adapters, tiny_base) -> None:
    with pytest.raises(AdapterError, match="for another base"):
        make_registry(tiny_base, adapters, ("alpha",))


@pytest.mark.parametrize(
    ("given", "name"),
    [("smollm2-135m-instruct", "smollm2-135m-instruct"), ("/x/y/Tiny Model.gguf", "Tiny-Model"), ("org/Name", "Name")],
)
def test_a_base_is_called_by_its_last_name(given, name) -> None:
    assert model_name(given) == name


def test_plain_lora_shares_a_bank(registry: Registry) -> None:
    assert len(registry.bank.members) == 2 and LORA["kind"] == "lora"
