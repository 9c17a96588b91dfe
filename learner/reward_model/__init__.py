"""Training of a reward model from preference pairs. Runs in the driver and in every rank."""
