"""Benchmarks of speed and memory. Run them by `pytest benchmarks --benchmark-only`, or as scripts from the repository's
root by `python -m benchmarks.NAME`."""
