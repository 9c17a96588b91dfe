"""The end of a command: signals, errors, exit codes. Runs in the driver."""
