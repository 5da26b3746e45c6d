"""Tunesmith's server, asked over HTTP: all requests at once, and the same ones one after the other."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn

from bench.children.common import spec, tell
from tunesmith.data.catalog import resolve_model
from tunesmith.model.load import load_model, model_identity
from tunesmith.serve.api import create_app
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.registry import Registry
from tunesmith.serve.start import config, listen
from tunesmith.tokenizer import load_tokenizer


def main() -> None:
    """Serve, ask, and tell of each repetition."""
    wanted = spec()
    path = resolve_model(wanted["model_path"])
    model = load_model(path, dtype=getattr(torch, wanted["dtype"]))
    registry = Registry(model, load_tokenizer(path), model_identity(path), "base", Path(wanted["folder"]))
    for number in range(wanted["adapters"]):
        registry.add(f"adapter-{number}")
    limits = Limits(prefix_bytes=0)  # every prompt is read anew, as by the peers
    engine = Engine(registry, limits).start()
    door = listen("127.0.0.1", 0)
    server = uvicorn.Server(config(create_app(engine), limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{door.getsockname()[1]}"
    ask(url, wanted, 0, 4)
    for mode, together in (("ours-batched", wanted["requests"]), ("ours-one-at-a-time", 1)):
        for number in range(wanted["repeats"]):
            tell("served", mode=mode, **round_of(url, wanted, number, together))
    server.should_exit = True
    thread.join(20)
    engine.close()


def round_of(url: str, wanted: dict[str, Any], number: int, together: int) -> dict[str, Any]:
    """All requests of a repetition, so many at a time; seconds in all, and to each request's first token from the
    beginning of the round, when all of them came."""
    began = time.perf_counter()
    with ThreadPoolExecutor(together) as pool:
        first = number * wanted["requests"]
        found = list(pool.map(lambda i: ask(url, wanted, first + i, wanted["new_tokens"]), range(wanted["requests"])))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds, "tokens": sum(tokens for tokens, _, _ in found),
        "first_token_s": [at - began for _, at, _ in found], "texts": [text for _, _, text in found],
    }  # fmt: skip


def ask(url: str, wanted: dict[str, Any], number: int, new: int) -> tuple[int, float, str]:
    """One streamed request: tokens, the time of the first of them, the text."""
    prompt = wanted["prompts"][number % len(wanted["prompts"])]
    body = {
        "model": f"adapter-{number % wanted['adapters']}", "prompt": prompt, "max_tokens": new, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "logprobs": 0,
    }  # fmt: skip
    line = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = line.getresponse()
    if reply.status != 200:
        raise SystemExit(f"the server answered {reply.status}: {reply.read().decode()}")
    first, tokens, text = None, 0, ""
    while piece := reply.readline():
        if piece.startswith(b"data: {"):
            first = first or time.perf_counter()
            found = json.loads(piece[6:])
            text += "".join(choice["text"] for choice in found["choices"])
            tokens = found["usage"]["completion_tokens"] if found.get("usage") else tokens
    line.close()
    return tokens, first or time.perf_counter(), text


if __name__ == "__main__":
    main()
