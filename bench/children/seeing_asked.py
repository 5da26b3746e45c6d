"""Accuracy of a run on images that were held out: python -m bench.children.seeing_asked SPEC.json"""

from __future__ import annotations

from bench.children.common import spec, tell
from tunesmith import api


def main() -> None:
    """Measure on each of the folders, and tell."""
    wanted = spec()
    found = {}
    for name, folder in wanted["folders"].items():
        report = api.evaluate(wanted["run"], data=folder, split="valid", metrics=["accuracy"])
        found[name], found[f"{name}_interval"] = report["accuracy"], report["accuracy_interval"]
    tell("asked", **found)


if __name__ == "__main__":
    main()
