"""The process in which chat templates run: started as a script by sandbox.py, with hard limits of its own.

A chat template is a program from a stranger. jinja's immutable sandbox keeps it from Python's attributes; the kernel
keeps it from time and memory: one second of CPU a request (a timer whose signal kills the process, inside C code too),
64 MiB over what the process had at its start, no new files, pipes or sockets. What it was sent is all that it can know.

Requests and answers are lines of JSON. Imports only the standard library and jinja2.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
from typing import Any

CPU_SECONDS = 1.0
MEMORY = 64 << 20  # bytes
MAX_OUTPUT = 16 << 20  # characters a rendering
FREE = 1 << 20  # bytes of a request that MEMORY covers; a larger request gets room for itself as well
COPIES = 12  # bytes of room for each byte of such a request: parsed, rendered and written again
# Uses what jinja and Python load lazily (a codec, a module), for which no file can be opened later.
WARM = (
    "{% for m in messages %}{{ 'a' | center(4) }}{{ m | tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}{% endfor %}"
)


class State:
    """What the environment's functions read during one request."""

    markers: tuple[str, str] = ("", "")
    now: datetime.datetime | None = None


def build_environment(state: State) -> Any:
    """Return the jinja environment that transformers gives to chat templates, plus markers around {% generation %}."""
    import jinja2
    import jinja2.constants
    import jinja2.debug  # jinja would import it at the first error, when no file can be opened any more
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %}: what the model is meant to say, between two markers on request."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{state.markers[0]}{caller()}{state.markers[1]}"

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return (state.now or datetime.datetime.now()).strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja's own filter escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # not optimized: constants would be folded while compiling
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class Limits:
    """Kernel limits of this process; where the system has none (Windows), only the parent's clock is left."""

    def __init__(self) -> None:
        self.base = 0
        self.allowed = 0
        try:
            import resource
        except ImportError:
            return
        self._resource = resource
        self.base = _address_space()
        datetime.datetime.now().strftime("%c")  # the time zone is read from a file, once
        for name in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
            resource.setrlimit(name, (0, 0))

    def start(self, request_bytes: int) -> None:
        """Give the request that comes its second and its memory."""
        if not hasattr(signal, "setitimer"):
            return
        allowed = self.base + MEMORY + COPIES * max(0, request_bytes - FREE)
        if self.base and allowed != self.allowed:
            hard = self._resource.getrlimit(self._resource.RLIMIT_AS)[1]
            self._resource.setrlimit(self._resource.RLIMIT_AS, (allowed, hard))
            self.allowed = allowed
        # SIGPROF is left to its default, which ends the process wherever it is
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)

    def stop(self) -> None:
        """Stop the clock."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int:
    """This process's address space in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def answer(line: bytes, environment: Any, templates: dict[int, Any], state: State) -> dict[str, Any]:
    """Do one request: {"load": id, "source"} or {"id", "jobs": [variables, ...], "markers", "now"}."""
    request = json.loads(line)
    if "load" in request:
        templates[request["load"]] = environment.from_string(request["source"])
        return {"ok": []}
    state.markers = tuple(request["markers"])
    state.now = datetime.datetime.fromisoformat(request["now"]) if request["now"] else None
    texts = [templates[request["id"]].render(**variables) for variables in request["jobs"]]
    longest = max(map(len, texts), default=0)
    if longest > MAX_OUTPUT:
        return {"error": "output", "message": f"it rendered {longest} characters; the limit is {MAX_OUTPUT}"}
    return {"ok": texts}


def main() -> None:
    """Answer requests from stdin until it closes; out of memory, answer that and end."""
    state = State()
    environment, templates = build_environment(state), {}  # type: tuple[Any, dict[int, Any]]
    environment.from_string(WARM).render(messages=[{}])
    limits = Limits()
    for line in iter(sys.stdin.buffer.readline, b""):
        over = False
        limits.start(len(line))
        try:
            reply = json.dumps(answer(line, environment, templates, state), ensure_ascii=False).encode()
        except MemoryError:
            reply, over = b'{"error": "memory", "message": ""}', True
        except RecursionError:
            reply = b'{"error": "recursion", "message": ""}'
        except Exception as error:  # whatever a stranger's program raises is an answer, not the end
            message = f"{type(error).__name__}: {error}"[:300]
            reply = json.dumps({"error": "raised", "message": message}).encode()
        limits.stop()
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
        if over:
            return


if __name__ == "__main__":
    main()
