"""Programs behind the numbers in docs/; each is run with `python -m benchmarks.PACKAGE.NAME`."""
