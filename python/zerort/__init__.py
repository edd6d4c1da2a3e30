"""Gradient communication for PyTorch: DeepSpeed's engine calls over a planned, static launch order.

engine, optimizer, loader, scheduler = zerort.initialize(model=model, config="config.json")
for batch in loader:
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
"""

from zerort import checkpointing, profiling, utils, zero
from zerort._core import __version__
from zerort.engine import Engine
from zerort.errors import (
    CheckpointError,
    CommError,
    ConfigError,
    LayoutError,
    NonFiniteGradient,
    NotBuiltError,
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
    "NotBuiltError",
    "PlanError",
    "PlanMismatch",
    "StepError",
    "ZerortError",
    "__version__",
    "add_config_arguments",
    "checkpointing",
    "init_distributed",
    "initialize",
    "profiling",
    "utils",
    "zero",
]
