"""Launches runs: the command line, the processes of a run, shipped configs and tasks. Runs in the driver."""
