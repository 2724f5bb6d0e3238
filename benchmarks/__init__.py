"""Benchmarks: `make bench`, or one of them by `python -m benchmarks.encoder`. See README.md beside this file."""
