"""The training loop and what it keeps: prompts, buffer, journal, evaluations. Runs in the driver; imports no torch."""
