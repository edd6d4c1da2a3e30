"""Gradient communication for PyTorch: DeepSpeed's engine calls over a planned, static launch order.

engine, optimizer, loader, scheduler = zerort.initialize(model=model, config="config.json")
for batch in loader:
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
"""

import importlib
from typing import Any

from zerort import utils, zero
from zerort._core import __version__
from zerort.engine import Engine
from zerort.errors import (
    CheckpointError,
    CommError,
    ConfigError,
    LayoutError,
    NonFiniteGradient,
    PlanError,
    PlanMismatch,
    StepError,
    ZerortError,
)
from zerort.initialize import initialize
from zerort.mesh import init_distributed
from zerort.start.arguments import add_config_arguments

__all__ = [
    "CheckpointError",
    "CommError",
    "ConfigError",
    "Engine",
    "LayoutError",
    "NonFiniteGradient",
    "PlanError",
    "PlanMismatch",
    "StepError",
    "ZerortError",
    "__version__",
    "add_config_arguments",
    "init_distributed",
    "initialize",
    "utils",
    "zero",
]


def __getattr__(name: str) -> Any:
    # On demand: most programs do without it, and it would lengthen every start.
    if name == "profiling":
        return importlib.import_module("zerort.profiling")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
