"""DeepSpeed's public names of stage 3."""

from zerort.zero.gathered import GatheredParameters

__all__ = ["GatheredParameters"]
