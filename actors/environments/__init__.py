"""Environments, which answer the model in episodes of several turns.

Runs in each environment replica, and in the driver for the checks before a run.
"""
