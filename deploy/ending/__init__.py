"""How a command ends: signals, errors, exit codes. Runs in the driver."""
