"""Generated programs: what they must not do, they cannot; what they may do, they can.

Every fault is small enough to do no harm if nothing held it. Twice each: with the kernel's filter where there is one,
and with Python's audit hook alone, which is what other systems have.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import socket
import subprocess
import sys
import threading
import time

import pytest

from tunesmith.errors import ResourceError
from tunesmith.evaluate import containment, program_worker
from tunesmith.evaluate.containment import Limits, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="NOT TESTED: this system cannot limit a process")
FILTERED = sys.platform.startswith("linux") and platform.machine() in program_worker.ARCHITECTURES
SMALL = Limits(seconds=1, memory=512)

BOMB = "import os\nfor _ in range(5):\n    os.fork()\n"  # 32 processes if nothing held it
BOMB_CAUGHT = "import os\nfor _ in range(5):\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
REFUSED = {
    "fork bomb": BOMB,
    "a process by subprocess": "import subprocess\nsubprocess.run(['true'])",
    "a process by the shell": "import os\nif os.system('true'):\n    raise OSError('refused')",
    "another program in its place": "import os\nos.execv('/bin/true', ['true'])",
    "10 GB at once": "held = bytearray(10 << 30)",
    "10 GB by and by": "held = []\nwhile len(held) < 10240:\n    held.append(bytes(1 << 20))",
    "its folder removed": "import os, shutil\nshutil.rmtree(os.getcwd())",
    "its file removed": "import os\nos.remove('program.py')",
    "its folder renamed": "import os\nos.rename(os.getcwd(), os.getcwd() + '-gone')",
    "a file made": "open('made', 'w')",
    "a file made by descriptor": "import os\nos.open('made', os.O_CREAT | os.O_WRONLY)",
    "a file written over": "open('program.py', 'r+')",
    "a folder made": "import os\nos.mkdir('made')",
    "a link made": "import os\nos.symlink('program.py', 'made')",
    "a mode changed": "import os\nos.chmod('program.py', 0)",
    "a socket": "import socket\nsocket.socket()",
    "a pair of sockets": "import socket\nsocket.socketpair()",
    "a connection": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
    "a signal to its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "a higher limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))",
}
ERRORS = (
    "PermissionError", "MemoryError", "OSError", "URLError",
    "ValueError: not allowed to raise maximum limit",
)  # fmt: skip
FINE = """
import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import operator, os, random, re, statistics, string, sys, time, typing
assert hashlib.md5(b"a").hexdigest() == "0cc175b9c0f1b6a831c399e269772661"
assert re.findall(r"\\d+", "a1b22") == ["1", "22"] and statistics.median([1, 2, 3]) == 2
assert decimal.Decimal("0.1") + 1 == decimal.Decimal("1.1") and fractions.Fraction(1, 2) * 2 == 1
assert os.listdir(".") == ["program.py"] and open("program.py").read().startswith("\\nimport")
time.sleep(0.01)
print("said", random.random(), datetime.datetime.now(), file=sys.stderr)
"""


@pytest.fixture(params=["kernel", "hook"])
def kernel(request) -> bool:
    if request.param == "kernel" and not FILTERED:
        pytest.skip("NOT TESTED: no filter of system calls is known for this system")
    return request.param == "kernel"


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_must_not_do_it_cannot(what, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(containment.tempfile, "tempdir", str(tmp_path))
    ending = run_program(REFUSED[what], SMALL, kernel=kernel)
    assert ending.how == "failed", ending
    assert ending.detail.startswith(ERRORS), ending
    assert ending.by_kernel is kernel
    assert list(tmp_path.iterdir()) == [], "its folder is gone, and nothing else has come"


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"], ids=["busy", "asleep"])
def test_a_program_without_an_end_is_ended(program, monkeypatch):
    monkeypatch.setattr(containment, "GRACE", 0.5)
    began = time.monotonic()
    assert run_program(program, SMALL).how == "timed out"
    assert time.monotonic() - began < 30


def test_the_kernel_counts_the_seconds():
    """The clock on the wall would give it ten more."""
    busy = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    began = time.monotonic()
    assert run_program(busy, SMALL, kernel=False).how == "timed out"
    assert time.monotonic() - began < containment.GRACE, "or the machine gave it no time at all"


def test_a_bomb_that_minds_no_refusal_leaves_no_process(kernel):
    def children() -> str:
        return subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout

    assert run_program(BOMB_CAUGHT, SMALL, kernel=kernel).how in ("passed", "failed")
    assert "tunesmith-program-" not in children()


def test_machine_code_cannot_either():
    if not FILTERED:
        pytest.skip("NOT TESTED: no filter of system calls is known for this system")
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = [
    libc.fork, lambda: libc.socket(2, 1, 0), lambda: libc.unlink(b"program.py"), lambda: libc.unshare(0),
    lambda: libc.memfd_create(b"m", 0), lambda: libc.mount(0, b"/", 0, 4096, 0), lambda: libc.setuid(1),
    lambda: libc.prlimit(0, 7, bytes(16), 0), lambda: libc.syscall(435, 0, 0), lambda: libc.syscall(425, 8, 0),
    lambda: libc.syscall(437, -100, b"a", 0, 0),
]

for number, call in enumerate(calls):
    assert call() == -1 and ctypes.get_errno() in (1, 38), number
import threading
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    raise AssertionError("a thread")
"""
    assert run_program(program, SMALL).how == "passed"


def test_a_listening_neighbour_hears_nothing(kernel):
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert run_program(program, SMALL, kernel=kernel).how == "failed"
        try:
            heard.append(server.accept())
        except TimeoutError:
            pass
    assert heard == []


def test_what_it_may_do_it_can(kernel):
    ending = run_program(FINE, Limits(), kernel=kernel)
    assert ending.passed, ending


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "it ended without a verdict (exit status 0)"),
        ("def f(:", "SyntaxError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("raise ValueError('x' * 10_000)", "ValueError: xxx"),
        ("import os\nos.closerange(0, 64)", "it ended without a verdict"),
        ("import os\nwhile True:\n    os.write(3, b'x' * 4096)", "OSError"),
    ],
)
def test_how_a_program_failed_is_said(program, detail):
    ending = run_program(program, SMALL)
    assert (ending.how, ending.passed) == ("failed", False)
    assert detail in ending.detail or "without a verdict" in ending.detail and "write(3" in program
    assert len(ending.detail) <= 300


def test_output_goes_nowhere(capfd):
    assert run_program("for _ in range(1000):\n    print('x' * 1000)", SMALL).passed
    assert capfd.readouterr() == ("", "")


def test_nothing_of_the_environment_is_inherited(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'secret' not in str(os.environ)", SMALL).passed


def test_many_side_by_side_keep_their_order():
    endings = run_programs([f"assert {n} % 2" for n in range(6)], SMALL, at_once=2)
    assert [ending.passed for ending in endings] == [False, True] * 3
    assert threading.active_count() < 10


def test_memory_too_small_for_python_is_an_error_not_a_failed_program():
    with pytest.raises(ResourceError, match="did not start.*raise the memory limit"):
        run_program("x = 1", Limits(seconds=1, memory=1))


def test_an_enormous_program_is_not_started(monkeypatch):
    monkeypatch.setattr(containment.subprocess, "Popen", None)
    assert "the limit is" in run_program("#" * (containment.MAX_SOURCE + 1)).detail


def test_the_numbers_of_the_calls_are_libseccomps():
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("NOT TESTED: libseccomp is not here to compare with")
    number_of = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    calls = {
        **program_worker.ALLOWED, "open": program_worker.OPEN, "openat": program_worker.OPENAT,
        "ioctl": program_worker.IOCTL, "fcntl": program_worker.FCNTL, "prlimit64": program_worker.PRLIMIT,
        "kill": program_worker.KILL, "tgkill": program_worker.TGKILL,
    }  # fmt: skip
    for audit, column in program_worker.ARCHITECTURES.values():
        known = {call: number_of(ctypes.c_uint32(audit), call.encode()) for call in calls}
        wrong = {
            call: (numbers[column], known[call])
            for call, numbers in calls.items()
            if max(known[call], -1) != numbers[column]
        }
        assert wrong == {}
