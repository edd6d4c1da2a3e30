"""From `.grad` to reduced shards: hooks, what has come, where it waits, and passes."""
