"""Proofs about a run directory, which only read it: audit and replay. Runs in `ratchet audit` and `ratchet replay`."""
