"""Random small networks, composites and queries against an oracle (see `tests/fuzzing.py`)."""
