"""Speed and memory: `pytest benchmarks --benchmark-only`, and scripts that run from the repository's root as
`python -m benchmarks.NAME`."""
