"""Whether a checkpoint fits an engine, and what of it goes where: tensors by name, groups by their
parameters.

A name is a name wherever it is held. What the optimizer held when it was saved may be frozen now
and out of the optimizer, and the other way round; a parameter may have become a buffer. A tensor's
further names count as its first one does.

Pure decisions: nothing is read or changed, and every rank comes to the same ones. A difference is
an error that names the tensor and says what to do, unless the caller has said that names may be
missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerort.checkpoint.manifest import Manifest, ParamState, rank_file
from zerort.checkpoint.state import (
    EngineState,
    aliases,
    extra_states,
    loose,
    scheduler_name,
    strides_of,
)
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError

__all__ = ["LoadOptions", "Match", "extra_labels", "match", "some_of"]


@dataclass(frozen=True)
class LoadOptions:
    """What a call of `load_checkpoint` asks for."""

    strict: bool = True
    """Every parameter and buffer must be in the checkpoint, and the other way round."""
    optimizer_states: bool = True
    scheduler_states: bool = True
    module_only: bool = False
    """Parameters and buffers, and nothing else."""
    weights: bool = True
    """False leaves parameters and buffers to the caller."""
    allow_pickle: bool = False
    """Whether objects in `client_state` may be unpickled."""

    @property
    def optimizer(self) -> bool:
        """Whether the optimizer's state is asked for."""
        return self.optimizer_states and not self.module_only

    @property
    def scheduler(self) -> bool:
        """Whether the scheduler's state is asked for."""
        return self.scheduler_states and not self.module_only


Source = int | str | None
"""Where a checkpoint holds a tensor: the id of a planned parameter, whose masters lie in shards;
the name of a tensor in rank 0's file; None for a frozen parameter that was left out.
"""


@dataclass(frozen=True)
class Match:
    """What of a checkpoint fills an engine."""

    origins: list[int]
    """For each planned parameter of the engine the checkpoint's id; -1 where no shards hold it."""
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
    from_whole: dict[int, str] = field(default_factory=dict)
    """Planned parameters of the engine, by id, that a tensor of rank 0's file fills."""
    loose: dict[str, int | str] = field(default_factory=dict)
    """The engine's buffers and unplanned parameters that are taken, and from where."""
    weights: bool = True
    """Whether values are taken at all."""
    stayed: tuple[str, ...] = ()
    """Names that the checkpoint lacks."""
    unused: tuple[str, ...] = ()
    """Names that the engine lacks."""
    fresh: tuple[str, ...] = ()
    """Trained parameters without a state of the optimizer, where others have one."""
    dropped: tuple[str, ...] = ()
    """Parameters whose state of the optimizer finds no place: they are not in it now."""


def match(manifest: Manifest, state: EngineState, options: LoadOptions) -> Match:
    """Raises `CheckpointError` when the two do not fit."""
    names = _Names(manifest, state)
    if options.strict:
        names.check(manifest, state)
    found = [names.source(name) for name in state.flat.names]
    origins = [source if isinstance(source, int) else -1 for source in found]
    _check_planned(manifest, state, found)
    updates = options.optimizer and state.optimizer.name is not None
    if updates:
        _check_optimizer(manifest, state)
    if options.scheduler:
        _check_scheduler(manifest, state)
    states = [manifest.params[origin].state if origin >= 0 else None for origin in origins]
    return Match(
        origins,
        _turned(manifest, state, origins),
        states,
        _groups(manifest, state, origins) if updates else [],
        {param: source for param, source in enumerate(found) if isinstance(source, str)},
        _loose(manifest, state, names) if options.weights else {},
        options.weights,
        tuple(names.stayed) if options.weights else (),
        tuple(names.unused) if options.weights else (),
        _fresh(manifest, state, states) if updates else (),
        _dropped(manifest, origins, names.unused) if updates else (),
    )


class _Names:
    """Both sides' names, and which of the one are which of the other."""

    def __init__(self, manifest: Manifest, state: EngineState) -> None:
        self._sources = _sources(manifest)
        self._further: dict[str, list[str]] = {}
        for name, first in aliases(state.module).items():
            self._further.setdefault(first, []).append(name)
        have = [
            *state.flat.names,
            *(key.partition(".")[2] for key, _ in loose(state.module, state.flat)),
        ]
        self.stayed = [name for name in have if self.source(name) is None]
        self.lacking = [name for name in have if self._known(name) is None]
        taken = {source for name in have if (source := self.source(name)) is not None}
        known = {known for name in have for known in self._all(name)}
        self.unused = [
            name
            for name, source in self._sources.items()
            if name not in manifest.aliases
            and (name not in known if source is None else source not in taken)
        ]

    def source(self, name: str) -> Source:
        """Where the checkpoint holds the tensor of the engine that has this first name."""
        known = self._known(name)
        return None if known is None else self._sources[known]

    def _known(self, name: str) -> str | None:
        return next((known for known in self._all(name) if known in self._sources), None)

    def _all(self, name: str) -> Iterable[str]:
        return (name, *self._further.get(name, ()))

    def check(self, manifest: Manifest, state: EngineState) -> None:
        """Raises `CheckpointError` unless both have the same names."""
        extra = {name for name, _ in extra_states(state.module)}
        missing = self.lacking + extra_labels(extra - manifest.extra_state.keys())
        surplus = self.unused + extra_labels(manifest.extra_state.keys() - extra)
        parts = [f"the checkpoint lacks {some_of(missing)}"] if missing else []
        parts += [f"the model lacks {some_of(surplus)}"] if surplus else []
        if parts:
            raise CheckpointError(
                f"{', and '.join(parts)}; load_module_strict=False takes what both have, and "
                "leaves what the checkpoint lacks at its present value"
            )


def _sources(manifest: Manifest) -> dict[str, Source]:
    found: dict[str, Source] = dict.fromkeys(manifest.frozen)
    for param, entry in enumerate(manifest.params):
        found[entry.name] = param if entry.stored else None
    for tensor in manifest.tensors:
        kind, _, name = tensor.name.partition(".")
        if kind in ("param", "buffer"):
            found[name] = tensor.name
    for alias, first in manifest.aliases.items():
        if first in found:
            found.setdefault(alias, found[first])
    return found


def extra_labels(modules: Iterable[str]) -> list[str]:
    """Names of the extra states of modules, as torch's state dicts have them."""
    return [f"{name}._extra_state".lstrip(".") for name in sorted(modules)]


def some_of(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_planned(manifest: Manifest, state: EngineState, found: Sequence[Source]) -> None:
    for name, parameter, source in zip(state.flat.names, state.flat.params, found, strict=True):
        if source is not None:
            _check_form(name, parameter, _form(manifest, source))


def _form(manifest: Manifest, source: int | str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what a checkpoint holds."""
    if isinstance(source, int):
        return manifest.params[source].shape, DTYPES[manifest.params[source].dtype]
    entry = manifest.tensor[rank_file(0), source]
    return entry.shape, DTYPES[entry.dtype]


def _check_form(name: str, tensor: Tensor, saved: tuple[tuple[int, ...], torch.dtype]) -> None:
    shape, dtype = saved
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, in the checkpoint {list(shape)}"
        )
    if not _holds(tensor.dtype, dtype):
        raise CheckpointError(
            f"{name} has dtype {tensor.dtype}, in the checkpoint {dtype}, and to cast it would "
            "change what it means: build the model with the dtype that was saved"
        )


def _holds(present: torch.dtype, saved: torch.dtype) -> bool:
    """Whether values keep their meaning in the present dtype, roundings aside."""
    if present == saved:
        return True
    if present.is_floating_point or present.is_complex:
        return present.is_floating_point == saved.is_floating_point and (
            present.is_complex == saved.is_complex
        )
    if saved.is_floating_point or saved.is_complex or torch.bool in (present, saved):
        return False
    narrow, wide = torch.iinfo(saved), torch.iinfo(present)
    return wide.min <= narrow.min and narrow.max <= wide.max


def _turned(
    manifest: Manifest, state: EngineState, origins: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    turned = {}
    for param, (parameter, origin) in enumerate(zip(state.flat.params, origins, strict=True)):
        if origin >= 0 and manifest.params[origin].numel:
            strides = strides_of(parameter)
            if manifest.params[origin].strides != strides:
                turned[param] = strides
    return turned


def _check_optimizer(manifest: Manifest, state: EngineState) -> None:
    have, saved = state.optimizer.name, manifest.optimizer
    if saved is not None and have != saved.name:
        raise CheckpointError(
            f"the checkpoint holds the state of {saved.name}, and the optimizer is "
            f"{have}: load_optimizer_states=False takes the weights without it"
        )


def _check_scheduler(manifest: Manifest, state: EngineState) -> None:
    saved, have = manifest.scheduler, scheduler_name(state.scheduler)
    if saved is not None and have is not None and saved.name != have:
        raise CheckpointError(
            f"the checkpoint holds the state of {saved.name}, and the scheduler is {have}: "
            "load_lr_scheduler_states=False takes the rest without it"
        )


def _groups(manifest: Manifest, state: EngineState, origins: Sequence[int]) -> list[int | None]:
    sources: list[set[int]] = [set() for _ in state.optimizer.groups]
    for bucket in state.flat.stepped:
        found = (
            manifest.params[origins[param]].group
            for param in bucket.spec.params
            if origins[param] >= 0
        )
        sources[bucket.group].update(source for source in found if source is not None)
    _check_kinds(manifest, state, origins)
    saved = manifest.optimizer.groups if manifest.optimizer is not None else ()
    chosen: list[int | None] = []
    for index, groups in enumerate(sources):
        if any(group >= len(saved) or saved[group] != saved[min(groups)] for group in groups):
            raise CheckpointError(
                f"parameters of the optimizer's group {index} come from the checkpoint's groups "
                f"{sorted(groups)}, which have different options: group them as they were"
            )
        chosen.append(min(groups, default=None))
    return chosen


def _check_kinds(manifest: Manifest, state: EngineState, origins: Sequence[int]) -> None:
    """Of several optimizers, the same one has each parameter."""
    kinds = () if manifest.optimizer is None else manifest.optimizer.kinds
    for bucket in state.flat.stepped if kinds else ():
        for param, name in zip(bucket.spec.params, bucket.names, strict=True):
            group = manifest.params[origins[param]].group if origins[param] >= 0 else None
            own = state.optimizer.kinds[bucket.group]
            if group is not None and group < len(kinds) and kinds[group] != own:
                raise CheckpointError(
                    f"{name} is updated by {own}, and by {kinds[group]} in the checkpoint, whose "
                    "state means something else: divide the parameters as they were, or take the "
                    "weights without it, by load_optimizer_states=False"
                )


def _loose(manifest: Manifest, state: EngineState, names: _Names) -> dict[str, int | str]:
    taken: dict[str, int | str] = {}
    for key, tensor in loose(state.module, state.flat):
        name = key.partition(".")[2]
        source = names.source(name)
        if source is not None:
            _check_form(name, tensor, _form(manifest, source))
            taken[key] = source
    return taken


def _fresh(
    manifest: Manifest, state: EngineState, states: Sequence[ParamState | None]
) -> tuple[str, ...]:
    if not any(entry.state for entry in manifest.params):
        return ()  # the optimizer keeps none, or had not stepped
    named = zip(state.flat.names, state.flat.params, states, strict=True)
    return tuple(name for name, p, kept in named if kept is None and p.requires_grad)


def _dropped(manifest: Manifest, origins: Sequence[int], unused: Sequence[str]) -> tuple[str, ...]:
    taken, absent = set(origins), set(unused)
    return tuple(
        entry.name
        for param, entry in enumerate(manifest.params)
        if entry.state is not None and param not in taken and entry.name not in absent
    )
