"""Every setting, as typed, frozen sections. Runs anywhere."""
