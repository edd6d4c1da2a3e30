"""The end of an accumulation window: wait for the sums, vote, and apply the step or refuse it, on
all ranks alike.

What it guarantees: no rank applies a step that any rank has reported as failed, parameters are
bitwise unchanged by a step that is not applied, and the innocent rank prints the culprit's reason.
What it does not do: it counts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from zerort import log
from zerort.errors import CommError, NonFiniteGradient, PlanMismatch, StepError
from zerort.grads.reduction import Reduction
from zerort.memory import FlatModel
from zerort.mesh import Mesh
from zerort.optim import Update
from zerort.run.changes import lost
from zerort.run.exchange import Exchange
from zerort.step.interrupts import held
from zerort.step.overlap import Overlap
from zerort.step.precision import LossScale
from zerort.step.standby import Standby
from zerort.step.vote import Ballot, Verdict, clip_factor, vote
from zerort.trace import TraceSink

__all__ = ["Boundary", "Outcome", "Policy"]

_log = logging.getLogger("zerort")


class Outcome(Enum):
    """What became of a step."""

    APPLIED = auto()
    SKIPPED = auto()
    """A gradient was not finite on some rank."""


@dataclass(frozen=True)
class Policy:
    """What the configuration decides about steps."""

    clip: float
    on_nonfinite: Literal["skip", "raise"]


@dataclass
class Boundary:
    """Crosses from gradients to parameters.

    `norm` is the last gradient's, averaged and unscaled, before clipping, and `overflow` says that
    it was not finite; `exposed` is the seconds that the host stood still for collectives since the
    boundary before. `half_updated` says how an update broke off on this rank, `ranks_differ` how
    what belongs to one did: either fails every vote until a checkpoint is loaded.
    """

    mesh: Mesh
    flat: FlatModel
    reduction: Reduction
    exchange: Exchange
    optimizer: Update
    loss_scale: LossScale
    policy: Policy
    sink: TraceSink
    overlap: Overlap
    norm: float | None = field(default=None, init=False)
    overflow: bool = field(default=False, init=False)
    exposed: float = field(default=0.0, init=False)
    half_updated: str | None = field(default=None, init=False)
    ranks_differ: str | None = field(default=None, init=False)
    has_unsaved: Callable[[], bool] = field(default=bool, init=False)
    """Whether a save beside training has failed on this rank."""
    unsaved: tuple[int, ...] = field(default=(), init=False)
    """The ranks on which one has, as of the last vote."""
    _waited: float = field(default=0.0, init=False)
    _explained: bool = field(default=False, init=False)
    _held: BaseException | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.standby = Standby(self.reduction, self.mesh.control)

    @property
    def broken(self) -> str | None:
        """Why no step may be applied until a checkpoint is loaded."""
        return self.half_updated or self.ranks_differ

    def mend(self) -> None:
        """A checkpoint has been loaded."""
        self.half_updated = self.ranks_differ = None

    def cross(
        self, divide_factor: float, failure: str | None = None, correction: float = 1.0
    ) -> Outcome:
        """Votes and steps. `divide_factor` is what a further pass would be multiplied by;
        `failure` poisons the step; the sums that have come are multiplied by `correction`.

        Raises `StepError` naming the ranks that failed or had no backward, `PlanMismatch` naming
        the first parameter that ranks treat differently, and `NonFiniteGradient` where the policy
        says so. Whatever happens, the window is over: what was accumulated is dropped. Ctrl-C waits
        for `let_out` where the step is applied or skipped.
        """
        self._held = None
        with held() as interrupts:
            outcome = self._cross(divide_factor, failure, correction)
        try:
            interrupts.run()
        except BaseException as error:
            self._held = self._held or error
        return outcome

    def _cross(self, divide_factor: float, failure: str | None, correction: float) -> Outcome:
        failure = failure or self.broken or self.reduction.failure or self._prepare()
        scale, applied, self.overflow = self.loss_scale.scale, False, False
        try:
            written = self.reduction.lost()  # is said once, also where there is another failure
            verdict = self._agree(divide_factor, failure or (written and lost(written)))
            # Before anything of the user's own runs: an exception there on one rank must not cost a
            # broadcast.
            self.reduction.learn()
            if verdict.finite:
                self.overlap.agree()
            self.norm = verdict.norm / scale * correction
            self.overflow = not verdict.finite
            if self.overflow:
                return self._overflow(scale)
            factor = correction / (clip_factor(self.norm, self.policy.clip) * scale)
            self._apply(factor, written=verdict.written)
            self.loss_scale.update(False)
            applied = True
            return Outcome.APPLIED
        except (StepError, PlanMismatch):  # on all ranks alike
            # one that did not fail may hold gradients that no pass has taken
            self.reduction.local.drop()
            raise
        except BaseException as error:
            self.reduction.local.drop()
            self.half_updated = self.half_updated or (
                f"{type(error).__name__} at the boundary, where other ranks may have applied the "
                f"step: {error}; load a checkpoint before going on"
            )
            raise
        finally:
            self.exchange.release()
            self.reduction.reset(applied=applied, growth=self.loss_scale.scale / scale)
            self.exposed, self._waited = self.reduction.waited - self._waited, self.reduction.waited

    def _prepare(self) -> str | None:
        """Memory for the exchange, and guards; returns why there is none."""
        try:
            self.exchange.prepare()
            self.reduction.prepare_publication()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _agree(self, divide_factor: float, failure: str | None) -> Verdict:
        verdict = self._vote(failure)
        while verdict.unreduced and not verdict.poisoned:
            # Late gradients are in `.grad` on some rank: every rank runs the list once more over
            # what is there.
            failure = self._rerun(divide_factor)
            verdict = self._vote(failure)
        self._refuse(verdict, failure)
        return verdict

    def _rerun(self, divide_factor: float) -> str | None:
        """Returns what broke it off on this rank, for the vote that follows."""
        try:
            self.reduction.rerun(divide_factor)
        except CommError:
            raise
        except Exception as error:
            self.reduction.abort()
            return f"{type(error).__name__}: {error}"
        return None

    def _vote(self, failure: str | None) -> Verdict:
        unreduced = self.reduction.local.unreduced()
        self._explain(unreduced)
        ballot = Ballot(
            unreduced,
            failure is not None,
            self.reduction.fingerprint,
            written=self.exchange.written(),
            unsaved=self.has_unsaved(),
        )
        waiting, failed = self.reduction.waiting("vote"), failure is not None
        with self.sink.range("vote"), waiting, self.standby.attending(failed=failed):
            verdict = vote(self.mesh, self.flat, ballot)
        self.unsaved = verdict.unsaved
        return verdict

    def _explain(self, unreduced: int) -> None:
        """Says once where gradients are, and names one that was written where they are not."""
        if not self._explained:
            self._explained = True
            self._say_where_gradients_are()
        name = self.reduction.local.written() if unreduced else None
        if name is not None:
            _log.warning(
                "rank %d: parameter %s has a .grad that was not there when its backward ended, by "
                "which time its gradient had left: it is added to the reduced one. Edit gradients "
                "in a hook (parameter.register_hook), clip them with gradient_clipping, and run "
                "backwards through the engine",
                self.mesh.rank,
                name,
            )

    def _say_where_gradients_are(self) -> None:
        # who has turned clipping off may be about to clip by hand, in vain, on whichever rank
        level = logging.INFO if self.policy.clip else logging.WARNING
        if self.mesh.rank == 0 or (level == logging.WARNING and log.is_read_here()):
            _log.log(
                level,
                "gradients leave .grad for their bucket during the backward, so that .grad is None "
                "after it and torch.nn.utils.clip_grad_norm_ finds nothing: set gradient_clipping, "
                "and read engine.get_global_grad_norm()",
            )

    def _refuse(self, verdict: Verdict, failure: str | None) -> None:
        if verdict.poisoned:
            reasons = self.mesh.control.gather_objects((failure, self.standby.begun))
            self.standby.level([begun for _, begun in reasons])
            message = "; ".join(f"rank {rank}: {reasons[rank][0]}" for rank in verdict.poisoned)
            raise StepError(
                f"the step was not applied on any rank, because some rank failed. {message}"
            )
        if verdict.mismatched:
            raise PlanMismatch(self._first_difference(verdict.mismatched[0]))

    def _first_difference(self, stranger: int) -> str:
        views = self.mesh.control.gather_objects((self.flat.active(), self.reduction.plan.schedule))
        ours, theirs = views[0], views[stranger]
        for name, here, there in zip(self.flat.names, ours[0], theirs[0], strict=True):
            if here != there:
                states = {True: "trainable", False: "frozen"}
                return (
                    f"parameter {name} is {states[here]} on rank 0 and {states[there]} on rank "
                    f"{stranger}: freeze and unfreeze on all ranks alike; the step was not applied"
                )
        pairs = zip(ours[1], theirs[1], strict=True)
        bucket = next(mine[1] for mine, other in pairs if mine != other)
        first = self.flat.buckets[bucket].names[0]
        return (
            f"ranks 0 and {stranger} have different schedules from parameter {first} on; "
            "the step was not applied"
        )

    def _overflow(self, scale: float) -> Outcome:
        culprit = self._culprit()
        if not self.loss_scale.update(True):
            raise NonFiniteGradient(
                f"gradients overflow although the loss scale is at its minimum, {scale:g}: "
                f"{culprit}; the step was not applied. Lower the learning rate, or look for the "
                "first NaN in the forward"
            )
        if self.policy.on_nonfinite == "raise":
            raise NonFiniteGradient(
                f"{culprit}; the step was not applied (zerort.on_nonfinite is 'raise')"
            )
        if self.mesh.rank == 0:
            after = self.loss_scale.scale
            moved = (
                f" Attempted loss scale: {scale:g}, reducing to {after:g}."
                if after != scale
                else ""
            )
            # while a dynamic loss scale looks for its place, overflows are its ordinary business
            level = logging.INFO if moved else logging.WARNING
            _log.log(level, "OVERFLOW! Skipping step.%s %s", moved, culprit)
        return Outcome.SKIPPED

    def _culprit(self) -> str:
        found = [
            place
            for place in self.mesh.control.gather_objects(self.reduction.nonfinite())
            if place is not None
        ]
        if not found:
            return "the sum of the ranks' gradients is not finite, though every rank's own is"
        # A rank that knows who it was tells more than one that has only the sum.
        rank, position = min(found, key=lambda place: (place[0] < 0, place))
        whose = f"rank {rank} brought" if rank >= 0 else "some rank brought"
        return (
            f"{whose} a gradient that is not finite, first in parameter {self.flat.names[position]}"
        )

    def _apply(self, factor: float, *, written: bool) -> None:
        self.exchange.take_writes(written)
        self.exchange.gradients()
        overlapped = self.overlap.decide()
        try:
            with self.sink.range("optimizer"):
                self.flat.take_writes()
                self._update(factor, overlapped=overlapped)
        except BaseException as error:
            self.half_updated = (
                f"its optimizer raised {type(error).__name__}: {error}; parameters may be half "
                "updated, so load a checkpoint before going on"
            )
            raise
        finally:  # the peers, whose optimizers went through, wait for this rank's shards
            self.exchange.values()
            with self.sink.range("publish"):
                self._publish(overlapped=overlapped)

    def _update(self, factor: float, *, overlapped: bool) -> None:
        """Updates batch by batch; what has been updated is on its way while the next is."""
        ready: set[int] = set()
        batches = self.optimizer.batches(self.reduction.published if overlapped else ())
        for batch in batches:
            self.optimizer.step(factor, batch)
            for bucket in batch:
                bucket.write_back()
            if len(batches) > 1:
                ready.update(bucket.spec.id for bucket in batch if bucket.is_published)
                self._send(ready, overlapped=overlapped)

    def _send(self, ready: Collection[int], *, overlapped: bool) -> None:
        """What breaks it off must not cost the rest of the update; `_publish` goes on with it."""
        try:
            self.reduction.publish_ready(ready, overlapped=overlapped)
        except CommError:
            raise
        except BaseException as error:
            self._held = self._held or error

    def _publish(self, *, overlapped: bool) -> None:
        try:
            before = self.reduction.waited
            self.reduction.publish(overlapped=overlapped)
            self.overlap.published(self.reduction.waited - before)
        except CommError:
            raise
        except BaseException as error:
            self._held = self._held or error  # by now all is published

    def let_out(self) -> None:
        """Raises what came while ranks voted and updated shards were on their way: the step was not
        broken off for it, and what follows a step has had its turn.
        """
        held, self._held = self._held, None
        if held is not None:
            raise held
