"""Not DeepSpeed: zerort, by its name. This module puts the one of `zerort.compat.deepspeed` in its
own place.
"""

stands_for_zerort = True

try:
    from zerort_as_deepspeed.install import take_place
except ModuleNotFoundError as error:
    raise ImportError(
        "the distribution `deepspeed` that is installed here stands for zerort, and zerort is not "
        "installed: install it, or uninstall this one and install DeepSpeed"
    ) from error

take_place()
