"""Reward sources, the reward service that asks them, and the reference policy.

`kinds` has the table of all kinds of source. Each kind has a file `..._source`. Runs in each reward and reference
replica, and in the driver for the checks before a run.
"""
