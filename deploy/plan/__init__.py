"""The plan of a run: the memory of every process, the node that it runs on, and whether everything fits. Runs in the
driver."""
