"""Which DeepSpeed the names are of."""

__all__ = ["SURFACE", "VERSION"]

SURFACE = "0.19.8"
"""Its calls and modules are answered for."""

VERSION = f"{SURFACE}+zerort"
"""What those who ask for DeepSpeed's version compare with; the local part says who answers."""
