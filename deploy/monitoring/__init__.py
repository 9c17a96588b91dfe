"""The run's figures for Prometheus. Runs in the driver."""
