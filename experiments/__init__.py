"""Quality: scripts that run from the repository's root as `python -m experiments.NAME`, and their results."""
