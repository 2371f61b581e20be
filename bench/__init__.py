"""Measurements: `python -m bench.run` takes them, `python -m bench.report` writes docs/benchmarks.md from them."""
