"""llama.cpp's own server (xllamacpp) on the .gguf file, greedy; a batch is as many slots asked at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from bench.children.common import UNKNOWN, spec, tell, timed_decoding


def main() -> None:
    """Load, decode at every batch size, and tell."""
    wanted = spec()
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = wanted["model_path"]
    settings.n_parallel = max(wanted["batches"])
    settings.n_ctx = settings.n_parallel * wanted["context"]
    settings.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    settings.verbosity = -1
    server = xllamacpp.Server(settings)
    tell("loaded")

    def ask(prompt: list[int], new: int) -> list[int]:
        request = {"prompt": prompt, "n_predict": new, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        if "usage" not in answer:
            raise SystemExit(f"llama.cpp refused: {answer}")
        return [UNKNOWN] * answer["usage"]["completion_tokens"]  # it gives text and a count, but no ids

    def decode(prompts: list[list[int]], new: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: ask(prompt, new), prompts))

    timed_decoding(wanted, decode)
    os._exit(0)  # its server thread has no end of its own


if __name__ == "__main__":
    main()
