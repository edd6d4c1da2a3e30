"""Which run made a checkpoint, so that runs that share a folder do not delete one another's.

A run is one life of the training processes. What it loads makes the run that saved that, and all
that one went on from, its ancestors: a run that was restarted prunes what it saved before.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from zerort.checkpoint.manifest import ANCESTOR_LIMIT, Manifest

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """This run and those that it goes on from."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ancestors: tuple[str, ...] = ()
    """The latest first."""

    def behind(self, loaded: Manifest) -> Run:
        """This run, now that it goes on from a checkpoint."""
        chain = dict.fromkeys((loaded.run, *loaded.ancestors, *self.ancestors))
        chain.pop(self.id, None)
        return Run(self.id, tuple(chain)[:ANCESTOR_LIMIT])

    def made(self, manifest: Manifest) -> bool:
        """Whether the checkpoint is this run's, or its ancestors'."""
        return manifest.run == self.id or manifest.run in self.ancestors
