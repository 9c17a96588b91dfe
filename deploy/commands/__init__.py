"""The commands of `ratchet`, by subject. Runs in the driver."""
