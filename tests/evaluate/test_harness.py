"""As an LM of lm-evaluation-harness, the model gives what the library's own Hugging Face backend gives."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.tiny import edit_json, edit_weights, run_it, write_base, write_rows

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("NOT TESTED, lm-eval is not there: pip install 'tunesmith[harness]'", allow_module_level=True)
os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tunesmith import api
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError
from tunesmith.evaluate import harness
from tunesmith.evaluate.harness import TunesmithLM, find_harness, settings_of
from tunesmith.evaluate.subject import Subject

PAIRS = [
    ("The film was a joy", " from start to end"),
    ("The film was a joy", " and dull"),
    ("It ends in two spaces  ", "and goes on"),
    ("", "without a context"),
    ("word " * 200 + "the end", " of a long text is cut at its beginning"),
    ("naïve café: 你好", "！"),
    ("A <|im_end|> inside", " the text"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def backends(request, tmp_path_factory):
    """(ours, theirs) over one random model, with a tokenizer that adds BOS or does not."""
    import transformers

    folder = write_base(tmp_path_factory.mktemp("harness") / "tiny", max_position_embeddings=128)
    edit_weights(folder, lambda tensors: [t.mul_(3) for name, t in tensors.items() if "norm" not in name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if request.param:
        edit_json(folder / "tokenizer_config.json", bos_token="<s>", add_bos_token=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_bos_token = True
    loaded = api.load(str(folder), dtype="float32", device="cpu")
    assert loaded.tokenizer.add_bos is request.param
    subject = Subject(loaded.model, loaded.tokenizer, get_template("chat", loaded.tokenizer))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TunesmithLM(subject), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=request.param)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def test_log_likelihoods_equal_the_hugging_face_backend(backends):
    ours, theirs = (backend.loglikelihood(requests("loglikelihood", PAIRS)) for backend in backends)
    for (pair, (mine, my_greedy)), (expected, greedy) in zip(zip(PAIRS, ours, strict=True), theirs, strict=True):
        assert mine == pytest.approx(expected, rel=1e-4), pair
        assert my_greedy == greedy


def test_rolling_log_likelihoods_equal_the_hugging_face_backend(backends):
    texts = [("the end of a film is a joy and a mess of the year " * 12,), ("short",)]
    ours, theirs = (b.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for b in backends)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_generation_equals_the_hugging_face_backend(backends):
    asked = [("The film was", {"until": ["\n"], "max_gen_toks": 12}), ("It is", {"until": [" "], "max_gen_toks": 8})]
    ours, theirs = (b.generate_until(requests("generate_until", asked)) for b in backends)
    assert ours == theirs and any(ours)


def test_a_conversation_in_the_template(backends):
    turns = [{"role": "user", "content": "Is it dull?"}, {"role": "assistant", "content": "No."}]
    turns += [{"role": "user", "content": "Why?"}]
    ours, theirs = (backend.apply_chat_template(turns) for backend in backends)
    assert ours == theirs
    turns.append({"role": "assistant", "content": "Because"})
    ours, theirs = (b.apply_chat_template(turns, add_generation_prompt=False) for b in backends)
    assert ours == theirs
    assert backends[0].tok_encode(ours) == backends[1].tok_encode(ours)


def test_settings_of_a_task():
    found = settings_of({"until": ["\n\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9})
    assert (found.stop, found.max_new_tokens, found.temperature) == (("\n\n",), 9, 0.0)
    found = settings_of({"until": "x", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (found.stop, found.max_new_tokens, found.temperature, found.top_p) == (("x",), 256, 0.7, 0.9)
    with pytest.raises(ConfigError, match="num_beams=4, which generation here does not know"):
        settings_of({"until": [], "num_beams": 4})


TASK = """
task: tunesmith_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 7.0}}
"""


@pytest.fixture
def local_task(tmp_path) -> Path:
    rows = [{"question": f"Is a {w} dull?", "choices": ["no", "yes, far too long"], "answer": n % 2}
            for n, w in enumerate(("film", "plot", "year", "mess", "joy", "start"))]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=file, cache=tmp_path / "cache"))
    return tmp_path / "tasks"


def test_a_task_of_the_library_on_an_adapter(command, tiny_base, tiny_reviews, tmp_path, in_process, local_task):
    run_it(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=2, train__learning_rate=0.1)
    code, out, err = command(
        "evaluate", tmp_path / "run", "--harness", "tunesmith_local", f"harness.include={local_task}",
        "harness.shots=1", "--limit", 5, "--json",
    )  # fmt: skip
    assert code == 0, err
    (report,) = json.loads(out)["harness"].values()
    assert set(report["figures"]) == {"acc", "acc_norm"} and report["figures"]["acc"]["count"] == 5
    acc = report["figures"]["acc"]
    assert acc["interval"][0] <= acc["value"] <= acc["interval"][1] and acc["higher_is_better"] is True
    assert report["stated"]["shots"] == 1 and report["stated"]["version"] == 7.0 and report["stated"]["limit"] == 5


def test_unknown_tasks_are_named(command, monkeypatch, local_task):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    only = partial(harness.TaskManager, include_defaults=False)  # the library's own take half a minute to list
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, include_defaults=True: only(include_path=include_path)
    )
    code, _, err = command("evaluate", "m", "--harness", "tunesmith_locall", f"harness.include={local_task}")
    assert code == 2 and "the library has no such task; did you mean 'tunesmith_local'?" in err
    with pytest.raises(ConfigError, match="harness.shot: unknown key; did you mean 'shots'"):
        find_harness(["arc_easy"], {"shot": 1})
