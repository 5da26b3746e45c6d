"""Speed and memory of Tunesmith beside its peers: the same job in one run. See docs/benchmarks.md."""
