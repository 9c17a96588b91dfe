"""The ranks of both trainers: their group, collectives, checkpoint, optimizer. Runs in the driver and in every rank."""
