"""What a model costs: floating-point operations, parameters and time, by module.

The room needs no engine and no process group. What it is built on, torch's counter and rich, is
imported where it is used: every program imports this.
"""

from zerort.profiling.flops_profiler import FlopsProfiler, get_model_profile

__all__ = ["FlopsProfiler", "get_model_profile"]
