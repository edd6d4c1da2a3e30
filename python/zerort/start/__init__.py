"""What `initialize` is made of: checks, comparisons between ranks, arguments and data."""
