"""From a loss to updated parameters: the micro-batch, its window, and its boundary."""
