"""`GatheredParameters`: sharded parameters, whole for a while. Mirrors deepspeed.zero's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from torch import Tensor, nn

from zerort.params import sharded
from zerort.params.arriving import Arriving, land

__all__ = ["GatheredParameters", "unwrap_model_for_generation"]


class GatheredParameters:
    """Within, `params` are whole: to look at, or with `modifier_rank` to write.

    All ranks enter and leave together, with the same parameters. What rank `modifier_rank` has
    written is everybody's value behind it, masters included; without one nothing may be written.
    It nests, and within a forward it is a use like any other. Around `generate()` it saves the
    gathers of every token. Of a parameter that stays whole at stage 3 rank `modifier_rank`'s values
    count just so; below stage 3 only updates that are on their way are waited for. `fwd_module` is
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
        self._held: dict[int, tuple[sharded.Keeper, dict[int, nn.Parameter]]] = {}
        for parameter in wanted if enabled else ():
            if isinstance(parameter, Arriving):
                land(parameter)
            keeper = sharded.keeper_of(parameter)
            if keeper is not None and isinstance(parameter, nn.Parameter):
                self._held.setdefault(id(keeper), (keeper, {}))[1][id(parameter)] = parameter
        self._modifier = modifier_rank
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for keeper, params in self._held.values():
                stack.enter_context(keeper.hold(list(params.values()), self._modifier))
            self._stack = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


@contextmanager
def unwrap_model_for_generation(model: nn.Module) -> Iterator[nn.Module]:
    """Within, all of `model`'s parameters are whole, so that `generate()` gathers nothing; yields
    the model. All ranks enter and leave together. Below stage 3 nothing is done.
    """
    with GatheredParameters(list(model.parameters())):
        yield model
