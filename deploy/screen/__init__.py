"""What a terminal shows. Runs in the driver."""
