"""Runs the schedule: what the core allows is carried out, in the order of the list."""
