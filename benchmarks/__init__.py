"""Speed and memory of the nodes against the host's own: `python -m benchmarks --help`."""
