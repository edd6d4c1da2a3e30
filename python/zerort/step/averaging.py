"""By what gradients are divided, so that a step's gradient is a mean.

Micro-batches of a window and ranks: what an engine has done to a loss before its backward is taken
into account, and what is left is done when sums are reduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerort.config import Batch
from zerort.errors import StepError
from zerort.grads.tasks import LossScaling
from zerort.step.accumulation import Accumulation
from zerort.step.join import Join
from zerort.step.precision import LossScale

__all__ = ["Averaging"]


@dataclass
class Averaging:
    """The divisions of one engine; `ranks` is how many of them sums are divided by."""

    accumulation: Accumulation
    loss_scale: LossScale
    batch: Batch
    ranks: int

    def scaling(self, *, divides: bool) -> LossScaling:
        """What this engine does to a loss; it `divides` by the accumulation steps unless asked not
        to.
        """
        return LossScaling(self.accumulation.steps if divides else None, self.loss_scale.scale)

    def note(self, scaling: LossScaling | None) -> None:
        """A backward begins, its loss scaled like this; None where it is not scaled.

        Raises `StepError` where it would have to be, and where the window holds gradients that are
        to be divided by something else.
        """
        if scaling is None and self.loss_scale.scale != 1.0:
            raise StepError(
                "a direct loss.backward(), and gradients put into .grad by hand, would not be "
                "loss-scaled. Loss scaling is required: use engine.backward(loss), or "
                "engine.scale(loss).backward(); gradients of your own go in the place of a "
                "backward's by zerort.utils.safe_set_full_grad(parameter, gradient * "
                "engine.loss_scale)"
            )
        steps = self.accumulation.steps
        if scaling is None:
            self.accumulation.note(steps)
        else:
            rescaled = scaling.scale / self.loss_scale.scale
            self.accumulation.note(steps / (scaling.steps or steps) * rescaled)

    @property
    def factor(self) -> float:
        """What sums over ranks are multiplied by."""
        return 1.0 / (self.ranks * self.accumulation.divisor)

    def correction(self, join: Join | None) -> float:
        """What turns a division by all micro-batches of the window into one by those given."""
        if join is None or self.ranks != len(join.rows):
            return 1.0
        return join.correction(self.accumulation.steps)

    def samples(self, join: Join | None) -> int:
        """Of the step that ends, over all ranks."""
        if join is not None:
            return self.batch.micro * join.given
        if self.accumulation.managed:
            return self.batch.train
        return self.batch.train // self.batch.accumulation * self.accumulation.window.given

    def resize(self, batch: Batch, *, backwards: int) -> None:
        """Windows to come have other sizes. Raises `StepError` in the middle of one."""
        self.accumulation.resize(batch.accumulation, backwards=backwards)
        self.batch = batch
