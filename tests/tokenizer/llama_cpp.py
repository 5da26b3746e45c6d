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
    """A llama.cpp server on loopback for one model file; it lives until `close`."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path)],
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

    def ask(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON answer of one request."""
        request = urllib.request.Request(
            self._address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


def _serve(path: str) -> None:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    settings.warmup, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
