"""The replicas of a role and the calls to them. Runs in the driver."""
