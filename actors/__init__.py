"""Process roles: generators, the reward service, the reference policy, and the pool that makes them remote."""
