"""The name `deepspeed`, answered by zerort.

    import zerort.compat.deepspeed as shim

    shim.install()  # before what imports deepspeed

After `install` everything that does `import deepspeed` gets zerort: Accelerate, the Trainer of
transformers, PEFT, TRL, and loops of one's own. Names that zerort has no answer for are there too,
and raise `NotBuiltError` with their dotted name when they are used, not when they are imported.

`install` puts one finder in front of Python's own and nothing else; the modules are made when they
are imported. A DeepSpeed that is installed is not hidden unless `shadow` says so.
"""

from __future__ import annotations

from zerort.errors import ConfigError
from zerort_as_deepspeed import install as finder
from zerort_as_deepspeed.version import SURFACE, VERSION

__all__ = ["SURFACE", "VERSION", "install", "is_installed"]

is_installed = finder.is_installed


def install(shadow: bool | None = None) -> None:
    """Lets `import deepspeed`, and who asks for its version, find zerort. A second call does
    nothing.

    Call it before transformers, TRL or anything else that looks for DeepSpeed is imported. A
    DeepSpeed that is installed is hidden in this process where `shadow` is true (by default: where
    the variable ZERORT_AS_DEEPSPEED is "shadow"), never changed. Raises `ConfigError` where one is
    installed and may not be hidden, where one has been imported already, and where Accelerate or
    transformers has looked already and found none.
    """
    try:
        finder.install(shadow)
    except finder.Refused as reason:
        raise ConfigError(str(reason)) from None
