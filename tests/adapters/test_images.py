"""Methods that look at images: transformers' CLIP put together by hand, counts, starts, packs, caches, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.peers import SIZES, twin_models, wide_norms
from tests.laws.small import TINY, Shown, build, disturb, examples, logits_of, relative, sample_row
from tests.laws.variants import GLOBAL, PATCHES, QUERIES
from tests.vision.small import WIDTH, as_bytes, draw, their_model, write_encoder
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import Adapter, attach
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.data.encode import Example, Prompt
from tunesmith.data.pack import plan_packs
from tunesmith.errors import AdapterError, CannotMerge, ConfigError, ModelError
from tunesmith.export.counts import count
from tunesmith.files import atomic_folder
from tunesmith.inference.generate import generate
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.score import score_continuations
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.sight import Groups, Picture, StandIn
from tunesmith.vision.open import Gallery, Seen, open_image

tf = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv  # noqa: E402

V1 = {"kind": "llama_adapter_image", "layers": 2, "prompt_length": 3}
V2 = {"kind": "llama_adapter_v2_image", "layers": 1}
TOKENS = {"kind": "image_projection"}
TINY_ONES = [{**V1, **GLOBAL}, {**V2, **QUERIES}, {**V2, **QUERIES, "linears": False}, {**TOKENS, **PATCHES}]
IDS = torch.arange(3, 30)


def seen_logits(model: Llama, ids: Tensor, picture: Picture | None) -> Tensor:
    """Logits of one example about an image, (tokens, vocab)."""
    return logits_of(model, ids, Layout.of([len(ids)], pictures=[picture]))


# --- transformers' CLIP and LLaMA, put together by hand


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoders") / "clip"))


@pytest.fixture
def picture(tmp_path: Path) -> Seen:
    return open_image(as_bytes(draw("red", "disc")), "test", Gallery(tmp_path / "features"))


def states(picture: Seen, clip: str) -> list[Tensor]:
    """Hidden states of transformers' CLIPVisionModel for an image, in float64."""
    pixels = picture.gallery.encoder(clip).pixels(draw("red", "disc"))[None]
    with torch.no_grad():
        found = their_model("clip")(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [state[0].double() for state in found]


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def let_in(layer: Any, prompts: Tensor, gate: Tensor) -> None:
    """Add gate * attention to `prompts` to the heads' output of one of transformers' layers."""
    held: dict[str, Any] = {}
    attention = layer.self_attn

    def remember(module: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        held.update(given)

    def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        shape = (*held["hidden_states"].shape[:-1], -1, attention.head_dim)
        q = attention.q_proj(held["hidden_states"]).view(shape).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *held["position_embeddings"])
        k, v = (p(prompts).view(1, len(prompts), -1, attention.head_dim).transpose(1, 2) for p in (
            attention.k_proj, attention.v_proj))  # fmt: skip
        k, v = (repeat_kv(x, attention.num_key_value_groups) for x in (k, v))
        weights = (q @ k.transpose(2, 3) / attention.head_dim**0.5).softmax(-1)
        return (args[0] + ((weights @ v) * gate[None, :, None, None]).transpose(1, 2).flatten(2),)

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(add)


def by_hand_v1(model: Any, adapter: Adapter, hidden: list[Tensor]) -> Tensor:
    projection = adapter.deltas["model.embed"].projection
    image = projection.weight @ torch.cat([norm(hidden[i][0]) for i in adapter.settings.scales]) + projection.bias
    for index, layer in enumerate(model.model.layers):
        delta = adapter.deltas.get(f"model.layers.{index}.self_attn.mix")
        if delta is not None:
            let_in(layer, delta.prompt + image, delta.gate)
    return model(input_ids=IDS[None]).logits[0]


def by_hand_v2(model: Any, adapter: Adapter, hidden: list[Tensor]) -> Tensor:
    look = adapter.deltas["model.embed"]
    x = look.inward_norm(norm(hidden[adapter.settings.layer][1:]) @ look.inward.weight.T + look.inward.bias)
    x = torch.cat([look.queries, x])[None]
    for block in look.blocks:
        width = x.shape[-1]
        theirs = nn.TransformerEncoderLayer(
            width, block.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        attention = theirs.self_attn
        attention.in_proj_weight.data = torch.cat([block.query.weight, block.key, block.value.weight])
        attention.in_proj_bias.data = torch.cat([block.query.bias, torch.zeros(width).double(), block.value.bias])
        pairs = [(attention.out_proj, block.out), (theirs.linear1, block.up), (theirs.linear2, block.down)]
        for one, other in [*pairs, (theirs.norm1, block.norm_1), (theirs.norm2, block.norm_2)]:
            one.weight.data, one.bias.data = other.weight.data, other.bias.data
        x = theirs.eval()(x)
    visual = look.outward_norm(x[0, : len(look.queries)] @ look.outward.weight.T + look.outward.bias)
    for index, layer in enumerate(model.model.layers):
        delta = adapter.deltas.get(f"model.layers.{index}.self_attn.mix")
        if delta is not None:
            let_in(layer, visual if index < 2 else delta.prompt, delta.gate)
    return model(input_ids=IDS[None]).logits[0]


def by_hand_tokens(model: Any, adapter: Adapter, hidden: list[Tensor]) -> Tensor:
    patches = norm(hidden[adapter.settings.layer][1:])
    first, *more = [m for m in adapter.deltas["model.embed"].projector.modules() if hasattr(m, "weight")]
    visual = patches @ first.weight.T + first.bias
    for layer in more:
        visual = functional.gelu(visual) @ layer.weight.T + layer.bias
    whole = torch.cat([visual, model.model.embed_tokens(IDS)])
    return model(inputs_embeds=whole[None]).logits[0, len(visual) :]


PARITY: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "v1": ({**V1, "scales": [1, 3]}, by_hand_v1),
    "v2": ({**V2, "linears": False, "vision_width": 8, "vision_heads": 2, "queries": 3}, by_hand_v2),
    "tokens": ({**TOKENS, "layer": 2}, by_hand_tokens),
    "tokens, mlp": ({**TOKENS, "projector": "mlp"}, by_hand_tokens),
}


@pytest.mark.parametrize("name", PARITY)
def test_logits_are_those_of_clip_put_together_by_hand(name: str, clip: str, picture: Seen) -> None:
    settings, by_hand = PARITY[name]
    with wide_norms(), torch.no_grad():
        ours, theirs = twin_models(tf.LlamaConfig(**SIZES), torch.float64)
        adapter = attach(ours, {**settings, "encoder": clip})
        disturb(adapter, std=0.5)
        found = seen_logits(ours, IDS, picture)
        expected = by_hand(theirs, adapter, states(picture, clip))
    assert relative(found, seen_logits(ours, IDS, None)) > 1e-2, "the image is not seen"
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- counts


@pytest.mark.parametrize(("layers", "own"), [(10, 409_920), (20, 819_840), (30, 1_229_760)])
def test_counts_of_the_paper(layers: int, own: int) -> None:
    """409,920 for every ten layers of LLaMA-7B with K = 10, and the projection."""
    report = count("llama-7b", "llama_adapter_image", {"layers": layers})
    assert report["modules"]["self_attn.mix"] == {"places": layers, "parameters": own}
    scales = 24 + 40 + 112 + 1280
    assert report["modules"]["embed"]["parameters"] == 4096 * (scales + 1)
    assert report["trainable_parameters"] == own + 4096 * (scales + 1)


def test_counts_with_clip() -> None:
    large = {"encoder": "openai/clip-vit-large-patch14"}
    assert count("llama-7b", "llama_adapter_image", large)["modules"]["embed"]["parameters"] == 4096 * (4 * 1024 + 1)
    assert count("llama-7b", "image_projection", large)["trainable_parameters"] == 4096 * (1024 + 1)
    published = {**large, "vision_width": 768, "vision_depth": 8, "vision_heads": 16}
    v2 = count("llama-7b", "llama_adapter_v2_image", published)
    block = 4 * 768 * 768 + 3 * 768 + 4 * 768 + 2 * 4 * 768 * 768 + (4 + 1) * 768
    ends = 768 * (1024 + 1) + 2 * 768 + 10 * 768 + 4096 * (768 + 1) + 2 * 4096
    assert v2["modules"]["embed"]["parameters"] == 8 * block + ends
    plain = count("llama-7b", "llama_adapter_v2")["trainable_parameters"]
    assert plain == 4_279_744
    assert v2["trainable_parameters"] == plain + 8 * block + ends + 2 * 32, "and gates in the first two layers"


# --- starts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", TINY_ONES, ids=lambda s: f"{s['kind']}-{s.get('linears', '')}")
def test_start_is_the_base_to_the_bit(spec: dict[str, Any], dtype: torch.dtype) -> None:
    """With an image and without: difference exactly 0. Visual tokens alone are seen, as they say."""
    model = build(dtype=dtype)
    before = logits_of(model, *sample_row())
    adapter = attach(model, spec)
    for layout in (sample_row()[1], replace(sample_row()[1], pictures=())):
        same = torch.equal(before, logits_of(model, sample_row()[0], layout))
        assert same or (layout.pictures and not adapter.method.identity_at_init(adapter.settings))
    assert adapter.method.identity_at_init(adapter.settings) == (spec["kind"] != "image_projection")


def test_visual_tokens_start_as_large_as_embeddings() -> None:
    model = build(replace(TINY, hidden_size=48, head_dim=12))
    for projector in ("linear", "mlp"):
        settings = {"tokens": 200, "layer": 1, "token_width": 30, "encoder": "tiny", "projector": projector}
        adapter = attach(model, {**TOKENS, **settings}, name=projector)
        with torch.no_grad():
            made = adapter.deltas["model.embed"].projector(torch.randn(200, 30, dtype=torch.float64))
        size = model.model.embed_tokens.weight.square().mean().sqrt()
        assert 0.6 < made.square().mean().sqrt() / size < 1.6, projector


# --- who shares what


def two(*keys: str | None) -> list[Example]:
    """Examples of equal beginning, each with the image of this name."""
    made = examples()[1]
    pictures = [None if key is None else Shown(key) for key in keys]
    return [replace(made, picture=picture) for picture in pictures]


@pytest.mark.parametrize(("keys", "shares"), [(("a", "a"), True), (("a", "b"), False), (("a", None), False)])
def test_only_examples_with_one_image_share_tokens(keys: tuple[str | None, str | None], shares: bool) -> None:
    some = two(*keys)
    for spec, looks in (({"kind": "lora"}, False), (TINY_ONES[0], True)):
        model = build()
        attach(model, spec)
        (pack,) = plan_packs(some, budget=1000, needs=model.needs())
        whole = sum(len(example.ids) for example in some)
        assert (pack.layout.tokens < whole) == (shares or not looks)
        assert (model.context(pack.layout).sight is not None) == looks


def test_a_segment_shared_between_images_is_refused_where_something_looks() -> None:
    model = build()
    layout = Layout.of([3, 2, 2], [-1, 0, 0], pictures=[Shown("a"), Shown("a"), Shown("b")])
    model.context(layout)
    attach(model, TINY_ONES[0])
    with pytest.raises(ModelError, match="segment 2 and the segment it continues see different images"):
        model.context(layout)
    with pytest.raises(ModelError, match="2 pictures for 3 segments"):
        Layout.of([3, 2, 2], pictures=[None, None])


def test_groups_hold_each_row_once() -> None:
    owner = torch.tensor([1, -1, 0, 1, 1, -1, 0]).numpy()
    groups = Groups.of(owner, 2, torch.device("cpu"))
    assert groups.image.tolist() == [2, 0, 1], "what sees nothing has the number after the last image's"
    assert groups.rows.flatten()[groups.place].tolist() == list(range(7))
    assert (groups.image.numpy()[groups.place // 3] == [1, 2, 0, 1, 1, 2, 0]).all()


# --- use


@pytest.mark.parametrize("spec", TINY_ONES, ids=lambda s: f"{s['kind']}-{s.get('linears', '')}")
def test_generation_is_the_full_forward(spec: dict[str, Any]) -> None:
    """Prompts about different images and none, in one batch, greedy and by beams; and scored."""
    model = build()
    disturb(attach(model, spec), std=0.5)
    ids = IDS[:9].tolist()
    prompts = [Prompt(ids, Shown("a")), Prompt(ids, Shown("b")), Prompt(ids), Prompt([*ids, 5], Shown("a"))]
    settings = GenerationSettings(max_new_tokens=6)
    together = generate(model, prompts, settings, eos_ids=())
    for prompt, answer in zip(prompts, together, strict=True):
        whole = list(prompt)
        for token in answer.ids:
            assert int(seen_logits(model, torch.tensor(whole), prompt.picture)[-1].argmax()) == token
            whole.append(token)
    blind = seen_logits(model, torch.tensor(ids), None)
    assert relative(seen_logits(model, torch.tensor(ids), Shown("a")), blind) > 1e-3, "the image changes nothing here"
    beams = generate(model, prompts, GenerationSettings(max_new_tokens=4, beams=3), eos_ids=())
    for prompt, answer in zip(prompts, beams, strict=True):
        (alone,) = generate(model, [prompt], GenerationSettings(max_new_tokens=4, beams=3), eos_ids=())
        assert alone.ids == answer.ids
    scores = score_continuations(model, prompts, [[[7, 8], [9]]] * 4)
    for prompt, score in zip(prompts, scores, strict=True):
        chances = seen_logits(model, torch.tensor([*prompt, 7]), prompt.picture).log_softmax(-1)
        assert abs(float(score[0] - chances[-2, 7] - chances[-1, 8])) < 1e-10


@pytest.mark.parametrize("spec", TINY_ONES, ids=lambda s: f"{s['kind']}-{s.get('linears', '')}")
def test_saved_and_loaded(spec: dict[str, Any], tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    adapter = attach(model, spec)
    disturb(adapter)
    with atomic_folder(tmp_path / "adapter") as folder:
        save_adapter(folder, adapter, base="tiny", identity={"sha256": "x"})
    fresh = build(dtype=torch.float32)
    again = load_adapter(tmp_path / "adapter", fresh)
    assert again.settings == adapter.settings, "sizes travel with it: nobody has to open the encoder"
    assert torch.equal(logits_of(fresh, *sample_row()), logits_of(model, *sample_row()))
    with pytest.raises(CannotMerge):
        adapter.deltas["model.embed"].fold(torch.zeros(2, 2), None)


@pytest.mark.parametrize("spec", TINY_ONES, ids=lambda s: f"{s['kind']}-{s.get('linears', '')}")
def test_gradient_of_what_looks(spec: dict[str, Any]) -> None:
    """Of a loss behind the blocks, for everything that reads an image, against finite differences."""
    model = build(replace(TINY, hidden_size=8, intermediate_size=6, head_dim=4, num_attention_heads=2, vocab_size=9))
    adapter = attach(model, spec)
    disturb(adapter)
    own = list(adapter.deltas["model.embed"].parameters())
    layout = Layout.of([3, 2, 2], pictures=[Shown("a"), Shown("b"), None])

    def run(*_: Tensor) -> Tensor:
        ctx = model.context(layout)
        return model.run(torch.arange(7), ctx)

    assert torch.autograd.gradcheck(run, own, fast_mode=True)


def test_two_that_look_stand_beside_each_other() -> None:
    """By routes in one row, and as parts of one adapter: each has its own encoder, and its own features."""
    model = build()
    first, second = attach(model, TINY_ONES[0], name="a"), attach(model, TINY_ONES[3], name="b")
    disturb(first), disturb(second, seed=2)
    tokens, layout = sample_row()
    routes = [("a",)] * 3 + [("b",)]
    layout = replace(layout, pictures=(*layout.pictures[:3], Shown("two")))
    with torch.no_grad():
        ctx = model.context(layout, routes=routes)
        mixed = model.logits(model.run(tokens, ctx), ctx)
    for names, rows in ((("a",), slice(0, 23)), (("b",), slice(23, 32))):
        assert (mixed[rows] - logits_of(model, tokens, layout, adapters=names)[rows]).abs().max() < 1e-10
    parts = [{"kind": "llama_adapter_image", **GLOBAL}, {**TOKENS, **PATCHES}]
    adapter = attach(build(), {"kind": "mixed", "parts": parts})
    assert len(adapter.settings.looks) == 2 and adapter.deltas["model.embed"].visual_tokens == 3


# --- settings


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({**V1, "scales": [9]}, "the encoder efficientnet-lite0 has layers 1 to 8, not 9"),
        ({**V1, "scales": [3, 2]}, "layers of the encoder, from 1, in their order"),
        ({**V1, "scales": []}, "layers of the encoder, from 1, in their order"),
        ({**V1, "encoder": "tiny", "scales": [1, 2], "widths": [3]}, "one size for each of the 2 scales"),
        ({**TOKENS, "layer": 99}, "has layers 1 to 8, not 99"),
        ({**V2, "vision_width": 10, "vision_heads": 4}, "vision_width 10 cannot be shared by 4 heads"),
        ({**V1, "init": "random", "gate": "tanh"}, "which tanh never reaches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach(build(), spec)


def test_first_layers_and_last_ones_are_apart() -> None:
    model = build()
    with pytest.raises(AdapterError, match="visual_layers: 2 of the first layers, and 1 are left below the 1"):
        attach(model, {**V2, **QUERIES, "visual_layers": 2})
    adapter = attach(model, {**V2, **QUERIES, "linears": False})
    names = {name.partition("self_attn.")[2] or name for name in adapter.trainable if "layers" in name}
    assert names == {"mix.gate", "mix.prompt"}
    places = {name for name in adapter.trainable if name.endswith("prompt")}
    assert places == {"model.layers.1.self_attn.mix.prompt"}, "the first layer has the image's, and none of its own"


def test_defaults_are_the_encoders_own(clip: str) -> None:
    adapter = attach(build(), {"kind": "llama_adapter_image", "encoder": clip})
    assert (adapter.settings.scales, adapter.settings.widths) == ((1, 2, 3), (WIDTH,) * 3)
    tokens = attach(build(), {"kind": "image_projection", "encoder": clip}).settings
    assert (tokens.layer, tokens.tokens, tokens.token_width) == (2, 16, WIDTH)


def test_a_plan_counts_images_by_their_shapes() -> None:
    """On the meta device nothing is looked up, and visual tokens stand in the row all the same."""
    with torch.device("meta"):
        model = Llama(TINY).requires_grad_(False)
        attach(model, {**TOKENS, "encoder": "openai/clip-vit-large-patch14"})
    some = [replace(example, picture=StandIn(str(i))) for i, example in enumerate(examples())]
    (pack,) = plan_packs(some, budget=10_000, device="meta", needs=model.needs())
    ctx = model.context(pack.layout)
    assert ctx.sight is not None and ctx.extra == len(some) * 256
    (values,) = ctx.sight.values.values()
    assert values.is_meta and values.shape == (len(some), 256, 1024)
    assert model.run(pack.tokens, ctx).shape == (pack.layout.tokens, TINY.hidden_size)
