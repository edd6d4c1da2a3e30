"""Where a parameter's elements lie in DeepSpeed's files, at each stage.

Below stage 3 the parameters of a group lie one behind the other in one flat vector, cut into one
equal part a rank; the last part has lost its padding. At stage 3 each parameter is cut by itself:
a rank holds ceil(numel / ranks) elements of it, and those of all parameters one behind the other,
in several vectors where there are sub-groups. At stage 0 the optimizer's own state dict knows
positions and no names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zerort.checkpoint.deepspeed.files import Record, Source
from zerort.errors import CheckpointError

__all__ = ["Layout", "Parameter", "as_laid_out", "layout_of", "stage_of"]


@dataclass
class Parameter:
    """A trained parameter: views of DeepSpeed's files, in the order of its elements."""

    name: str
    shape: tuple[int, ...]
    group: int
    master: list[Tensor]
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    """What has a value for each element."""
    values: dict[str, Any] = field(default_factory=dict)
    """What is one value for the whole."""

    def __post_init__(self) -> None:
        for kind, pieces in [("master", self.master), *self.state.items()]:
            have, want = sum(piece.numel() for piece in pieces), math.prod(self.shape)
            if have != want:
                raise CheckpointError(
                    f"{self.name} has {want} elements, and the files hold {have} of its {kind}"
                )


@dataclass(frozen=True)
class Layout:
    """The trained parameters, and the options of the optimizer's groups."""

    stage: int
    parameters: Sequence[Parameter]
    groups: Sequence[Mapping[str, Any]]
    loss_scaler: Record | None = None


def layout_of(source: Source, names: Sequence[str] | None) -> Layout:
    """Raises `CheckpointError` where the files contradict one another. `names` are those of the
    parameters in the order in which the optimizer holds them; stage 0 alone may need them.
    """
    with as_laid_out(source):
        if not source.optimizers:
            return _whole(source, names)
        states = [found["optimizer_state_dict"] for found in source.optimizers]
        _check_count(source, states)
        return _by_parameter(source, states) if stage_of(states[0]) == 3 else _flat(source, states)


@contextmanager
def as_laid_out(source: Source) -> Iterator[None]:
    """Turns what goes wrong with files of another form into `CheckpointError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source.path} is not laid out as DeepSpeed's checkpoints are "
            f"({type(error).__name__}: {str(error)[:160]})"
        ) from error


def stage_of(state: Mapping[str, Any]) -> int:
    """What the optimizer has written of its stage."""
    found = state.get("zero_stage", 1)  # its optimizer for bf16 writes none
    return int(found.args[0] if isinstance(found, Record) else found)


def _check_count(source: Source, states: Sequence[Mapping[str, Any]]) -> None:
    count = states[0]["partition_count"]
    count = max(count) if isinstance(count, (list, tuple)) else count
    if count != len(states):
        raise CheckpointError(
            f"{source.path} was written by {count} ranks, and holds the optimizer files of "
            f"{len(states)}"
        )


def _flat(source: Source, states: Sequence[Mapping[str, Any]]) -> Layout:
    base = [_group_states(state["base_optimizer_state"]) for state in states]
    paddings = states[0].get("param_alignment_paddings")
    parameters = []
    for group, shapes in enumerate(source.model["param_shapes"]):
        masters = _Parts([state["single_partition_of_fp32_groups"][group] for state in states])
        kinds, values = _sorted([found[0][group] for found in base], masters.length)
        at = 0
        for index, (name, shape) in enumerate(shapes.items()):
            numel = math.prod(shape)
            pieces = {key: list(parts.narrow(at, numel)) for key, parts in kinds.items()}
            master = list(masters.narrow(at, numel))
            parameters.append(Parameter(name, tuple(shape), group, master, pieces, dict(values)))
            at += numel + (paddings[group][index] if paddings else 0)
    scaler = states[0].get("loss_scaler")
    return Layout(stage_of(states[0]), parameters, base[0][1], scaler)


def _group_states(
    base: Any,
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """What the optimizer keeps of each group's part, and the groups' options."""
    if isinstance(base, list):  # with elastic_checkpoint: the states alone
        return base, [{} for _ in base]
    groups = base["param_groups"]
    return [base["state"].get(group["params"][0], {}) for group in groups], groups


def _sorted(
    states: Sequence[Mapping[str, Any]], length: int
) -> tuple[dict[str, _Parts], dict[str, Any]]:
    """The kinds of state with a value for each element, over all ranks, and the single values."""
    kinds: dict[str, _Parts] = {}
    values: dict[str, Any] = {}
    for key, first in states[0].items():
        if (isinstance(first, Tensor) and first.numel() > 1) or (
            isinstance(first, Tensor) and first.dim() > 0 and key != "step"
        ):
            kinds[key] = _Parts([state[key] for state in states], length)
        else:
            values[key] = first
    return kinds, values


class _Parts:
    """A flat vector in equal parts, one a rank; padding may be missing at the end."""

    def __init__(self, parts: Sequence[Tensor], length: int | None = None) -> None:
        self._parts = [part.reshape(-1) for part in parts]
        self.length = self._parts[0].numel() if length is None else length

    def narrow(self, start: int, count: int) -> Iterator[Tensor]:
        """Views of the elements from `start` on."""
        end = start + count
        for rank, part in enumerate(self._parts):
            lo = max(start - rank * self.length, 0)
            hi = min(end - rank * self.length, self.length, part.numel())
            if lo < hi:
                yield part.narrow(0, lo, hi - lo)


def _by_parameter(source: Source, states: Sequence[Mapping[str, Any]]) -> Layout:
    inner = [state["optimizer_state_dict"] for state in states]
    groups = inner[0]["param_groups"]
    order = [index for group in groups for index in group["params"]]
    # One entry of the shapes is a sub-group, and a group of the optimizer has several.
    group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
    masters = [_Joined(state["fp32_flat_groups"]) for state in states]
    first: Mapping[str, Any] = inner[0]["state"].get(order[0], {}) if order else {}
    keys = [k for k, v in first.items() if isinstance(v, Tensor) and v.dim() > 0 and k != "step"]
    values = {key: value for key, value in first.items() if key not in keys}
    kinds = {
        key: [_Joined([found["state"][index][key] for index in order]) for found in inner]
        for key in keys
    }
    parameters, at, world = [], 0, len(states)
    for group, shapes in zip(group_of, source.model["param_shapes"], strict=True):
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // world)

            def cut(
                vectors: Sequence[_Joined], at: int = at, part: int = part, numel: int = numel
            ) -> list[Tensor]:
                found: list[Tensor] = []
                for rank, vector in enumerate(vectors):
                    found += vector.narrow(at, max(0, min(part, numel - rank * part)))
                return found

            pieces = {key: cut(vectors) for key, vectors in kinds.items()}
            parameters.append(
                Parameter(name, tuple(shape), group, cut(masters), pieces, dict(values))
            )
            at += part
    return Layout(3, parameters, groups, states[0].get("loss_scaler"))


class _Joined:
    """Vectors as if they lay one behind the other."""

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._vectors = [vector.reshape(-1) for vector in vectors]

    def narrow(self, start: int, count: int) -> Iterator[Tensor]:
        """Views of the elements from `start` on."""
        for vector in self._vectors:
            lo, hi = max(start, 0), min(start + count, vector.numel())
            if lo < hi:
                yield vector.narrow(0, lo, hi - lo)
            start -= vector.numel()


# Stage 0


def _whole(source: Source, names: Sequence[str] | None) -> Layout:
    """The optimizer of stage 0 stands in the model file, by position: torch's own, or DeepSpeed's
    around it with masters.
    """
    state = source.model["optimizer"]
    if state is None:
        raise CheckpointError(
            f"{source.path} holds no state of an optimizer, neither in the model file nor in files "
            "of the ranks: load the state dict under `module` into the model instead"
        )
    inner = state.get("optimizer_state_dict", state)
    groups, module = inner["param_groups"], source.model["module"]
    masters = _masters(state)
    order = [index for group in groups for index in group["params"]]
    found = inner["state"]
    group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
    if names is None:
        kept = [found.get(index, {}) for index in order]
        chosen = _named(source, group_of, lambda at, value: _fits(value, kept[at], masters, at))
    else:
        chosen = _given(names, len(order), module)
    parameters = []
    for at, (index, name) in enumerate(zip(order, chosen, strict=True)):
        value, kept = module[name], found.get(index, {})
        each = {k: [v.reshape(-1)] for k, v in kept.items() if k != "step" and _each(v, value)}
        single = {k: v for k, v in kept.items() if k not in each}
        master = (value if masters is None else masters[at]).reshape(-1)
        parameters.append(Parameter(name, tuple(value.shape), group_of[at], [master], each, single))
    return Layout(0, parameters, groups)


def _each(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def _masters(state: Mapping[str, Any]) -> list[Tensor] | None:
    groups = state.get("fp32_groups")
    if groups is not None:
        return [tensor for group in groups for tensor in group]
    if "fp32_groups_flat" in state:
        raise CheckpointError(
            "this checkpoint of stage 0 was written by DeepSpeed's fused fp16 optimizer, which "
            "says nothing about where parameters lie: save once more at stage 1"
        )
    return None


def _fits(value: Tensor, kept: Mapping[str, Any], masters: list[Tensor] | None, at: int) -> bool:
    """Whether a tensor of the module may be the optimizer's parameter at a position."""
    if masters is not None:
        return value.shape == masters[at].shape and torch.equal(masters[at].to(value.dtype), value)
    tensors = [v for k, v in kept.items() if isinstance(v, Tensor) and k != "step"]
    return not tensors or tensors[0].shape == value.shape


def _given(names: Sequence[str], count: int, module: Mapping[str, Any]) -> Sequence[str]:
    if len(names) != count:
        raise CheckpointError(f"{len(names)} names were given, and the optimizer has {count}")
    unknown = [name for name in names if name not in module]
    if unknown:
        raise CheckpointError(f"the module has no {', '.join(unknown[:8])}, which --names gives")
    return names


def _named(
    source: Source, group_of: Sequence[int], fits: Callable[[int, Tensor], bool]
) -> Sequence[str]:
    """Names for positions: each group holds its parameters in the module's order, and there is one
    way only in which shapes, and masters' values where there are masters, agree.
    """
    module = source.model["module"]
    names = list(_distinct(module, source.model["buffer_names"]))
    if len(set(group_of)) == 1 and len(names) == len(group_of):
        return names
    starts = [group_of.index(group) for group in sorted(set(group_of))]
    ends = (*starts[1:], len(group_of))
    ways: dict[tuple[int, ...], list[dict[int, str]]] = {tuple(starts): [{}]}
    for name in names:
        following = {at: list(chosen) for at, chosen in ways.items()}  # it is not held
        for at, chosen in ways.items():
            for group, position in enumerate(at):
                if position < ends[group] and fits(position, module[name]):
                    then = (*at[:group], position + 1, *at[group + 1 :])
                    more = [{**one, position: name} for one in chosen]
                    following[then] = [*following.get(then, ()), *more]
        ways = {at: chosen[:2] for at, chosen in following.items()}
    whole = ways.get(ends, [])
    if len(whole) != 1:
        raise CheckpointError(
            f"{source.path} is of stage 0 and holds the optimizer's state by position, and "
            f"{'more than one assignment agrees' if whole else 'no assignment agrees'} with the "
            "shapes: give the parameters' names in the optimizer's order, one a line, with "
            "--names FILE"
        )
    return [whole[0][position] for position in range(len(group_of))]


def _distinct(module: Mapping[str, Any], buffers: Sequence[str]) -> Iterator[str]:
    """Names of a module's parameters, tied ones once."""
    seen = set()
    for name, value in module.items():
        if isinstance(value, Tensor) and name not in buffers:
            key = (value.data_ptr(), tuple(value.shape))
            if key not in seen or not value.numel():
                seen.add(key)
                yield name
