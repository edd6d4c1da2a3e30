"""The rows of the table in `keys`, a file for what belongs together."""
