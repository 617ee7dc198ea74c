"""Complete programs to copy from, one file each. They run without arguments as `python -m examples.NAME`."""
