"""Benchmarks: `python -m benchmarks.run`. See README.md beside this file."""
