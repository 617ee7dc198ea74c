"""Measurements of quality, and their results. Run them in the repository's root as `python -m experiments.NAME`."""
