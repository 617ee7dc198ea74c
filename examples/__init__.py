"""Programs to copy from: each is complete, in one file, and runs without arguments as `python -m examples.NAME`."""
