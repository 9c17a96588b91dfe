"""The terminal of a run. Runs in the driver."""
