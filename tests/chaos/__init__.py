"""Kills real runs at named points and at random times, and checks that nothing is lost: `make chaos`."""
