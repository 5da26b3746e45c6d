"""llama.cpp as an oracle: its own server (through xllamacpp) on a .gguf file, asked for token ids.

The server runs in a process of its own, which is killed at the end: ending it within this one hangs now and then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A llama.cpp server on loopback for one model file; it lives until `close`.

    `lora`: an adapter beside it, on unless a request's `scale` is 0; `slots` requests at once, of `context` tokens.
    """

    def __init__(self, path: Path, lora: Path | None = None, slots: int = 1, context: int = 256) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path), str(lora or ""), str(slots), str(context)],
            stdin=subprocess.PIPE,  # its end, should this process die, ends the server
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self._process.stdout:
            if line.startswith("address "):
                self._address = line.split()[1]
                return
        raise RuntimeError(f"llama.cpp does not load {path}")

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def tokens(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Token ids of a text; `bos`: with what the model's own tokenizer adds."""
        return self.ask("/tokenize", {"content": text, "add_special": bos, "parse_special": special})["tokens"]

    def greedy(self, prompt: list[int], new: int, scale: float | None = None) -> tuple[list[int], list[list[float]]]:
        """The likeliest `new` tokens after ids, and at each step the log-probabilities of the likeliest two."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "n_probs": 2,
            "cache_prompt": False,
        }
        if scale is not None:
            body["lora"] = [{"id": 0, "scale": scale}]
        said = self.ask("/completion", {**body, "return_tokens": True})
        steps = said["completion_probabilities"][: len(said["tokens"])]
        return said["tokens"], [[item["logprob"] for item in step["top_logprobs"]] for step in steps]

    def ask(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON answer of one request."""
        request = urllib.request.Request(
            self._address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())


def _serve(path: str, lora: str, slots: int, context: int) -> None:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = slots * context, slots, 1
    settings.warmup, settings.verbosity = False, -1
    # In full precision: the default is a cache of float16, and attention in it.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(settings)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
