"""What a load did with what was saved: the parts that did not find a place, or found nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from zerort.checkpoint.fit import Fit
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.match import Match, extra_labels, some_of
from zerort.checkpoint.state import extra_states

__all__ = ["LoadRecord", "record_of"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class LoadRecord:
    """The last load of an engine."""

    path: str
    """The checkpoint, DIR/TAG."""
    stayed: tuple[str, ...] = ()
    """Parameters, buffers and extra states that kept their present value: the checkpoint lacks
    them.
    """
    unused: tuple[str, ...] = ()
    """What the checkpoint holds and the model lacks."""
    fresh: tuple[str, ...] = ()
    """Trained parameters for which the checkpoint has no state of the optimizer."""
    dropped: tuple[str, ...] = ()
    """Parameters of whose state in the checkpoint nothing came: the optimizer does not hold them
    now.
    """
    not_restored: tuple[str, ...] = ()
    """What does not fit this run, a sentence each: random numbers of another number of ranks."""

    def log(self) -> None:
        """Says all of it, once."""
        for message, names, level in (
            ("stay at their present values, for the checkpoint lacks them", self.stayed, _WARN),
            ("are not taken, for the model lacks them", self.unused, _WARN),
            ("start with a fresh state of the optimizer", self.fresh, _INFO),
            (
                "lose their state of the optimizer, which does not hold them now",
                self.dropped,
                _INFO,
            ),
        ):
            if names:
                _log.log(level, "load of %s: %s %s", self.path, some_of(names), message)
        for sentence in self.not_restored:
            _log.warning("load of %s: %s", self.path, sentence)


_INFO, _WARN = logging.INFO, logging.WARNING


def record_of(
    path: str, manifest: Manifest, module: nn.Module, match: Match, fit: Fit
) -> LoadRecord:
    """The record of a load that is about to be applied."""
    stayed, unused = list(match.stayed), list(match.unused)
    if match.weights:
        extra = {name for name, _ in extra_states(module)}
        stayed += extra_labels(sorted(extra - manifest.extra_state.keys()))
        unused += extra_labels(sorted(manifest.extra_state.keys() - extra))
    return LoadRecord(
        path,
        tuple(stayed),
        tuple(unused),
        match.fresh,
        match.dropped,
        fit.reasons,
    )
