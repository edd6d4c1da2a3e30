"""Whether a checkpoint fits an engine, and what of it goes where: parameters by name, groups by
their parameters.

Pure decisions: nothing is read or changed, and every rank comes to the same ones. A difference is
an error that names the parameter and says what to do, unless the caller has said that names may be
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zerort.checkpoint.manifest import Manifest, ParamEntry, ParamState
from zerort.checkpoint.state import EngineState, extra_states, loose, strides_of
from zerort.errors import CheckpointError

__all__ = ["Choice", "Match", "match"]


@dataclass(frozen=True)
class Choice:
    """What a call of `load_checkpoint` asks for."""

    strict: bool = True
    """Every parameter and buffer must be in the checkpoint, and the other way round."""
    optimizer_states: bool = True
    scheduler_states: bool = True
    module_only: bool = False
    """Parameters and buffers, and nothing else."""
    weights: bool = True
    """False leaves parameters and buffers to somebody else."""


@dataclass(frozen=True)
class Match:
    """What of a checkpoint fills an engine."""

    origins: list[int]
    """For each parameter of the engine the checkpoint's id, or -1: it stays as it is."""
    turned: dict[int, tuple[int, ...]]
    """Strides of the engine's parameters whose elements lie in another order in the checkpoint, by
    id.
    """
    states: list[ParamState | None]
    """For each parameter of the engine what the checkpoint's optimizer kept for it."""
    groups: list[int | None]
    """For each group of the optimizer the checkpoint's group whose options it takes; None: it keeps
    its own.
    """
    loose: list[str]
    """The buffers and unplanned parameters that are taken."""


def match(manifest: Manifest, state: EngineState, choice: Choice) -> Match:
    """Raises `CheckpointError` when the two do not fit."""
    names = state.flat.names
    known = [
        manifest.param.get(name, manifest.param.get(manifest.aliases.get(name, ""), -1))
        for name in names
    ]
    if choice.strict:
        _check_names(manifest, state, known)
    origins = [param if param >= 0 and manifest.params[param].stored else -1 for param in known]
    turned = {}
    for param, (parameter, origin) in enumerate(zip(state.flat.params, origins, strict=True)):
        if origin >= 0:
            saved = manifest.params[origin]
            _check_shape(names[param], tuple(parameter.shape), saved)
            if saved.numel and saved.strides != strides_of(parameter):
                turned[param] = strides_of(parameter)
    with_optimizer = choice.optimizer_states and not choice.module_only
    if with_optimizer:
        _check_optimizer(manifest, state)
    return Match(
        origins,
        turned,
        [manifest.params[origin].state if origin >= 0 else None for origin in origins],
        _groups(manifest, state, origins) if with_optimizer else [],
        _loose(manifest, state, choice),
    )


def _check_names(manifest: Manifest, state: EngineState, known: Sequence[int]) -> None:
    loose_names = {name for name, _ in loose(state.module, state.flat)}
    extra = {name for name, _ in extra_states(state.module)}
    missing = [name for name, param in zip(state.flat.names, known, strict=True) if param < 0]
    stored = {
        entry.name for entry in manifest.tensors if entry.name.startswith(("param.", "buffer."))
    }
    missing += sorted(
        loose_names - stored - {f"param.{name}" for name in manifest.frozen}
    ) + sorted(extra - manifest.extra_state.keys())
    taken = set(known)
    unexpected = [entry.name for param, entry in enumerate(manifest.params) if param not in taken]
    unexpected += sorted(stored - loose_names) + sorted(manifest.extra_state.keys() - extra)
    told = [f"the checkpoint lacks {_some(missing)}"] if missing else []
    told += [f"the model lacks {_some(unexpected)}"] if unexpected else []
    if told:
        raise CheckpointError(
            f"{', and '.join(told)}; load_module_strict=False takes what both have"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_shape(name: str, shape: tuple[int, ...], saved: ParamEntry) -> None:
    if shape != saved.shape:
        raise CheckpointError(
            f"parameter {name} has shape {list(shape)}, in the checkpoint {list(saved.shape)}"
        )


def _check_optimizer(manifest: Manifest, state: EngineState) -> None:
    have = type(state.optimizer.optimizer).__qualname__
    if have != manifest.optimizer.name:
        raise CheckpointError(
            f"the checkpoint holds the state of {manifest.optimizer.name}, and the optimizer is "
            f"{have}: load_optimizer_states=False takes the weights without it"
        )


def _groups(manifest: Manifest, state: EngineState, origins: Sequence[int]) -> list[int | None]:
    sources: list[set[int]] = [set() for _ in state.optimizer.optimizer.param_groups]
    for spec in state.plan.buckets:
        sources[spec.group].update(
            manifest.params[origins[param]].group for param in spec.params if origins[param] >= 0
        )
    saved = manifest.optimizer.groups
    chosen: list[int | None] = []
    for index, groups in enumerate(sources):
        if any(group >= len(saved) or saved[group] != saved[min(groups)] for group in groups):
            raise CheckpointError(
                f"parameters of the optimizer's group {index} come from the checkpoint's groups "
                f"{sorted(groups)}, which have different options: group them as they were"
            )
        chosen.append(min(groups, default=None))
    return chosen


def _loose(manifest: Manifest, state: EngineState, choice: Choice) -> list[str]:
    if not choice.weights:
        return []
    stored = {
        entry.name: entry
        for entry in manifest.tensors
        if entry.name.startswith(("param.", "buffer."))
    }
    taken = []
    for name, tensor in loose(state.module, state.flat):
        if name in stored:
            if stored[name].shape != tuple(tensor.shape):
                told = f"{list(tensor.shape)}, in the checkpoint {list(stored[name].shape)}"
                raise CheckpointError(f"{name.replace('.', ' ', 1)} has shape {told}")
            taken.append(name)
    return taken
