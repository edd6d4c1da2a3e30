"""Configuration: DeepSpeed's JSON, read strictly into frozen, typed models.

`load` is the way in, `Config` what comes out, `describe` says what each key of a file will do.
Nothing is ignored in silence: a key is acted upon, listed in `Config.ignored` because it could only
tune speed elsewhere, or refused.
"""

from zerort.config.batch import Batch
from zerort.config.loading import describe, load, load_part
from zerort.config.model import Config

__all__ = ["Batch", "Config", "describe", "load", "load_part"]
