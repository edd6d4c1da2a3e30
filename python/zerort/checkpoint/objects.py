"""What a load changes outside the engine's own memory: objects of the user's, and small state.

Any of it may raise: a scheduler whose state does not fit, a `set_extra_state`, a loader, a
`custom_load_fn` halfway. So it all comes before the masters change, and every change is noted
before it is made, so that it can be taken back on all ranks when one of them fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.match import LoadOptions
from zerort.checkpoint.staging import Staged
from zerort.checkpoint.state import EngineState, extra_states
from zerort.checkpoint.undo import Undo
from zerort.device.random import random_states, restore_random_states
from zerort.errors import CheckpointError

__all__ = ["CustomLoad", "finish_objects", "restore_objects"]

CustomLoad = Callable[..., Any]
"""DeepSpeed's `custom_load_fn(src=state dict, dst=module)`."""

_IMPLEMENTATION = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Options that say how an optimizer computes, not what: the engine's stay."""


def restore_objects(
    state: EngineState,
    manifest: Manifest,
    staged: Staged,
    options: LoadOptions,
    custom: Callable[[], None] | None,
    undo: Undo,
) -> None:
    """Raises whatever an object raises; `undo` then has what was changed."""
    before = random_states(state.comm.device)  # taken back last: an object may draw some
    undo.later("random numbers", lambda: restore_random_states(before, state.comm.device))
    if custom is not None:
        _note_values(state.module, undo)
        for name, module in extra_states(state.module):
            _note_extra(name, module, undo)
        with _naming("custom_load_fn"):
            custom()
    for name, module in extra_states(state.module):
        if name in staged.extra:
            _restore_extra(name, module, staged.extra[name], undo)
    if options.module_only:
        return
    if options.optimizer:
        _restore_options(state, staged, undo)
    if staged.scheduler is not None:
        _restore_scheduler(state, staged.scheduler, undo)
    _restore_counts(state, manifest, undo)
    _restore_features(state, staged.features, undo)
    if staged.loader is not None and hasattr(state.loader, "load_state_dict"):
        _restore_loader(state.loader, staged.loader, undo)
    if staged.random is not None:
        restore_random_states(staged.random, state.comm.device)


def finish_objects(state: EngineState, staged: Staged) -> None:
    """Once more behind the weights, for modules that make something of both; torch has this order
    too. Then the random numbers, which an object may have drawn from.
    """
    for name, module in extra_states(state.module):
        if name in staged.extra:
            module.set_extra_state(staged.extra[name])
    if staged.random is not None:
        restore_random_states(staged.random, state.comm.device)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Says whose error it is."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what} raised {type(error).__name__}: {error}") from error


def _note_values(module: nn.Module, undo: Undo) -> None:
    """Parameters and buffers as they are, in memory of the host."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

    undo.later("the module's values", put_back)


def _note_extra(name: str, module: nn.Module, undo: Undo) -> None:
    with _naming(_extra(name)):
        before = copy.deepcopy(module.get_extra_state())
    undo.later(_extra(name), lambda: module.set_extra_state(before))


def _restore_extra(name: str, module: nn.Module, value: Any, undo: Undo) -> None:
    _note_extra(name, module, undo)
    with _naming(_extra(name)):
        module.set_extra_state(copy.deepcopy(value))


def _extra(name: str) -> str:
    return f"extra state of {name or 'the module'}"


def _restore_options(state: EngineState, staged: Staged, undo: Undo) -> None:
    groups = list(state.optimizer.groups)
    _note_options(groups, undo)
    for group, options in zip(groups, staged.options, strict=True):
        taken = {key: value for key, value in (options or {}).items() if key not in _IMPLEMENTATION}
        group.update(taken)


def _note_options(groups: list[dict[str, Any]], undo: Undo) -> None:
    """Values by reference, and of tensors, which a scheduler may write into, the contents too."""
    before = [{key: (value, _contents(value)) for key, value in group.items()} for group in groups]

    def put_back() -> None:
        for group, options in zip(groups, before, strict=True):
            group.clear()
            for key, (value, contents) in options.items():
                group[key] = value
                if contents is not None:
                    value.copy_(contents)

    undo.later("the optimizer's options", put_back)


def _contents(value: Any) -> Tensor | None:
    return value.clone() if isinstance(value, Tensor) else None


def _restore_scheduler(state: EngineState, saved: Any, undo: Undo) -> None:
    scheduler, groups = state.scheduler, list(state.optimizer.groups)
    what = f"the scheduler {type(scheduler).__qualname__}"
    with _naming(what):
        kept = copy.deepcopy(scheduler.state_dict())
        attributes = dict(vars(scheduler)) if hasattr(scheduler, "__dict__") else {}
        _note_options(groups, undo)

        def put_back() -> None:
            if attributes:
                vars(scheduler).clear()
                vars(scheduler).update(attributes)
            scheduler.load_state_dict(kept)

        undo.later(what, put_back)
        scheduler.load_state_dict(saved)
        rates = getattr(scheduler, "base_lrs", groups)
        if len(rates) != len(groups):
            raise CheckpointError(
                f"its state is for {len(rates)} parameter groups, and the optimizer has "
                f"{len(groups)}; load_lr_scheduler_states=False takes the rest without it"
            )


def _restore_counts(state: EngineState, manifest: Manifest, undo: Undo) -> None:
    scale = state.loss_scale
    if manifest.loss_scale is not None and isinstance(scale, _core.LossScale):
        before = scale.state()
        undo.later("the loss scale", lambda: scale.restore(before))
        scale.restore(manifest.loss_scale)
    counters = vars(state.counters)
    counts = counters.copy()
    undo.later("the counters", lambda: counters.update(counts))
    counters.update(manifest.counters.model_dump())


def _restore_features(state: EngineState, saved: dict[str, dict[str, Any]], undo: Undo) -> None:
    before = copy.deepcopy(state.events.state())
    undo.later("the features", lambda: state.events.load(before))
    with _naming("a feature"):
        state.events.load(saved)


def _restore_loader(loader: Any, saved: dict[str, Any], undo: Undo) -> None:
    with _naming("the training loader"):
        before = copy.deepcopy(loader.state_dict())
        undo.later("the training loader", lambda: loader.load_state_dict(before))
        loader.load_state_dict(saved)
