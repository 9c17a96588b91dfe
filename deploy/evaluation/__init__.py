"""`ratchet evaluate`: several policies on the same held-out prompts. Runs in the driver."""
