"""How a run is launched: the command line, who runs where, shipped configs and tasks."""
