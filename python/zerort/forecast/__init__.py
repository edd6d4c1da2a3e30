"""What an engine will take and send, said before there is one.

The plan is the engine's own, made of a model without memory; sizes are `memory.sizes`'. What this
guarantees: between steps a rank's tensors are what is said here, to the padding. What it does not
do: it knows no activations, nothing that lives for the length of a call, and no time.
"""

from zerort.forecast.figures import Forecast, forecast
from zerort.forecast.job import Job
from zerort.forecast.models import made_by, of_size
from zerort.forecast.owners import Owners

__all__ = ["Forecast", "Job", "Owners", "forecast", "made_by", "of_size"]
