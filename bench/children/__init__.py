"""What runs in a process of its own: one file for each side. `python -m bench.children.NAME SPEC.json`."""
