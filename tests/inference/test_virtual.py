"""Virtual tokens and edited prompts in use: what is generated, scored and said in a chat is what a full pass gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.inference.test_chat import ask, fresh, user
from tests.laws.small import build, disturb, logits_of, run_packs
from tests.tiny import words, write_rows
from torch import Tensor

from tunesmith.adapters import Adapter, attach
from tunesmith.data.encode import Example, encode_prompt
from tunesmith.data.pack import plan_packs
from tunesmith.data.schemas import chat_row
from tunesmith.data.templates import get_template
from tunesmith.export.probe import logits_at, make_probe
from tunesmith.files import sha256_file
from tunesmith.inference import ChatSession, GenerationSettings, generate
from tunesmith.inference.score import score_continuations
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.virtual import Needs

SPECS = {
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "prompt and infix": {"kind": "prompt", "virtual_tokens": 2, "infix_tokens": 3},
    "infix alone": {"kind": "prompt", "virtual_tokens": 0, "infix_tokens": 2},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "made prefix": {"kind": "prefix", "virtual_tokens": 3, "reparam": 4},
    "reft": {"kind": "reft", "first_positions": 3, "last_positions": 2},
    "tied reft": {"kind": "reft", "tied": True, "variant": "noreft"},
}
COMMAND = {  # settings of a run, and what acts
    "prompt": {"virtual_tokens": 4, "init_text": "good or bad?"},
    "prompt and infix": {"kind": "prompt", "virtual_tokens": 3, "infix_tokens": 2},
    "prefix": {"virtual_tokens": 4, "reparam": 8},
    "reft": {"rank": 3},
}
pytestmark = pytest.mark.usefixtures("single_thread")


def attached(model: Llama, *specs: dict) -> list[Adapter]:
    """These adapters, moved far enough that every one of them changes what is said."""
    made = [attach(model, spec, name) for spec, name in zip(specs, "abc", strict=False)]
    for seed, adapter in enumerate(made):
        disturb(adapter, seed, std=0.4)
    return made


def full_pass(model: Llama, prompt: list[int], answer: list[int], adapters: tuple[str, ...] | None = None) -> Tensor:
    """The logits after `answer`, without a cache and with nothing else in the row."""
    ids = np.array([*prompt, *answer], np.int32)
    example = Example(ids, np.arange(len(ids)) >= len(prompt), "")
    (pack,) = plan_packs([example], budget=1000, needs=model.needs(adapters))
    return logits_of(model, pack.tokens, pack.layout, adapters)[-1]


def greedy(model: Llama, prompt: list[int], count: int, adapters: tuple[str, ...] | None = None) -> list[int]:
    """The likeliest continuation, by one full pass a token."""
    answer: list[int] = []
    while len(answer) < count:
        answer.append(int(full_pass(model, prompt, answer, adapters).argmax()))
    return answer


@pytest.mark.parametrize("name", SPECS)
def test_generation_with_a_cache_is_the_argmax_of_full_passes(twins_maker, prompts: list[list[int]], name: str) -> None:
    model = twins_maker(seed=1).ours
    asked = [*prompts, prompts[0][:1], prompts[0][:2]]  # and some that are shorter than what ReFT edits
    bare = [list(r.ids) for r in generate(model, asked, GenerationSettings(max_new_tokens=12), eos_ids=())]
    attached(model, SPECS[name])
    found = [list(r.ids) for r in generate(model, asked, GenerationSettings(max_new_tokens=12), eos_ids=())]
    assert found == [greedy(model, prompt, 12) for prompt in asked]
    assert all(a != b for a, b in zip(found, bare, strict=True)), "it changes nothing"
    off = generate(model, asked, GenerationSettings(max_new_tokens=12), eos_ids=(), adapters=())
    assert [list(r.ids) for r in off] == bare


def test_all_of_them_together(twins_maker, prompts: list[list[int]]) -> None:
    """They stand before each other in the order of attachment; a window counts virtual tokens too."""
    model = twins_maker(kind="Mistral", sliding_window=9).ours
    attached(model, SPECS["prefix"], SPECS["prompt and infix"], SPECS["reft"])
    found = generate(model, prompts, GenerationSettings(max_new_tokens=6), eos_ids=())
    assert [list(r.ids) for r in found] == [greedy(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("name", SPECS)
def test_beams_and_sampling_do_not_depend_on_the_batch(twins_maker, prompts: list[list[int]], name: str) -> None:
    model = twins_maker(seed=4, scale=1.5).ours
    attached(model, SPECS[name])
    for settings in (
        GenerationSettings(max_new_tokens=6, beams=3),
        GenerationSettings(max_new_tokens=6, n=2, temperature=1.0, seed=5),
    ):
        together = generate(model, prompts, settings, eos_ids=(5, 17))
        alone = [r for prompt in prompts for r in generate(model, [prompt], settings, eos_ids=(5, 17))]
        assert [r.ids for r in together] == [r.ids for r in alone]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_scores_are_those_of_full_passes(twins, prompts: list[list[int]], name: str, share: bool) -> None:
    model = twins.ours
    adapter = attach(model, SPECS[name], "a")
    try:
        disturb(adapter, std=0.4)
        options = [[4, 9, 2], [4, 9, 7], [31], [8, 8]]
        scores = score_continuations(model, prompts, [options] * len(prompts), share_prefix=share, pack_tokens=120)
        for prompt, found in zip(prompts, scores, strict=True):
            for option, score in zip(options, found.tolist(), strict=True):
                steps = (full_pass(model, prompt, option[:i]).log_softmax(-1)[t] for i, t in enumerate(option))
                assert score == pytest.approx(float(sum(steps)), rel=1e-9)
    finally:
        for place in adapter.deltas:
            del model.get_submodule(place)["a"]


@pytest.mark.parametrize("name", SPECS)
def test_a_conversation_is_learned_as_it_is_said(twins_maker, name: str) -> None:
    """The loss of its three answers is that of each behind all that was said before it."""
    model = twins_maker().ours
    adapter = attached(model, SPECS[name])[0]
    draw = np.random.default_rng(2)
    ids, answers = draw.integers(0, 97, 40), ((9, 14), (20, 22), (30, 40))
    told = np.any([(np.arange(40) >= a) & (np.arange(40) < b) for a, b in answers], axis=0)
    packs = plan_packs([Example(ids.astype(np.int32), told, "")], budget=1000, needs=model.needs())
    assert sum(len(pack.tokens) for pack in packs) < 90, "what is alike is computed once"
    loss = run_packs(model, packs, adapter)[0]
    said = [score_continuations(model, [ids[:a].tolist()], [[ids[a:b].tolist()]])[0] for a, b in answers]
    assert loss == pytest.approx(-float(sum(said)) / told.sum(), rel=1e-10)


@pytest.mark.parametrize("name", SPECS)
def test_a_second_turn_is_a_fresh_pass(chat_model, chat_tokenizer, name: str) -> None:
    attached(chat_model, SPECS[name])
    template = get_template("chat", chat_tokenizer)
    session = ChatSession(chat_model, chat_tokenizer, template, GenerationSettings(max_new_tokens=12))
    for text in ("hello there, how are you?", "and now?", "and now?"):
        messages = [*session.messages, user(text)]
        expected = fresh(session, messages)
        assert ask(session, text) == expected
    ids = encode_prompt(chat_row(messages), template, chat_tokenizer)
    assert not torch.allclose(full_pass(chat_model, ids, []), full_pass(chat_model, ids, [], ()))
    session.use(None)
    messages = [*session.messages, user("again")]
    assert ask(session, "again") == fresh(session, messages, adapters=())


def test_infix_tokens_go_to_the_segments_of_their_adapter() -> None:
    """Two adapters with infix tokens in one row: each has its own, under the same ids."""
    model = build()
    first, second = SPECS["prompt and infix"], SPECS["infix alone"]
    attached(model, first, second)
    layouts = {}
    for name in "ab":
        example = Example(np.arange(5, 14, dtype=np.int32), np.arange(9) >= 6, "")
        (layouts[name],) = plan_packs([example], budget=100, needs=model.needs((name,)))
    tokens = torch.cat([layouts[name].tokens for name in "ab"])
    layout = Layout.of([len(layouts[name].tokens) for name in "ab"])
    with torch.no_grad():
        ctx = model.context(layout, routes=[("a",), ("b",)])
        mixed = model.logits(model.run(tokens, ctx), ctx)
    for start, name in zip(layout.starts, "ab", strict=True):
        alone = logits_of(model, layouts[name].tokens, layouts[name].layout, (name,))
        assert torch.allclose(mixed[start : start + len(alone)], alone, rtol=0, atol=1e-11)


def test_a_pack_keeps_its_budget_where_less_is_shared() -> None:
    """Eight prompts that begin with the same 40 tokens, of which the last 5 are edited: those are no longer shared."""
    some = [Example(np.array([*range(40), 50 + i], np.int32), np.arange(41) >= 40, "") for i in range(4)]
    some += [Example(np.array([*range(40), 41, 60 + i], np.int32), np.arange(42) >= 41, "") for i in range(4)]
    packs = plan_packs(some, budget=60, needs=Needs(ends=30))
    assert all(len(pack.tokens) <= 60 for pack in packs)
    assert len(packs) > len(plan_packs(some, budget=60)) == 1


@pytest.mark.parametrize(("name", "words"), [("infix alone", "infix"), ("reft", "last.bias"), ("reft", "first.bias")])
def test_verification_sees_what_acts_where_prompts_end(name: str, words: str) -> None:
    """A change of these alone changes the logits that a reloaded adapter is held against."""
    model = build()
    (adapter,) = attached(model, SPECS[name])
    probe = make_probe([list(range(3, 20)), [5, 6, 7], [9]])
    before = logits_at(model, probe, None)
    with torch.no_grad():
        next(p for key, p in adapter.trainable.items() if key.endswith(words)).add_(1.0)
    assert not torch.allclose(logits_at(model, probe, None), before)


@pytest.mark.parametrize("name", COMMAND)
def test_a_run_trains_generates_evaluates_and_verifies(
    command, in_process, tiny_base, tiny_reviews, tmp_path: Path, name: str
) -> None:
    settings = {f"adapter__{key}": value for key, value in COMMAND[name].items()}
    given = {"adapter__kind": name, "adapter__rank": None, "train__epochs": 3, "train__learning_rate": 0.03, **settings}
    code, out, err = command(
        "train",
        *words(tiny_base, tiny_reviews, tmp_path, evaluate__metrics=["accuracy"], evaluate__best="eval_loss", **given),
    )
    assert code == 0, err
    run = Path(out.strip())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    report = json.loads((run / "verify.json").read_text())
    assert report["ok"] and "equal bit for bit" in str(report)
    own = (run / "adapter" / "adapter.safetensors").is_file()
    assert own is (name in ("prompt and infix", "reft"))
    code, out, err = command("evaluate", run, "--split", "valid", "--json")
    assert code == 0, err
    best = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    found = json.loads(out)
    assert found["accuracy"] == best["accuracy"] and found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    code, out, err = command("generate", run, "--prompt", "A joy.", "--max-new-tokens", 4)
    assert code == 0, err
    assert command("verify", run)[0] == 0
    code, _, err = command("merge", run, "--out", tmp_path / "merged")
    assert code == 2 and "beside its base" in err
    code, out, err = command("inspect", run / "adapter")
    assert code == 0, err


def test_a_resumed_run_ends_with_the_same_bytes(command, in_process, tiny_base, tiny_reviews, tmp_path: Path) -> None:
    """A prefix that a network makes: the checkpoint keeps the network, the adapter only what it made."""
    settings = {"adapter__kind": "prefix", "adapter__rank": None, "adapter__virtual_tokens": 3, "adapter__reparam": 4}
    settings |= {"train__epochs": 2, "train__save_steps": 2, "train__keep_checkpoints": 9, "evaluate__samples": 0}
    given = words(tiny_base, tiny_reviews, tmp_path, **settings)
    assert command("train", *given)[0] == 0
    run = tmp_path / "run"
    whole = sha256_file(run / "adapter" / "adapter_model.safetensors")
    kept = load_file(run / "checkpoint-000002" / "adapter.safetensors")
    shared = [f"model.layers.0.self_attn.past.trunk.{part}" for part in ("bias", "down", "rows")]
    assert sorted(key for key in kept if "trunk" in key) == shared
    (run / "adapter").rename(tmp_path / "gone")
    for step in (4, 6):
        for file in (run / f"checkpoint-{step:06d}").iterdir():
            file.unlink()
        (run / f"checkpoint-{step:06d}").rmdir()
    code, _, err = command("train", "--resume", run)
    assert code == 0 and "resumed" in err, err
    assert sha256_file(run / "adapter" / "adapter_model.safetensors") == whole


@pytest.mark.parametrize("kind", ["prompt", "reft"])
def test_rows_without_prompts_are_refused(command, in_process, tiny_base, tiny_reviews, tmp_path, kind: str) -> None:
    more = {"adapter__infix_tokens": 2} if kind == "prompt" else {}
    given = {"adapter__kind": kind, "adapter__rank": None, **more}
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"some text number {i} of many"} for i in range(6)])
    code, _, err = command("train", *words(tiny_base, texts, tmp_path / "a", **given))
    assert code == 2 and f"{kind} acts where prompts end, and 6 of 6 rows have no prompt" in err
    code, _, err = command(
        "train", *words(tiny_base, tiny_reviews, tmp_path / "b", data__train_on_inputs=True, **given)
    )
    assert code == 2 and "24 of 24 rows have no prompt" in err
