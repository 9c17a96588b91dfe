"""Metrics: a table of all of them, and how their values are recorded. Runs anywhere."""
