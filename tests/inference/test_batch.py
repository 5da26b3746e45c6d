"""A running batch: whoever comes and goes, every answer is the one that its prompt gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tests.laws.small import VOCAB, build, disturb

from tunesmith.adapters import attach
from tunesmith.adapters.bank import Bank
from tunesmith.errors import GenerationError
from tunesmith.inference import Generation, GenerationSettings, generate
from tunesmith.inference.answers import Job
from tunesmith.inference.batch import Ask, RunningBatch, Said
from tunesmith.inference.prefixes import LEAST, PrefixCache
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.slots import SlotCache

SPECS = {
    "neck": {"kind": "bottleneck"},
    "gate": {"kind": "llama_adapter"},
    "soft": {"kind": "prompt"},
    "pre": {"kind": "prefix"},
    "rep": {"kind": "reft"},
    "scale": {"kind": "ia3"},
}
BANKED = ("one", "two", "three")
ROUTES = [(), *((name,) for name in (*SPECS, *BANKED))]


@pytest.fixture(scope="module")
def model() -> Llama:
    """A small model in float32 with adapters of many kinds and a bank, all moved away from their start."""
    made = build(dtype=torch.float32)
    for number, (name, spec) in enumerate(SPECS.items()):
        disturb(attach(made, spec, name=name, seed=number), seed=number, std=0.5)
    bank = Bank(made)
    for number, name in enumerate(BANKED):
        adapter = attach(made, {"kind": "lora", "rank": 2 + number}, name=name, seed=number)
        disturb(adapter, seed=10 + number, std=0.5)
        bank.add(adapter)
    return made


def prompts(count: int, seed: int = 5, begin: int = 20) -> list[list[int]]:
    """Ragged prompts that mostly begin alike."""
    draw = random.Random(seed)
    common = [draw.randrange(VOCAB) for _ in range(begin)]
    tails = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 17))] for _ in range(count)]
    return [tail if i % 5 == 3 else common + tail for i, tail in enumerate(tails)]


def ask(model: Llama, prompt: Sequence[int], names: tuple[str, ...], n: int = 1, key: object = None, **values) -> Ask:
    """A question with settings; tokens 7 and 11 end an answer."""
    settings = GenerationSettings(**{"max_new_tokens": 12, **values})
    return Ask(prompt, Job(model, settings, frozenset({7, 11}), None, names), n, key=key)


def alone(one: Ask) -> list[Generation]:
    """The answers that the prompt gets by itself."""
    job = one.job
    settings = job.settings.changed(n=one.n) if one.n > 1 else job.settings
    asked = (tuple(one.prompt), settings, job.eos, job.adapters)
    if asked not in ALONE:
        ALONE[asked] = generate(job.model, [one.prompt], settings, eos_ids=job.eos, adapters=job.adapters)
    return ALONE[asked]


ALONE: dict[tuple, list[Generation]] = {}  # there is one model


def work(batch: RunningBatch, arriving: list[list[Ask]]) -> dict[int, dict[int, Said]]:
    """Let asks arrive step by step, first come, first served, and return every answer's last word."""
    waiting: list[Ask] = []
    ended: dict[int, dict[int, Said]] = {}
    schedule = iter(arriving)
    while True:
        more = next(schedule, None)
        waiting += more or []
        if more is None and not waiting and not batch.rows:
            return ended
        said = batch.step()
        if some := batch.fitting(waiting):
            said += batch.admit(some)
            waiting = waiting[len(some) :]
        assert len(batch.rows) <= batch.most and batch.cache.batch == len(batch.rows)
        for each in said:
            if each.result is not None or each.fault:
                ended.setdefault(id(each.ask), {})[each.number] = each


def schedule(model: Llama, key: bool = False) -> list[list[Ask]]:
    """Fourteen steps at which questions come, or none: of all routes, greedy and drawn, n from 1 to 3."""
    draw = random.Random(1)
    found: list[list[Ask]] = []
    texts = iter(prompts(100))
    for _ in range(14):
        some = []
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            names = draw.choice(ROUTES)
            chance = {"temperature": 0.8, "seed": draw.randrange(99)} if draw.random() < 0.5 else {}
            chance |= {"repetition_penalty": 1.3} if draw.random() < 0.3 else {}
            n = draw.choice([1, 2, 3]) if "temperature" in chance else 1
            length = draw.choice([1, 2, 5, 12, 20])
            some.append(ask(model, next(texts), names, n, names if key else None, max_new_tokens=length, **chance))
        found.append(some)
    return found


@pytest.mark.parametrize("most", [3, 32])
def test_every_answer_is_the_one_its_prompt_gets_alone(model, most) -> None:
    arriving = schedule(model)
    asks = [one for some in arriving for one in some]
    assert len({one.adapters for one in asks}) >= 8
    batch = RunningBatch(model, most=most, prefix_bytes=0)
    ended = work(batch, arriving)
    for one in asks:
        got = [ended[id(one)][number].result for number in range(one.n)]
        assert [g.ids for g in got] == [g.ids for g in alone(one)], one.adapters
        assert [g.finish_reason for g in got] == [g.finish_reason for g in alone(one)]
    assert batch.cache.bytes == 0 and batch.cache.batch == 0


def test_known_beginnings_change_nothing(model) -> None:
    arriving = [*schedule(model, key=True), *schedule(model, key=True)]
    batch = RunningBatch(model, most=8)
    ended = work(batch, arriving)
    known = {one.adapters: 0 for some in arriving for one in some}
    for one in (one for some in arriving for one in some):
        got = [ended[id(one)][number] for number in range(one.n)]
        assert [g.result.ids for g in got] == [g.ids for g in alone(one)], one.adapters
        known[one.adapters] += got[0].known
    assert known["rep",] == 0, "what an end of a prompt became is no beginning"
    assert sum(known.values()) == batch.prefixes.hits > 100 and known["soft",] and known["pre",] and known["one",]
    assert 0 < batch.prefixes.bytes <= batch.prefixes.limit
    batch.prefixes.forget(("one",))
    assert batch.prefixes.find(("one",), prompts(1)[0]) is None
    batch.clear()
    assert batch.prefixes.bytes == 0 and len(batch.prefixes) == 0


def test_a_wrong_key_would_show(model) -> None:
    """Prompts of different adapters under one key are answered otherwise: the test above bites."""
    first, second = prompts(2)
    batch = RunningBatch(model)
    one, two = ask(model, first, ("one",), key="x"), ask(model, second, ("neck",), key="x")
    ended = work(batch, [[one], [two]])
    assert ended[id(two)][0].known >= LEAST
    assert ended[id(two)][0].result.ids != alone(two)[0].ids


def test_who_is_dropped_leaves_room_and_the_others_alone(model) -> None:
    asks = [ask(model, prompt, route, max_new_tokens=20) for prompt, route in zip(prompts(6), ROUTES, strict=False)]
    asks = [Ask(one.prompt, Job(model, one.job.settings, frozenset(), None, one.adapters)) for one in asks]
    batch = RunningBatch(model)
    batch.admit(asks)
    said = batch.step()
    batch.drop([asks[0], asks[3], asks[5]])
    assert len(batch.rows) == batch.cache.batch == 3
    got: dict[int, Generation] = {}
    while batch.rows:
        got |= {id(each.ask): each.result for each in batch.step() if each.result}
    assert said and got.keys() == {id(asks[i]) for i in (1, 2, 4)}
    assert all(got[id(asks[i])].ids == alone(asks[i])[0].ids for i in (1, 2, 4))


def test_what_is_not_finite_stays_in_its_row(model) -> None:
    """An adapter that computes NaN ends its own answers; the slot that it leaves gives the next one nothing of it."""
    sick = attach(model, {"kind": "lora"}, name="sick")
    try:
        batch = RunningBatch(model)
        well = [ask(model, prompt, (), max_new_tokens=20) for prompt in prompts(2)]
        ill = ask(model, prompts(3)[2], ("sick",), max_new_tokens=20)
        batch.admit([well[0], ill])
        with torch.no_grad():
            next(iter(sick.trainable.values())).fill_(torch.nan)
        said = batch.step()
        faults = [each for each in said if each.fault]
        assert [each.ask for each in faults] == [ill] and "not finite" in faults[0].fault
        batch.admit([well[1]])
        got: dict[int, Generation] = {}
        while batch.rows:
            got |= {id(each.ask): each.result for each in batch.step() if each.result}
        for one in well:
            assert got[id(one)].ids == alone(one)[0].ids
        assert [each.fault for each in batch.admit([ill])] == [faults[0].fault]
    finally:
        from tunesmith.adapters import detach

        detach(model, sick)


def test_tokens_are_told_with_their_chances(model, byte_tokenizer) -> None:
    """Log-probabilities are those of the full forward; a stop string takes its tokens back."""
    wide = build(dtype=torch.float32, config=_bytes())
    settings = GenerationSettings(max_new_tokens=8)
    free = generate(wide, [[1, 2, 3]], settings, eos_ids=(), tokenizer=byte_tokenizer)[0]
    text = byte_tokenizer.decode(free.ids)
    for stop in ((), (text[3:5],)):
        job = Job(wide, settings.changed(stop=stop), frozenset(), byte_tokenizer, (), logprobs=True)
        batch = RunningBatch(wide)
        said = batch.admit([Ask([1, 2, 3], job, likeliest=4)])
        while batch.rows:
            said += batch.step()
        told = [told for each in said for told in each.tokens]
        result = said[-1].result
        assert tuple(each.token for each in told) == result.ids == free.ids[: len(result.ids)]
        assert (len(result.ids) < 8) == bool(stop)
        row = torch.tensor([1, 2, 3, *result.ids])
        with torch.no_grad():
            ctx = wide.context(Layout.single(len(row)))
            chances = wide.logits(wide.run(row, ctx), ctx)[2:-1].log_softmax(-1)
        best = chances.topk(4)
        for place, each in enumerate(told):
            assert each.logprob == pytest.approx(float(chances[place, each.token]), abs=1e-5)
            assert [token for token, _ in each.likeliest] == best.indices[place].tolist()
            assert [chance for _, chance in each.likeliest] == pytest.approx(best.values[place].tolist(), abs=1e-5)


def _bytes():
    """A model whose tokens are printable ASCII, for ByteTokenizer."""
    from dataclasses import replace

    from tests.laws.small import TINY

    return replace(TINY, vocab_size=127)


def test_what_never_fits_is_refused_with_the_sizes(model) -> None:
    batch = RunningBatch(model, most=4, cache_bytes=50_000)
    batch.check(ask(model, [1, 2], (), 4))
    with pytest.raises(GenerationError, match="5 answers of up to 14 tokens.*room for 4 answers"):
        batch.check(ask(model, [1, 2], (), 5))
    with pytest.raises(GenerationError, match="need .* MiB of keys and values"):
        batch.check(ask(model, [1, 2], (), 1, max_new_tokens=100_000))


def test_memory_stays_within_its_budget(model) -> None:
    """Long and short answers together never take more keys and values than were allowed."""
    draw = random.Random(2)
    batch = RunningBatch(model, most=8, cache_bytes=60 * batch_token(model), prefix_bytes=0)
    asks = [ask(model, p[:20], (), max_new_tokens=draw.choice([1, 8, 30])) for p in prompts(20)]
    waiting, peak = list(asks), 0
    while waiting or batch.rows:
        batch.step()
        some = batch.fitting(waiting)
        batch.admit(some)
        waiting = waiting[len(some) :]
        peak = max(peak, batch.cache.bytes)
    assert 0 < peak <= 60 * batch_token(model)


def batch_token(model: Llama) -> int:
    """Bytes of one token's keys and values."""
    config = model.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_slots_hold_what_a_plain_cache_holds(model) -> None:
    """Joining, leaving and growing move keys and values unchanged, and leave nothing behind."""
    config = model.config
    draw = torch.Generator().manual_seed(0)
    slots, plain = SlotCache(config, torch.float32), []
    names = iter(range(100))
    for step in range(40):
        if plain and step % 3 == 2:
            row = int(torch.randint(len(plain), (1,), generator=draw))
            slots.leave(row)
            plain[row] = plain[-1]
            plain.pop()
        else:
            length = int(torch.randint(1, 30, (1,), generator=draw))
            one = Cache(config, 1, length, torch.float32)
            for store in (*one.keys, *one.values):
                store.normal_(generator=draw)
            one.lengths, one.virtual = [length], [next(names)]
            slots.join(one, 0)
            plain.append(one)
        assert slots.lengths == [one.lengths[0] for one in plain]
        assert slots.virtual == [one.virtual[0] for one in plain]
        for row, one in enumerate(plain):
            for mine, theirs in zip((*slots.keys, *slots.values), (*one.keys, *one.values), strict=True):
                assert torch.equal(mine[row, :, : one.lengths[0]], theirs[0])
                assert not mine[row, :, one.lengths[0] :].any()
        assert all(not store[len(plain) :].any() for stores in slots._stores for store in stores)
    slots.clear()
    assert slots.bytes == 0 and slots.batch == 0


def test_the_least_recently_used_prompt_goes_first(model) -> None:
    config = model.config
    cache = Cache(config, 1, 1000, torch.float32)
    size = 40 * batch_token(model)
    held = PrefixCache(2 * size)
    cache.lengths = [40]
    texts = [[number] * 40 for number in range(3)]
    held.put("a", texts[0], cache, 0)
    held.put("a", texts[1], cache, 0)
    assert held.find("a", [*texts[0], 1]) is not None and held.bytes == 2 * size
    held.put("a", texts[2], cache, 0)
    assert [held.find("a", [*text, 1]) is not None for text in texts] == [True, False, True]
    assert held.find("b", [*texts[0], 1]) is None
    longer = [*texts[2], *([5] * 20)]
    cache.lengths = [60]
    held.put("a", longer, cache, 0)
    found = held.find("a", longer)
    assert found is not None and found[1] == 59 and held.bytes <= held.limit
    cache.lengths = [1000]
    held.put("a", [9] * 1000, cache, 0)
    assert held.find("a", [9] * 1000) is None, "larger than all there is room for"
