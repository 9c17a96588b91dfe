"""Trackers that get a run's numbers, such as TensorBoard. Runs in the driver."""
