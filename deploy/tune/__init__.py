"""`ratchet tune`: trials of a config with other settings, and what they say about each setting. Runs in the driver."""
