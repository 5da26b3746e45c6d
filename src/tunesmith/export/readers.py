"""Other projects' readers on what was exported, in a process of its own (child.py).

FOLDER/request.json says which reader, on which files, what to compute; the answer is FOLDER/answer.json, with logits in
answer.safetensors. transformers and PEFT compute logits; llama.cpp, which is asked through its own server on loopback,
gives token ids, greedy answers and the log-probabilities of its likeliest tokens.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.files import atomic_save_safetensors, atomic_write_json

TOP = 10  # tokens whose log-probabilities llama.cpp is asked for


def transformers(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, ids and the prompt of a chat that transformers computes from a model folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import __version__ as version

    model = AutoModelForCausalLM.from_pretrained(request["path"], dtype="float32").eval()
    _save_logits(model, request, folder)
    return {"version": version, **_said(AutoTokenizer.from_pretrained(request["path"]), request)}


def peft(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits of an adapter on its base, a model folder."""
    from peft import PeftModel
    from peft import __version__ as version
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(request["base"], dtype="float32")
    _save_logits(PeftModel.from_pretrained(base, request["path"]).eval(), request, folder)
    return {"version": version}


def llama_cpp(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ids, a chat's prompt and greedy answers of a GGUF file; with `lora`, answers with that adapter as well."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = request["base"] or request["path"]
    settings.n_ctx, settings.n_parallel = request["context"], 1
    settings.cpuparams.n_threads = request["threads"]
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it is in half precision
    settings.warmup, settings.verbosity, settings.n_gpu_layers = False, -1, 0
    if request["base"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["path"], 1.0)]
    server = xllamacpp.Server(settings)
    ask = _asker(server.listening_address)
    answer: dict[str, Any] = {"version": version_of("xllamacpp"), "rows": _greedy(ask, request, 1.0)}
    if request["base"]:
        answer["without"] = _greedy(ask, request, 0.0)
        return answer
    for special in (False, True):
        answer[f"ids_{special}"] = [_ids(ask, text, special, False) for text in request["texts"]]
    if request["chat"]:
        prompt = ask("/apply-template", {"messages": request["chat"]})["prompt"]
        answer["chat_ids"] = _ids(ask, prompt, True, True)
    return answer


READERS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "transformers": transformers,
    "peft": peft,
    "llama.cpp": llama_cpp,
}
LIBRARIES = {"transformers": "transformers", "peft": "peft", "llama.cpp": "xllamacpp"}


def version_of(library: str) -> str:
    """The version of an installed library."""
    from importlib.metadata import version

    return version(library)


def _save_logits(model: Any, request: dict[str, Any], folder: Path) -> None:
    """Logits at the asked places of each row, end to end."""
    import torch

    torch.set_num_threads(request["threads"])
    found = []
    with torch.no_grad():
        for row, places in zip(request["rows"], request["places"], strict=True):
            found.append(model(torch.tensor([row])).logits[0, places].float())
    atomic_save_safetensors(folder / "answer.safetensors", {"logits": torch.cat(found)})


def _said(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Ids of texts, as its own tokenizer gives them, and of the prompt of a chat."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]]
    if not request["chat"]:
        return {"ids_True": ids}
    prompt = tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, tokenize=False)
    return {"ids_True": ids, "chat_ids": tokenizer.encode(prompt, add_special_tokens=False)}


def _asker(address: str) -> Callable[[str, Any], Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy

    def ask(route: str, body: Any) -> Any:
        sent = urllib.request.Request(address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with opener.open(sent, timeout=600) as answer:
            return json.loads(answer.read())

    return ask


def _ids(ask: Callable[[str, Any], Any], text: str, special: bool, begin: bool) -> list[int]:
    found = ask("/tokenize", {"content": text, "add_special": begin, "parse_special": special})["tokens"]
    return [int(index) for index in found]


def _greedy(ask: Callable[[str, Any], Any], request: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Of each row: the tokens that follow, and the likeliest ones at each step with their log-probabilities."""
    lora = [{"id": 0, "scale": scale}] if request["base"] else []
    rows = []
    for row in request["rows"]:
        body = {"prompt": row, "n_predict": request["new"], "temperature": 0, "n_probs": TOP, "return_tokens": True}
        body |= {"cache_prompt": False, "lora": lora}
        said = ask("/completion", body)
        steps = said["completion_probabilities"]
        top = [[[item["id"], item["logprob"]] for item in step["top_logprobs"]] for step in steps]
        whole = len(top) == len(said["tokens"])  # the server leaves out tokens that end within a character
        rows.append({"ids": said["tokens"], "top": top if whole else []})
    return rows


def main(folder: Path) -> None:
    """The child: answer the request that lies in `folder`."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    answer = READERS[request["reader"]](request, folder)
    atomic_write_json(folder / "answer.json", answer)
