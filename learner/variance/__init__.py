"""How noisy the policy gradient of a batch is. Runs in every rank of `ratchet evaluate --variance`."""
