"""Finds or starts, joins and leaves the Ray cluster. Runs in the driver."""
