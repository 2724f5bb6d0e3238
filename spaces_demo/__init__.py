"""Demonstrations on the sample pages and pictures: `python -m spaces_demo.sample_run`, or `make demo`."""
