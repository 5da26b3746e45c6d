"""Perplexity equals what transformers gives for the same tokens, window by window; corpora are joined as published."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tests.tiny import edit_weights, write_base

from tunesmith import api
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.perplexity import PerplexitySettings, cut, measure
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import find_task

WORDS = "the of a film joy mess start end year plot worst best funny kind warm dull and is was in".split()


def prose(words: int, seed: int = 0) -> str:
    """Words in no order, with line ends."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice((" ", " ", " ", ".\n")) for _ in range(words))


def subject_of(base: Path) -> Subject:
    loaded = api.load(str(base), dtype="float32", device="cpu")
    return Subject(loaded.model, loaded.tokenizer, get_template("plain", loaded.tokenizer))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model whose loss is far from that of equal chances."""
    folder = write_base(tmp_path_factory.mktemp("perplexity") / "tiny")
    edit_weights(folder, lambda tensors: [t.mul_(3) for name, t in tensors.items() if "norm" not in name])
    return folder


@pytest.fixture(scope="module")
def subject(base) -> Subject:
    return subject_of(base)


@pytest.fixture(scope="module")
def theirs(base):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def their_loss(model, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """(summed loss, predicted tokens) as transformers' documentation does it: labels of what was read are -100."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        row = torch.tensor([ids[begin:end]])
        labels = row.clone()
        labels[:, : row.shape[1] - (end - done)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            total += float(model(row, labels=labels).loss) * predicted
            count += predicted
        done = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 16), (100, 99), (512, None)])
def test_perplexity_equals_transformers(subject, theirs, window, stride):
    text = prose(300)
    found = measure(subject, [text], PerplexitySettings(window=window, stride=stride), "")
    total, count = their_loss(theirs, subject.tokenizer.encode(text), window, stride or window)
    perplexity = found.figures["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert perplexity.count == count == found.stated["predicted"]
    assert found.figures["loss"].value == pytest.approx(total / count, rel=1e-5)
    assert abs(perplexity.value / subject.model.config.vocab_size - 1) > 0.1  # a random model, but not a uniform one
    assert found.stated["window"] == window and found.stated["stride"] == (stride or window)
    assert found.stated["bos"] == "none" and found.stated["uniform"] is False and not found.notes


@pytest.mark.smollm2
def test_perplexity_of_a_trained_model_equals_transformers(smollm2_gguf):
    import transformers

    loaded = api.load(str(smollm2_gguf), dtype="float32", device="cpu")
    text = (
        "The European lobster lives in the eastern Atlantic Ocean, the Mediterranean Sea and parts of the Black Sea. "
        "It is closely related to the American lobster. It may grow to a length of 60 centimetres and a mass of six "
        "kilograms, and bears a conspicuous pair of claws. In life, the lobsters are blue.\n"
    )
    config = transformers.LlamaConfig.from_dict(loaded.model.config.to_hf())
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config).eval()
    reference.load_state_dict(loaded.model.state_dict(), strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    subject = Subject(loaded.model, loaded.tokenizer, get_template("plain", loaded.tokenizer))
    found = measure(subject, [text], PerplexitySettings(window=48), "")
    total, count = their_loss(reference, loaded.tokenizer.encode(text), 48, 48)
    assert found.figures["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.figures["perplexity"].value < 40


def test_bos_before_the_text_or_before_every_window(subject, theirs):
    ids = list(range(10, 20))
    assert list(cut(ids, 4)) == [([10], [11, 12, 13]), ([14], [15, 16, 17]), ([18], [19])]
    assert list(cut(ids, 4, bos=1)) == [([1], [10, 11, 12]), ([1], [13, 14, 15]), ([1], [16, 17, 18]), ([1], [19])]
    assert list(cut(ids, 4, 2)) == [
        ([10], [11, 12, 13]), ([12, 13], [14, 15]), ([14, 15], [16, 17]), ([16, 17], [18, 19])
    ]  # fmt: skip
    assert list(cut(ids, 4, 2, bos=1))[:2] == [([1], [10, 11, 12]), ([1, 12], [13, 14])]
    assert list(cut(ids[:9], 4)) == list(cut(ids, 4))[:2]  # a last token alone has nothing before it
    assert list(cut([], 4)) == [] == list(cut([5], 4))


def test_bos_is_stated_and_counted(tmp_path, theirs, base):
    folder = write_base(tmp_path / "bos")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>", "add_bos_token": True}))
    subject = subject_of(folder)
    text, bos = prose(120), subject.tokenizer.bos_id
    ids = subject.tokenizer.encode(text)
    assert subject.tokenizer.add_bos and bos == 3
    found = measure(subject, [text], PerplexitySettings(window=50), "")
    total, count = their_loss(theirs, [bos, *ids], 50, 50)
    assert found.stated["bos"] == "text" and found.figures["loss"].value == pytest.approx(total / count, rel=1e-5)
    found = measure(subject, [text], PerplexitySettings(window=50, bos="windows"), "")
    parts = [their_loss(theirs, [bos, *ids[at : at + 49]], 50, 50) for at in range(0, len(ids), 49)]
    expected = sum(total for total, _ in parts) / len(ids)
    assert found.stated["bos"] == "windows" and found.figures["loss"].count == len(ids)
    assert found.figures["loss"].value == pytest.approx(expected, rel=1e-5)


def test_a_perplexity_of_the_vocabulary_is_flagged(tmp_path):
    folder = write_base(tmp_path / "unloaded")
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].zero_())
    found = measure(subject_of(folder), [prose(100)], PerplexitySettings(window=64), "")
    assert found.figures["perplexity"].value == pytest.approx(768, rel=1e-4)
    assert found.stated["uniform"] is True and "were the base's weights loaded?" in found.notes[0]


def test_the_interval_is_that_of_a_ratio_of_sums():
    from tunesmith.evaluate.perplexity import _figures
    from tunesmith.inference import Scored

    found = _figures([Scored(-6.0, 2, 0), Scored(-2.0, 2, 0), Scored(-4.0, 2, 0)], [2, 2, 2])
    # by hand: losses 3, 1, 2 a token; mean 2, standard deviation 1, its error 1 / sqrt(3)
    half = 1.959964 / 3**0.5
    assert found["loss"].value == 2 and found["loss"].interval == pytest.approx((2 - half, 2 + half))
    assert found["perplexity"].value == pytest.approx(math.e**2)
    assert found["perplexity"].interval[0] == pytest.approx(math.exp(2 - half))


TEXT = "\n = Lobster = \n\n blue <unk> ones @-@ more \n"


@pytest.mark.parametrize(
    ("corpus", "expected", "kind"),
    [
        ("wikitext", ["", " = Lobster = \n", "", " blue <unk> ones @-@ more \n"], "tokenized"),
        ("ptb", ["", "= Lobster =", "", "blue <unk> ones @-@ more"], "tokenized"),
        ("text", [TEXT], "tokenized"),
    ],
)
def test_lines_become_the_rows_of_the_corpus(tmp_path, subject, corpus, expected, kind):
    (tmp_path / "wiki.test.raw").write_text(TEXT)
    task = find_task(corpus)
    rows = task.read(tmp_path / "wiki.test.raw", PerplexitySettings())
    assert rows == expected
    stated = task.measure(subject, rows, PerplexitySettings()).stated
    assert stated["joiner"] == "\n\n" and stated["text"] == kind and stated["rows"] == len(expected)
    assert stated["tokens"] == len(subject.tokenizer.encode("\n\n".join(expected)))


def test_c4_rows_are_joined_by_a_space(tmp_path, subject):
    path = tmp_path / "c4.jsonl"
    path.write_text('{"text": "A cup.\\nOf tea.", "url": ""}\n{"text": "Two cups."}\n')
    task = find_task("c4")
    rows = task.read(path, PerplexitySettings())
    stated = task.measure(subject, rows, PerplexitySettings()).stated
    assert rows == ["A cup.\nOf tea.", "Two cups."] and stated["joiner"] == " " and stated["text"] == "raw"
    assert stated["tokens"] == len(subject.tokenizer.encode("A cup.\nOf tea. Two cups."))
    assert task.measure(subject, rows, PerplexitySettings(joiner="--")).stated["joiner"] == "--"


def test_what_cannot_be_measured_is_named(tmp_path, subject):
    read, empty = find_task("text").read, tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: holds no text"):
        read(empty, PerplexitySettings())
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: cannot be read as UTF-8"):
        read(tmp_path / "latin.txt", PerplexitySettings())
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: has no text under 'text' \(keys here: txt\); did you mean 'txt'"
    ):
        read(tmp_path / "rows.jsonl", PerplexitySettings())
    with pytest.raises(ConfigError, match="window=1000: exceeds the model's context of 512"):
        measure(subject, ["a b c"], PerplexitySettings(window=1000), "")
    with pytest.raises(ConfigError, match="stride=65: over the 64 tokens"):
        measure(subject, ["a b c"], PerplexitySettings(window=64, stride=65), "")
    with pytest.raises(ConfigError, match="has no BOS token"):
        measure(subject, ["a b c"], PerplexitySettings(bos="text"), "")
    with pytest.raises(DataError, match="nothing to predict"):
        measure(subject, ["a"], PerplexitySettings(), "")
