"""How a run is started: the command line, the roles and their machines, shipped configs. Runs in the driver."""
