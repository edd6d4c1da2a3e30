"""The batch triad: samples a step, samples a backward, backwards a step. Any two of them give the
third.

DeepSpeed's rules, floor divisions included, and its messages: who searches for one finds the
answers written for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerort.errors import ConfigError

__all__ = ["Batch"]

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Batch:
    """Batch sizes of a run; `train == micro * accumulation * world` holds for the world it was
    resolved for.
    """

    train: int
    """Samples of one optimizer step, over all ranks."""
    micro: int
    """Samples of one backward on one rank."""
    accumulation: int
    """Backwards of one optimizer step."""

    @property
    def world(self) -> int:
        """The ranks that it was resolved for."""
        return self.train // (self.micro * self.accumulation)

    def with_train(self, train: int) -> Batch:
        """Other accumulation steps, to fit. Raises `ConfigError` where the sizes do not divide."""
        return Batch.resolve(train, self.micro, None, self.world)

    def with_micro(self, micro: int) -> Batch:
        """Another train batch, to fit."""
        return Batch.resolve(None, micro, self.accumulation, self.world)

    @classmethod
    def resolve(
        cls, train: int | None, micro: int | None, accumulation: int | None, world: int
    ) -> Batch:
        """Completes the triad for `world` data-parallel ranks.

        Raises `ConfigError` when neither `train` nor `micro` is given, when a size comes out as
        zero, and when the three do not multiply up.
        """
        _check_positive(train, micro, accumulation)
        if train is None:
            if micro is None:
                raise ConfigError(
                    "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"
                )
            accumulation = 1 if accumulation is None else accumulation
            train = micro * accumulation * world
        elif micro is None:
            accumulation = 1 if accumulation is None else accumulation
            micro = train // world // accumulation
        elif accumulation is None:
            accumulation = train // micro // world
        _check_positive(train, micro, accumulation)
        if train > _MOST:
            raise ConfigError(
                f"train_batch_size: {train} samples of one step are more than {_MOST}; lower "
                "train_micro_batch_size_per_gpu or gradient_accumulation_steps"
            )
        if train != micro * accumulation * world:
            raise ConfigError(
                "Check batch related parameters. train_batch_size is not equal to "
                f"micro_batch_per_gpu * gradient_acc_step * world_size {train} != {micro} * "
                f"{accumulation} * {world}"
            )
        return cls(train, micro, accumulation)


def _check_positive(train: int | None, micro: int | None, accumulation: int | None) -> None:
    for name, size in (
        ("Train batch size", train),
        ("Micro batch size per gpu", micro),
        ("Gradient accumulation steps", accumulation),
    ):
        if size is not None and size <= 0:
            raise ConfigError(f"{name}: {size} has to be greater than 0")
