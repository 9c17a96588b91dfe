"""Training of a reward model from preference pairs. Runs in each trainer rank, its loop in the driver."""
