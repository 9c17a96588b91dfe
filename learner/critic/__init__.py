"""Critics that are trained before a run. Runs in the driver and in every trainer rank."""
