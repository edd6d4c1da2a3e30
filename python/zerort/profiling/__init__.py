"""What a model costs: floating-point operations, parameters and time, by module.

The room needs no engine and no process group, and `import zerort` does not import it: torch's
counter, which it is built on, is loaded where it is used.
"""

from zerort.profiling.flops_profiler import FlopsProfiler, get_model_profile

__all__ = ["FlopsProfiler", "get_model_profile"]
