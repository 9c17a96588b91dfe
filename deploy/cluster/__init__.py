"""Ray's cluster: found or started, joined, left. Runs in the driver."""
