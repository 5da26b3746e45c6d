"""The process in which a generated program runs: started as a script by containment.py, standard library only.

Limits on time, memory and file sizes are the kernel's (setrlimit). On Linux a seccomp filter then allows what computing
and reading files need, and refuses every other system call: no process or thread, no socket, no signal to others, no
file written, renamed or removed, no limit raised. Where the kernel also allows a user namespace, this process has no
network device either. Elsewhere Python's audit events are refused instead: that stops Python code, not machine code.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

REPORT_BYTES = 1 << 16  # the largest file that may grow: what is said about the program
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column below
# name: numbers on x86-64 and aarch64 (-1: the architecture has no such call)
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, -1), "pipe": (22, -1), "select": (23, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "chdir": (80, 49), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278),
    "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
OPEN, OPENAT, IOCTL, FCNTL = (2, -1), (257, 56), (16, 29), (72, 25)  # allowed by their arguments
PRLIMIT, KILL, TGKILL = (302, 261), (62, 129), (234, 131)
WRITES = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, O_TMPFILE
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC: none makes signals
NEWEST = 424  # from here on both architectures have the same numbers, and libraries expect ENOSYS of a call not there
LD, JEQ, JGE, JSET, RET = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, KILL_PROCESS, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
# Audit events that the fallback refuses: by their beginning, and modules by name.
EVENTS = (
    "socket.", "subprocess.", "shutil.", "ctypes.", "resource.", "fcntl.", "pty.", "sqlite3.", "os.fork",
    "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr",
    "os.removexattr", "os.lockf", "tempfile.", "signal.pthread_kill", "syslog.",
)  # fmt: skip
MODULES = frozenset({"ctypes", "_ctypes", "_posixsubprocess", "_posixshmem", "_multiprocessing", "multiprocessing"})


def set_limits(seconds: int, memory: int) -> list[str]:
    """Limit this process to seconds of CPU and bytes of address space; says what holds."""
    wanted: dict[str, tuple[int, int]] = {
        "RLIMIT_CPU": (seconds, seconds + 1),  # a signal, and a second later the end
        "RLIMIT_AS": (memory, memory),
        "RLIMIT_FSIZE": (REPORT_BYTES, REPORT_BYTES),
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_NPROC": (0, 0),  # not for root, nor where there are no processes of a user to count
        "RLIMIT_CORE": (0, 0),
    }
    held = []
    for name, limit in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), limit)
        except (AttributeError, OSError, ValueError):
            continue
        held.append(name)
    return held


def instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    """One struct sock_filter: jumps count the instructions that are passed over."""
    return struct.pack("=HBBI", code, yes, no, k)


def argument(number: int, high: bool = False) -> bytes:
    """Load 32 bits of an argument of the call (struct seccomp_data; both architectures are little-endian)."""
    return instruction(LD, 16 + 8 * number + 4 * high)


def one_of(number: int, values: Iterable[int]) -> list[bytes]:
    """Allow where an argument is one of these."""
    tests = [part for value in values for part in (instruction(JEQ, value, 0, 1), instruction(RET, ALLOW))]
    return [argument(number), *tests, instruction(RET, EPERM)]


def without(number: int, bits: int) -> list[bytes]:
    """Allow where an argument has none of these bits."""
    return [argument(number), instruction(JSET, bits, 0, 1), instruction(RET, EPERM), instruction(RET, ALLOW)]


def null(number: int) -> list[bytes]:
    """Allow where a pointer is NULL."""
    return [
        argument(number), instruction(JEQ, 0, 0, 3), argument(number, high=True), instruction(JEQ, 0, 0, 1),
        instruction(RET, ALLOW), instruction(RET, EPERM),
    ]  # fmt: skip


def bpf_program(machine: str, pid: int) -> bytes:
    """The filter: what is listed is allowed, a few calls by their arguments, the rest is refused with EPERM."""
    audit, column = ARCHITECTURES[machine]
    conditions = {
        OPEN: without(1, WRITES), OPENAT: without(2, WRITES), IOCTL: one_of(1, IOCTLS), FCNTL: one_of(1, FCNTLS),
        PRLIMIT: null(2), KILL: one_of(0, [pid]), TGKILL: one_of(0, [pid]),
    }  # fmt: skip
    blocks = [(numbers[column], [instruction(RET, ALLOW)]) for numbers in ALLOWED.values()]
    blocks += [(numbers[column], block) for numbers, block in conditions.items()]
    program = [instruction(LD, 4), instruction(JEQ, audit, 1, 0), instruction(RET, KILL_PROCESS), instruction(LD, 0)]
    for number, block in blocks:
        if number >= 0:
            program += [instruction(JEQ, number, 0, len(block)), *block]
    return b"".join([*program, instruction(JGE, NEWEST, 0, 1), instruction(RET, ENOSYS), instruction(RET, EPERM)])


def confine() -> list[str]:
    """Give up what the kernel lets a process give up; empty where the filter cannot be had."""
    machine = platform.machine()
    if not sys.platform.startswith("linux") or machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        return []
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    libc.prctl(1, signal.SIGKILL, None, 0, 0)  # PR_SET_PDEATHSIG: do not outlive whoever started this
    spaces = libc.unshare(0x10000000 | 0x40000000 | 0x08000000) == 0  # CLONE_NEWUSER, NEWNET, NEWIPC
    program = bpf_program(machine, os.getpid())
    kept = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
    if libc.prctl(38, 1, None, 0, 0) or libc.prctl(22, 2, head, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        return []
    return ["seccomp filter", *(["network namespace"] if spaces else [])]


def refuse_events() -> list[str]:
    """The fallback: refuse Python's audit events that would start, send, signal, write or remove."""
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(args[2], int) and args[2] & writes
        if writing or event.startswith(EVENTS) or (event == "import" and args[0] in MODULES):
            raise PermissionError(f"{event}: not allowed here")

    sys.addaudithook(hook)
    return ["audit hook"]


def run(file: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Run the program; only one that comes to its end without an exception has passed."""
    try:
        runpy.run_path(file, run_name="__main__")
    except BaseException as error:  # whatever a generated program raises is a result, SystemExit too
        said = str(error) if not isinstance(error, MemoryError) else ""
        say({"passed": False, "detail": f"{type(error).__name__}: {said}"[:300]})
    else:
        say({"passed": True, "detail": ""})


def main(seconds: str, memory: str, kernel: str, file: str) -> None:
    """Confine this process, say on stdout what holds, run the program, say how it went."""
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def say(what: dict[str, Any]) -> None:
        os.write(report, json.dumps(what).encode() + b"\n")

    held = set_limits(int(seconds), int(memory))
    walls = confine() if kernel == "kernel" else []
    say({"held": [*(walls or refuse_events()), *held]})
    run(file, say)
    os._exit(0)  # no exit handlers of the program's


if __name__ == "__main__":
    main(*sys.argv[1:])
