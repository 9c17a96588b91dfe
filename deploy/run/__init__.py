"""The run directory and what is recorded there. Runs in the driver."""
