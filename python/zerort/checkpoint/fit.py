"""What of a checkpoint's small state fits this run: random numbers, place in the data, schedules.

What does not fit is left out, with a sentence that says so; nothing is dropped in silence. The
place in the data is counted in samples over all ranks, and fits any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zerort import _core
from zerort.checkpoint.encoding import Json
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.match import LoadOptions
from zerort.checkpoint.state import EngineState, scheduler_name

__all__ = ["Fit", "fit"]


@dataclass(frozen=True)
class Fit:
    """What a rank takes of the small state, as the manifest has it."""

    random: Json = None
    loader: Json = None
    wire: Json = None
    writer: int = 0
    """The rank whose file holds the tensors of the three."""
    reasons: tuple[str, ...] = ()
    """Why something is not taken, a sentence each."""


def fit(manifest: Manifest, state: EngineState, options: LoadOptions) -> Fit:
    """What this rank takes; reads nothing."""
    if options.module_only:
        return Fit()
    reasons = [*(_of_optimizer(manifest, state) if options.optimizer else ())]
    reasons += _of_scheduler(manifest, state) if options.scheduler else ()
    reasons += _of_loss_scale(manifest, state)
    reasons += _of_features(manifest, state)
    saved, world, rank = manifest.world, state.comm.world, state.comm.rank
    same = saved == world
    if not same:
        reasons.append(
            f"random numbers are not restored: each rank has its own, {saved} saved, {world} load"
        )
    own = manifest.ranks[rank if same else 0]
    loader = own.get("loader") if hasattr(state.loader, "load_state_dict") else None
    if loader is None and state.loader is not None:
        reasons.append("the place in the data is not restored: the checkpoint has none")
    wire = own.get("wire") if options.optimizer else None
    reason = _of_wire(wire, state, saved if not same else None)
    if reason:
        reasons.append(reason)
    if reason or not same:
        wire = None
    random = own.get("rng") if same else None
    return Fit(random, loader, wire, rank if same else 0, tuple(reasons))


def _of_wire(saved: Json, state: EngineState, ranks: int | None) -> str | None:
    """Why error feedback begins anew, where it was saved or was to be; `ranks` have saved it, if
    they were others.
    """
    have = state.reduction.local.wire_state()
    held = isinstance(saved, dict) and bool(saved.get("residuals"))
    if not held:
        wanted = state.keeps_feedback and have.residuals
        return "error feedback begins anew: the checkpoint has none" if wanted else None
    if not have.residuals:
        return "error feedback is not taken: it is off"
    if ranks is not None:
        return (
            f"error feedback begins anew: each rank has its own, {ranks} saved, "
            f"{state.comm.world} load"
        )
    if saved.get("layout") != have.layout:
        return "error feedback begins anew: gradients were in other buckets when this was saved"
    return None


def _of_optimizer(manifest: Manifest, state: EngineState) -> Iterator[str]:
    have, saved = state.optimizer.name, manifest.optimizer
    if have is not None and saved is None:
        yield f"the optimizer {have} starts anew: the checkpoint has none"
    if have is None and saved is not None:
        yield f"the state of the optimizer {saved.name} is not taken: there is none"


def _of_scheduler(manifest: Manifest, state: EngineState) -> Iterator[str]:
    have = scheduler_name(state.scheduler)
    if have is not None and manifest.scheduler is None:
        yield f"the scheduler {have} stays as it is: the checkpoint has none"
    if have is None and manifest.scheduler is not None:
        yield f"the state of the scheduler {manifest.scheduler.name} is not taken: there is none"


def _of_loss_scale(manifest: Manifest, state: EngineState) -> Iterator[str]:
    dynamic = isinstance(state.loss_scale, _core.LossScale)
    if dynamic and manifest.loss_scale is None:
        yield "the loss scale starts anew: it was fixed, or there was none, when this was saved"
    if not dynamic and manifest.loss_scale is not None:
        yield "the loss scale is not restored: it is fixed here, or there is none"


def _of_features(manifest: Manifest, state: EngineState) -> Iterator[str]:
    have = state.events.state().keys()
    for name in sorted(have - manifest.features.keys()):
        yield f"{name} starts anew: it was off when this was saved"
    for name in sorted(manifest.features.keys() - have):
        yield f"the state of {name} is not taken: it is off"
