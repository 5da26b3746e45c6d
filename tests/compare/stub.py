"""Stands in for tunesmith.cells in a process of its own: `python -m tests.compare.stub` does what its task says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    """Read the task as a line, then end as `task["do"]` asks."""
    task = json.loads(sys.stdin.readline())
    folder = Path(task["folder"])
    folder.mkdir(parents=True)
    (folder / "pid").write_text(str(os.getpid()), encoding="utf-8")
    sys.stderr.write("said on stderr\n")
    if task["do"] == "result":
        (folder / "result.json").write_text("{}", encoding="utf-8")
    elif task["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif task["do"] == "abort":
        os.abort()
    elif task["do"] == "wait":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / "stopped").touch()
            return 130
    return int(task.get("code", 0))


if __name__ == "__main__":
    sys.exit(main())
