"""Doors for those who come from elsewhere: `compat.deepspeed` answers to DeepSpeed's name.

Nothing else in the package imports this room.
"""
