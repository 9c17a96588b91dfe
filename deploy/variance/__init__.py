"""`ratchet evaluate --variance`: how much noise of the gradient the critic removes. Runs in the driver."""
