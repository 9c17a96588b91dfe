"""`ratchet evaluate --variance`: what the critic bought, from a journal and a checkpoint. Runs in the driver."""
