"""What an engine does beside gradients, one file each: a feature hangs on the events of a step
(`step.events`), and is a row in the table here.

A row is a function from a `Site` to the feature, or to None where the configuration does not ask
for it. What is wrong is a `ConfigError`, raised while the engine is made, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from zerort.features.communication import Communication
from zerort.features.eigenvalue import BlockEigenvalue
from zerort.features.flops import FlopsProfile
from zerort.features.layer_drop import LayerDrop
from zerort.features.monitors.reporting import Monitored
from zerort.features.progress_line import ProgressLine
from zerort.features.quantize import QuantizedTraining
from zerort.features.site import Site
from zerort.features.throughput import Throughput
from zerort.features.timers import Timers
from zerort.features.trace_mark import TraceMark
from zerort.features.tuned import open_tuning
from zerort.optim import NoOptimizer
from zerort.step.events import Events, Feature

__all__ = ["FEATURES", "Site", "open_features"]

FEATURES: Sequence[Callable[[Site], Feature | None]] = (
    LayerDrop.open,
    BlockEigenvalue.open,
    QuantizedTraining.open,
    Throughput.open,
    Timers.open,
    Communication.open,
    ProgressLine.open,
    FlopsProfile.open,
    Monitored.open,
    TraceMark.open,
    open_tuning,
)
"""In the order in which they hear an event."""


def open_features(site: Site) -> Events:
    """The features that the configuration asks for; none for an engine that takes no step. Those
    that are open are closed again where one raises.
    """
    if isinstance(site.parts.boundary.optimizer, NoOptimizer):
        return Events()
    with ExitStack() as undo:
        for row in FEATURES:
            feature = row(site)
            if feature is not None:
                undo.callback(feature.close)
                site.features.append(feature)
        undo.pop_all()
    return Events(site.features)
