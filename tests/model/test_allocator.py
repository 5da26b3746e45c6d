"""The allocator of large CPU tensors: what is held stays within the peak of what was live, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tunesmith.model import allocator

needed = pytest.mark.skipif(not allocator.can_be_used(), reason="NOT TESTED: Linux and a C++ compiler are needed")
MIB = 1 << 20


def in_child(code: str) -> dict[str, int]:
    """Run `code` in a process of its own, since an allocator cannot be taken back; it fills `told`."""
    before = "import json, torch\nfrom tunesmith.model import allocator\ntold = {}\nMIB = 1 << 20\n"
    words = [sys.executable, "-c", before + textwrap.dedent(code) + "\nprint(json.dumps(told))"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@needed
def test_what_is_freed_is_used_again_and_what_is_held_is_bounded() -> None:
    told = in_child(
        """
        assert allocator.use() is None and allocator.in_use()
        assert allocator.use() is None  # a second time changes nothing
        worst = 0
        for step in range(30):
            size = (200, 263, 131, 240)[step % 4] * MIB // 400  # float32 numbers: 2 to 2.6 MB
            kept = [torch.full((size,), float(i)) for i in range(60)]
            temporary = [torch.zeros(3 * size) for _ in range(2)]
            assert all(float(t[0]) == i and float(t[-1]) == i for i, t in enumerate(kept))
            del kept, temporary
            found = allocator.counts()
            worst = max(worst, found.held - found.peak)
            if step == 7:
                mapped, taken = found.mapped, 0
            if step > 7:
                taken += 4 * 66 * size
        told |= {"worst": worst, "again": found.mapped - mapped, "taken": taken, "live": found.live, "peak": found.peak}
        allocator.release()
        told["left"] = allocator.counts().held
        """
    )
    assert told["worst"] <= allocator.SLACK
    assert told["peak"] >= 60 * 4 * 263 * MIB // 400
    assert told["again"] < told["taken"] / 2  # though each step has other sizes than the one before
    assert told["left"] == told["live"]


@needed
def test_resident_memory_follows_the_peak_of_live_tensors() -> None:
    told = in_child(
        """
        from tunesmith.train.memory import resident_memory
        allocator.use()
        start = resident_memory()[0]
        for size in (20, 33, 47, 25, 50):
            kept = [torch.ones(size * MIB // 40) for _ in range(30)]
            del kept
        told |= {"rss": resident_memory()[1] - start, "peak": allocator.counts().peak}
        """
    )
    assert told["rss"] <= told["peak"] + allocator.SLACK + 8 * MIB


@needed
def test_numbers_stay_where_they_are_and_pages_are_used_again() -> None:
    told = in_child(
        """
        import random, resource
        from tunesmith.train.memory import resident_memory
        allocator.use()
        draw, live, worst, before = random.Random(0), [], 0, resident_memory()[0]
        def turn(i):
            global worst
            while live and (len(live) > 40 or draw.random() < 0.45):
                value, t = live.pop(draw.randrange(len(live)))
                assert bool((t == value).all()), value
            size = int(draw.choice([0.3, 1, 2.5, 3, 7, 12, 20]) * draw.uniform(0.9, 1.1) * MIB) // 4
            live.append((i, torch.full((size,), float(i))))
            found = allocator.counts()
            worst = max(worst, found.held - found.peak)
            return 4 * size
        for i in range(500):
            turn(i)
        at, mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, allocator.counts().mapped
        taken = sum(turn(i) for i in range(500, 1500))
        told |= {"taken": taken, "faults": 4096 * (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - at)}
        told |= {"mapped": allocator.counts().mapped - mapped, "worst": worst}
        told |= {"held": allocator.counts().held, "rss": resident_memory()[0] - before}
        assert all(bool((t == value).all()) for value, t in live)
        live.clear()
        allocator.release()
        told |= {"live": allocator.counts().live, "left": allocator.counts().held}
        """
    )
    assert told["worst"] <= allocator.SLACK and told["live"] == told["left"] == 0
    assert told["rss"] <= told["held"] + 8 * MIB  # what it believes to hold
    assert told["mapped"] > told["taken"] / 20  # many blocks were new ones,
    assert told["faults"] < told["mapped"] / 4  # and were made of old pages


@needed
def test_ends_of_longer_blocks_are_taken_and_nothing_else() -> None:
    told = in_child(
        """
        allocator.use()
        long = [torch.ones(10 * MIB // 4) for _ in range(20)]; del long
        live = [(i, torch.full((27 * MIB // 16,), float(i))) for i in range(29)]  # 6.75 MiB: 20 stand in longer blocks
        told["same"] = sum(bool((t == value).all()) for value, t in live)
        found = allocator.counts()
        told |= {"over": found.held - found.peak, "mapped": found.mapped}
        """
    )
    assert told["same"] == 29
    assert told["over"] <= allocator.SLACK
    assert (
        told["mapped"] >= 200 * MIB + 9 * 27 * MIB // 4
    )  # beside them nine new blocks, more than the bound leaves free


@needed
def test_too_much_is_an_error_that_says_so_and_leaves_the_rest_usable() -> None:
    told = in_child(
        """
        import resource
        from tunesmith.errors import is_out_of_memory
        allocator.use()
        cached = torch.ones(64 * MIB // 4); del cached
        taken = int(next(s for s in open("/proc/self/status") if s.startswith("VmData")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (taken + 80 * MIB, taken + 80 * MIB))
        torch.ones(100 * MIB // 4)  # what waits is given back first
        try:
            torch.ones(400 * MIB // 4)
        except RuntimeError as error:
            told["said"] = is_out_of_memory(error)
        told["sum"] = float(torch.ones(MIB).sum())
        told["live"] = allocator.counts().live
        """
    )
    assert told == {"said": True, "sum": float(MIB), "live": 0}


@needed
def test_threads_share_it() -> None:
    told = in_child(
        """
        from concurrent.futures import ThreadPoolExecutor
        allocator.use()
        def work(seed):
            for i in range(200):
                t = torch.full((100_000 + 1000 * ((seed * 37 + i) % 50),), float(seed))
                assert float(t[0]) == float(t[-1]) == float(seed)
            return True
        with ThreadPoolExecutor(8) as pool:
            told["ok"] = all(pool.map(work, range(8)))
        told["live"] = allocator.counts().live
        """
    )
    assert told == {"ok": True, "live": 0}


def test_where_it_is_not_wanted_malloc_stays() -> None:
    told = in_child(
        """
        told["said"] = "as configured" in allocator.use(False)
        told["used"] = allocator.in_use()
        told["counts"] = allocator.counts() is None
        """
    )
    assert told == {"said": True, "used": False, "counts": True}


def test_without_a_compiler_a_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator._library.cache_clear()
    monkeypatch.setattr(allocator, "compiler", lambda: None)
    try:
        assert not allocator.can_be_used()
        if not allocator.in_use():
            assert "no C++ compiler" in (allocator.use() or "")
    finally:
        allocator._library.cache_clear()
