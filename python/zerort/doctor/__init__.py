"""`zerort doctor`: what of a machine and of a process decides whether a run starts."""
