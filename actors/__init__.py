"""Generators, the reward service, the reference policy, and their pools. Runs in each replica and in the driver."""
