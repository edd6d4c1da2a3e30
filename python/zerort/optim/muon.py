"""Muon for the matrices of hidden layers, AdamW for the rest: Jordan et al. 2024, "Muon: An
optimizer for hidden layers in neural networks".

Both are torch's own. What goes to which is decided here, once, by what the parameters are to the
model; torch's Muon takes two dimensions, so it is shown a matrix of what has more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zerort.errors import ConfigError
from zerort.memory import Form
from zerort.optim.chain import Chain

__all__ = ["flops", "is_muon", "matrix", "muon"]

_DECIDES = "use_muon"
"""Of a parameter or of a group: whether Muon updates it."""


def muon(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float | None = None,
    muon_lr: float | None = None,
    momentum: float | None = None,
    muon_momentum: float | None = None,
    nesterov: bool | None = None,
    ns_steps: int | None = None,
    ns_coefficients: Sequence[float] | None = None,
    eps: float | None = None,
    adjust_lr_fn: str | None = None,
    weight_decay: float = 0.0,
    adam_lr: float | None = None,
    adam_betas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    adam_eps: float | None = None,
    adam_weight_decay: float | None = None,
) -> Chain:
    """`torch.optim.Muon` over the matrices of `model`'s hidden layers, `torch.optim.AdamW` over the
    rest of `params`, which are parameters or group dicts.

    `lr` and `weight_decay` are of both where AdamW is given none of its own, and decay left out is
    0; the rest left out is torch's. `betas` is DeepSpeed's name for `adam_betas`. The same keys
    stand in a group dict for its parameters. Raises `ConfigError` on a torch without Muon, and for
    what is flagged for it and is no matrix.
    """
    options = dict(locals())
    del options["params"], options["model"]
    given = {key: value for key, value in options.items() if value is not None}
    groups = list(_groups(params, model, given))
    made: list[Optimizer] = []
    if any(group[_DECIDES] for group in groups):
        made.append(_over(_kind(), (g for g in groups if g[_DECIDES]), _OF_MUON))
    if not all(group[_DECIDES] for group in groups):
        rest = (group for group in groups if not group[_DECIDES])
        made.append(_over(torch.optim.AdamW, rest, _OF_ADAM, fused=True))
    return Chain(made)


def flops(shape: Sequence[int], steps: int) -> int:
    """Floating-point operations of the orthogonalisation of a matrix, first dimension by all
    others.
    """
    sides = shape[0], math.prod(shape[1:])
    short, long = min(sides), max(sides)
    return steps * (4 * short * short * long + 2 * short**3)


def is_muon(optimizer: Optimizer) -> bool:
    """Whether it is torch's, or made of it."""
    kind = getattr(torch.optim, "Muon", None)
    return kind is not None and isinstance(optimizer, kind)


def matrix(name: str, form: Form) -> Form:
    """A parameter of more than two dimensions as (first, all others), without a copy: columns stand
    in the order in which they lie in memory. Raises `ConfigError` where that cannot be.
    """
    if len(form.shape) <= 2:
        return form
    rows = form.shape[0]
    columns = math.prod(form.shape[1:])
    if rows == 1 or form.strides[0] == columns:
        return Form((rows, columns), (columns, 1))
    if form.strides[0] == 1:
        return Form((rows, columns), (1, rows))
    raise ConfigError(
        f"optimizer Muon: parameter {name} of shape {list(form.shape)} is no matrix in memory, for "
        f"its strides are {list(form.strides)}: make it contiguous before zerort.initialize, or "
        f"set its {_DECIDES} = False"
    )


def _kind() -> Any:
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise ConfigError(
            f"optimizer.type: Muon is torch's own from torch 2.9 on, and this is torch "
            f"{torch.__version__}: update torch, or give AdamW"
        )
    return kind


def _over(kind: Any, groups: Iterable[dict[str, Any]], keys: Sequence[str], **fixed: Any) -> Any:
    """The optimizer `kind` over these groups, whose options `keys` its constructor checks. It is
    made over matrices that stand for the parameters, which may have more dimensions than it takes.
    """
    made: list[Any] = []
    for group in groups:
        options = {key: group[key] for key in keys if key in group}
        one = kind([nn.Parameter(torch.zeros(1, 1))], **options, **fixed)
        one.param_groups[0].update(group)
        made.append(one)
    for other in made[1:]:
        made[0].param_groups += other.param_groups
    return made[0]


def _groups(
    params: Iterable[Any], model: nn.Module, given: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Each group dict's parameters in one group or two, with all options of who updates them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    aside = set(_embeddings_and_head(model))
    for group in _as_groups(params):
        decided = group.get(_DECIDES)
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in group["params"]:
            flag = getattr(parameter, _DECIDES, None) if decided is None else decided
            chosen = id(parameter) not in aside and parameter.dim() > 1 if flag is None else flag
            if chosen and parameter.dim() < 2:
                raise ConfigError(
                    f"optimizer Muon: parameter {names.get(id(parameter), '?')} of shape "
                    f"{list(parameter.shape)} is flagged {_DECIDES}, and Muon updates matrices: "
                    "leave the flag out"
                )
            parts[bool(chosen) and parameter.numel() > 0].append(parameter)
        own = {key: value for key, value in group.items() if key not in ("params", _DECIDES)}
        for for_muon, part in parts.items():
            if part:
                found = _options(own, given, for_muon=for_muon, decided=decided is not None)
                yield {**found, "params": part, _DECIDES: for_muon}


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, named ones, or group dicts of them, as group dicts."""
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    found = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        bare = [each[1] if isinstance(each, tuple) else each for each in members]
        found.append({**group, "params": bare})
    return found


def _embeddings_and_head(model: nn.Module) -> Iterator[int]:
    """Ids of what is at a model's two ends: embeddings, and the linear layer that is tied to one,
    or else was registered last.
    """
    parts = list(model.modules())
    embeddings = [part for part in parts if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    ids = {id(parameter) for part in embeddings for parameter in part.parameters()}
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    tied = [part for part in linears if any(id(p) in ids for p in part.parameters())]
    yield from ids
    for part in tied or linears[-1:]:
        yield from map(id, part.parameters())


_OF_MUON = (
    "lr",
    "momentum",
    "nesterov",
    "ns_steps",
    "ns_coefficients",
    "eps",
    "adjust_lr_fn",
    "weight_decay",
)
_OF_ADAM = ("lr", "betas", "eps", "weight_decay")
_PREFIXES = ("muon_", "adam_")


def _options(
    group: Mapping[str, Any], given: Mapping[str, Any], *, for_muon: bool, decided: bool
) -> dict[str, Any]:
    """The options of one optimizer for a group: the group's before the configuration's, and a name
    with its prefix before the plain one.
    """
    prefix, keys = (_PREFIXES[0], _OF_MUON) if for_muon else (_PREFIXES[1], _OF_ADAM)
    known = {p + key for p in ("", *_PREFIXES) for key in (*_OF_MUON, *_OF_ADAM)}
    found = {key: value for key, value in group.items() if key not in known}
    for key in keys:
        places = [(group, prefix + key), (group, key), (given, prefix + key), (given, key)]
        if not decided:
            if key == "lr":  # a rate for the matrices is none for the rest, where that has its own
                places = [places[0], places[2], places[1], places[3]]
            if key == "eps" and not for_muon:
                places = [places[0], places[2]]
        elif key == "eps" and not for_muon:
            places.pop()
        value = next((level[name] for level, name in places if name in level), None)
        if value is not None:
            found[key] = tuple(value) if isinstance(value, list) else value
    return found
