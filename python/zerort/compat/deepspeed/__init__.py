"""The name `deepspeed`, answered by zerort.

    import zerort.compat.deepspeed as shim

    shim.install()  # before what imports deepspeed

After `install` everything that does `import deepspeed` gets zerort: Accelerate, the Trainer of
transformers, PEFT, TRL, and loops of one's own. Names that zerort has no answer for are there too,
and raise `NotBuiltError` with their dotted name when they are used, not when they are imported.

`install` puts one finder in front of Python's own and nothing else; the modules are made when they
are imported. A DeepSpeed that is installed is not hidden unless `shadow` says so.
"""

from zerort.compat.deepspeed.install import install, is_installed
from zerort.compat.deepspeed.version import SURFACE, VERSION

__all__ = ["SURFACE", "VERSION", "install", "is_installed"]
