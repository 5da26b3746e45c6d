"""Generation equals transformers', token by token, however the prompts are batched, shared and dropped."""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import AdapterError, GenerationError
from tunesmith.inference import GenerationSettings, generate, stream
from tunesmith.model.layout import Layout
from tunesmith.model.seam import Seam


def theirs(
    model: torch.nn.Module, prompt: list[int], eos: list[int] | None = None, **settings: object
) -> list[list[int]]:
    """The continuations that transformers generates for one prompt, EOS cut off."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=eos, pad_token_id=0, **settings)
    result = []
    for row in out[:, len(prompt) :].tolist():
        ends = [i for i, token in enumerate(row) if eos and token in eos]
        result.append(row[: ends[0]] if ends else row)
    return result


FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"kind": "Mistral", "sliding_window": 9},
    "qwen2": {"kind": "Qwen2"},
    "qwen3": {"kind": "Qwen3", "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(twins_maker, prompts: list[list[int]], family: str) -> None:
    pair = twins_maker(seed=1, **FAMILIES[family])
    results = generate(pair.ours, prompts, GenerationSettings(max_new_tokens=64), eos_ids=())
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.ids) == theirs(pair.theirs, prompt, max_new_tokens=64, do_sample=False)[0]
        assert result.finish_reason == "length"


def test_sequences_that_end_early_leave_the_batch(twins, prompts: list[list[int]]) -> None:
    plain = generate(twins.ours, prompts, GenerationSettings(max_new_tokens=40), eos_ids=())
    eos = [plain[0].ids[3], plain[1].ids[17], plain[3].ids[30]]  # each ends at another step
    sizes: list[int] = []
    forward = twins.ours.run
    twins.ours.run = lambda tokens, ctx: (sizes.append(len(tokens)), forward(tokens, ctx))[1]
    try:
        results = generate(twins.ours, prompts, GenerationSettings(max_new_tokens=40), eos_ids=eos)
    finally:
        del twins.ours.run
    for prompt, result in zip(prompts, results, strict=True):
        expected = theirs(twins.theirs, prompt, eos, max_new_tokens=40, do_sample=False)[0]
        assert list(result.ids) == expected
        assert result.finish_reason == ("eos" if len(expected) < 40 else "length")
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < len(prompts)
    assert sizes[0] < sum(map(len, prompts)) - 3 * 10  # the common beginning was computed once


def test_repetition_penalty_equals_transformers(twins, prompts: list[list[int]]) -> None:
    settings = GenerationSettings(max_new_tokens=40, repetition_penalty=1.6)
    for prompt, result in zip(prompts, generate(twins.ours, prompts, settings, eos_ids=()), strict=True):
        kwargs = {"max_new_tokens": 40, "do_sample": False}
        assert list(result.ids) == theirs(twins.theirs, prompt, repetition_penalty=1.6, **kwargs)[0]
        assert list(result.ids) != theirs(twins.theirs, prompt, **kwargs)[0]


def test_repetition_penalty_follows_its_row_when_others_leave(twins, prompts: list[list[int]]) -> None:
    settings = GenerationSettings(max_new_tokens=30, repetition_penalty=1.6)
    plain = generate(twins.ours, prompts, settings, eos_ids=())
    eos = [plain[0].ids[2], plain[1].ids[8]]
    for prompt, result in zip(prompts, generate(twins.ours, prompts, settings, eos_ids=eos), strict=True):
        expected = theirs(twins.theirs, prompt, eos, max_new_tokens=30, do_sample=False, repetition_penalty=1.6)
        assert list(result.ids) == expected[0]


@pytest.mark.parametrize("values", [{}, {"length_penalty": 0.0}, {"length_penalty": 2.0}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_equal_transformers(twins_maker, prompts: list[list[int]], beams: int, values: dict) -> None:
    pair = twins_maker(seed=4, scale=1.5)  # flat distributions: beams overtake each other
    settings = GenerationSettings(max_new_tokens=20, beams=beams, n=beams, **values)
    for eos in ([], [5], [5, 17, 60, 80, 81, 82], list(range(60))):
        results = generate(pair.ours, prompts, settings, eos_ids=eos)
        for i, prompt in enumerate(prompts):
            expected = theirs(
                pair.theirs, prompt, eos or None, max_new_tokens=20, do_sample=False, num_beams=beams,
                num_return_sequences=beams, early_stopping=False, **values,
            )  # fmt: skip
            assert [list(r.ids) for r in results[i * beams : (i + 1) * beams]] == expected


def test_beams_find_a_likelier_sequence_than_greedy(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=4, scale=1.5).ours

    def chance(prompt: list[int], ids: tuple[int, ...]) -> float:
        row = [*prompt, *ids]
        layout = Layout.single(len(row))
        logits = model.logits(model(torch.tensor(row), layout), model.context(layout)).log_softmax(-1)
        return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))

    greedy = generate(model, prompts, GenerationSettings(max_new_tokens=12), eos_ids=())
    beams = generate(model, prompts, GenerationSettings(max_new_tokens=12, beams=6), eos_ids=())
    gains = [chance(p, b.ids) - chance(p, g.ids) for p, g, b in zip(prompts, greedy, beams, strict=True)]
    assert sum(gains) > 0


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=4, scale=1.5).ours
    settings = GenerationSettings(max_new_tokens=30, temperature=1.0, top_p=0.95, seed=11)
    together = generate(model, prompts, settings, eos_ids=(3,))
    alone = [generate(model, [prompt], settings, eos_ids=(3,))[0] for prompt in prompts]
    assert together == alone
    assert together[1] == together[5]  # equal prompts, equal seeds
    other = generate(model, prompts, settings.changed(seed=12), eos_ids=(3,))
    assert all(a.ids != b.ids for a, b in zip(together, other, strict=True))
    unseeded = [generate(model, prompts[:1], settings.changed(seed=None), eos_ids=(3,))[0].ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    seeded = generate(model, prompts, settings, eos_ids=(3,), seeds=[12] * len(prompts))
    assert seeded == other


def test_n_answers_differ_and_do_not_depend_on_n(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=4, scale=1.5).ours
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=1)
    four = generate(model, prompts, settings.changed(n=4), eos_ids=())
    two = generate(model, prompts, settings.changed(n=2), eos_ids=())
    assert len(four) == 4 * len(prompts)
    assert len({r.ids for r in four[:4]}) == 4
    assert [four[4 * i + j] for i in range(len(prompts)) for j in range(2)] == two


def test_a_small_budget_splits_the_batch_without_changing_it(twins, prompts: list[list[int]]) -> None:
    settings = GenerationSettings(max_new_tokens=10)
    whole = generate(twins.ours, prompts, settings, eos_ids=())
    passes: list[int] = []
    forward = twins.ours.run
    twins.ours.run = lambda tokens, ctx: (passes.append(len(ctx.cache.lengths)), forward(tokens, ctx))[1]
    try:
        split = generate(twins.ours, prompts, settings, eos_ids=(), cache_bytes=100_000)
    finally:
        del twins.ours.run
    assert split == whole
    assert max(passes) < len(prompts)


def test_sharing_prefixes_changes_nothing(twins, prompts: list[list[int]]) -> None:
    settings = GenerationSettings(max_new_tokens=10)
    shared = generate(twins.ours, prompts, settings, eos_ids=(), logprobs=True)
    apart = generate(twins.ours, prompts, settings, eos_ids=(), logprobs=True, share_prefix=False)
    assert [r.ids for r in shared] == [r.ids for r in apart]
    for a, b in zip(shared, apart, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-6)


def test_logprobs_are_the_models_own(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=4, scale=1.5).ours
    settings = GenerationSettings(max_new_tokens=8, temperature=0.5, top_k=20, seed=0)
    result = generate(model, prompts[:1], settings, eos_ids=(), logprobs=True)[0]
    row = [*prompts[0], *result.ids]
    layout = Layout.single(len(row))
    chances = model.logits(model(torch.tensor(row), layout), model.context(layout)).log_softmax(-1)
    expected = [chances[len(prompts[0]) - 1 + i, token].item() for i, token in enumerate(result.ids)]
    assert result.logprobs == pytest.approx(expected, abs=1e-5)


def test_the_context_ends_an_answer_and_refuses_a_prompt_without_room(twins_maker) -> None:
    model = twins_maker(max_position_embeddings=32).ours
    result = generate(model, [[1] * 25, [1] * 4], GenerationSettings(max_new_tokens=20), eos_ids=())
    assert [len(r.ids) for r in result] == [7, 20]
    with pytest.raises(GenerationError, match="prompt 2: 32 tokens leave no room in the model's context of 32"):
        generate(model, [[1], [1] * 32], eos_ids=())
    windowed = twins_maker(kind="Mistral", sliding_window=8, max_position_embeddings=32).ours
    assert len(generate(windowed, [[1] * 40], GenerationSettings(max_new_tokens=3), eos_ids=())[0].ids) == 3


def test_bad_prompts_are_named(twins) -> None:
    with pytest.raises(GenerationError, match="prompt 2: holds no token"):
        generate(twins.ours, [[1], []], eos_ids=())
    with pytest.raises(GenerationError, match="prompt 1: token 97 is outside of the model's vocabulary of 97"):
        generate(twins.ours, [[97]], eos_ids=())
    with pytest.raises(GenerationError, match="2 seeds for 1 prompts"):
        generate(twins.ours, [[1]], eos_ids=(), seeds=[1, 2])
    with pytest.raises(GenerationError, match="stop strings need a tokenizer"):
        generate(twins.ours, [[1]], GenerationSettings(stop=("x",)), eos_ids=())
    with pytest.raises(AdapterError, match="adapter 'reveiws' is not attached"):
        generate(twins.ours, [[1]], eos_ids=(), adapters=("reveiws",))
    assert generate(twins.ours, [], eos_ids=()) == []


class Shift(torch.nn.Module):
    """An adapter that moves everything it edits."""

    def forward(self, value, host, ctx, given):
        return value + 0.5


def test_adapters_are_chosen_by_name(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=2).ours
    settings = GenerationSettings(max_new_tokens=8)
    base = generate(model, prompts, settings, eos_ids=())
    seam = model.model.layers[1].self_attn.q_proj.edit
    assert isinstance(seam, Seam)
    seam["shift"] = Shift()
    assert generate(model, prompts, settings, eos_ids=()) != base
    assert generate(model, prompts, settings, eos_ids=(), adapters=()) == base
    assert generate(model, prompts, settings, eos_ids=(), adapters=("shift",)) == generate(
        model, prompts, settings, eos_ids=()
    )
    with pytest.raises(AdapterError, match=r"'shfit' is not attached; did you mean 'shift'\? \(attached: shift\)"):
        generate(model, prompts, settings, eos_ids=(), adapters=("shfit",))


def test_dropout_is_off_while_generating_and_modes_come_back(twins_maker, prompts: list[list[int]]) -> None:
    model = twins_maker(seed=2).ours
    settings = GenerationSettings(max_new_tokens=8)
    base = generate(model, prompts, settings, eos_ids=())

    class Drop(torch.nn.Module):
        def forward(self, value, host, ctx, given):
            return torch.nn.functional.dropout(value, 0.9, self.training)

    model.model.layers[0].after_mlp["drop"] = Drop()
    model.train()
    model.model.layers[2].eval()
    assert generate(model, prompts, settings, eos_ids=()) == base
    assert model.training
    assert not model.model.layers[2].training
    pieces = stream(model, prompts, settings, eos_ids=())
    pieces.close()
    assert model.training


def test_streaming_leaves_gradients_to_the_consumer(twins, byte_tokenizer) -> None:
    for _ in stream(twins.ours, [[1, 2]], GenerationSettings(max_new_tokens=3), eos_ids=(), tokenizer=byte_tokenizer):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
