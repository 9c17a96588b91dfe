"""Reward sources and the reference policy. Runs in each reward or reference replica."""
