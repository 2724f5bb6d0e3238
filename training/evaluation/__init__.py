"""Evaluation: text read, pictures recognised, one report."""
