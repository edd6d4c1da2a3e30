"""`GatheredParameters`: sharded parameters, whole for a while. Mirrors deepspeed.zero's."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

from torch import Tensor, nn

from zerort.params import sharded
from zerort.params.uses import Uses

__all__ = ["GatheredParameters"]


class GatheredParameters:
    """Within, `params` are whole: to look at, or with `modifier_rank` to write.

    All ranks enter and leave together, with the same parameters. What rank `modifier_rank` has
    written is everybody's value behind it, masters included; without one nothing may be written.
    It nests, and within a forward it is a use like any other. Around `generate()` it saves the
    gathers of every token. Parameters that are not sharded are left as they are. `fwd_module` is
    DeepSpeed's, and has nothing to do here.

    Raises `StepError` naming a parameter that was written without a `modifier_rank`, and where the
    ranks do not call it together.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Tensor,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        wanted = [params] if isinstance(params, Tensor) else list(params)
        self._held: dict[int, tuple[Uses, list[nn.Parameter]]] = {}
        for parameter in wanted if enabled else ():
            keeper = sharded.keeper_of(parameter)
            if isinstance(keeper, Uses) and isinstance(parameter, nn.Parameter):
                of_engine = self._held.setdefault(id(keeper), (keeper, []))[1]
                if all(parameter is not other for other in of_engine):
                    of_engine.append(parameter)
        self._modifier = modifier_rank
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for uses, params in self._held.values():
                stack.enter_context(uses.pins.hold(params, self._modifier, writes=False))
            self._stack = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
