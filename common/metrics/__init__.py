"""Metrics: a table of all of them, and how their values are recorded. Runs anywhere."""

from common.metrics.step import StepMetrics as Metrics

__all__ = ["Metrics"]
