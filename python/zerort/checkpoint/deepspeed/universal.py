"""DeepSpeed's universal checkpoints: each parameter whole, in files of its own.

`zero/NAME/` holds `fp32.pt`, a file for each kind of the optimizer's state and, as a rule,
`step.pt`; `zero/optimizer_state.pt` what is common to all. Which parameters train, in which groups,
stands in the model file, as in every checkpoint of DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zerort.checkpoint.deepspeed.files import Source
from zerort.checkpoint.deepspeed.layout import Layout, Parameter, as_laid_out, stage_of
from zerort.errors import CheckpointError

__all__ = ["universal_layout"]

_MASTER = "fp32"


def universal_layout(source: Source) -> Layout:
    """Raises `CheckpointError` where files lack, are cut, or contradict one another."""
    common = source.read("zero", "optimizer_state.pt")
    with as_laid_out(source):
        inner = common.get("optimizer_state_dict", common)
        groups = inner["param_groups"]
        # One entry of the shapes is a sub-group, and a group of the optimizer may have several.
        group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        step = _common_step(inner)
        parameters = [
            _parameter(source, name, tuple(shape), group, step)
            for group, shapes in zip(group_of, source.model["param_shapes"], strict=True)
            for name, shape in shapes.items()
        ]
        stage = stage_of(common) if _is_cut(source.model) else 2
        return Layout(stage, parameters, groups, common.get("loss_scaler"))


def _is_cut(model: Mapping[str, Any]) -> bool:
    """Whether the module's values are elsewhere, as at stage 3."""
    values = [model["module"].get(name) for name in model.get("frozen_param_shapes") or ()]
    trained = [model["module"].get(name) for shapes in model["param_shapes"] for name in shapes]
    return any(isinstance(v, Tensor) and not v.numel() for v in (*values, *trained))


def _common_step(inner: Mapping[str, Any]) -> Any:
    """Of all parameters, where they have none of their own."""
    states = inner.get("state") or {}
    return next((state["step"] for state in states.values() if "step" in state), None)


def _parameter(
    source: Source, name: str, shape: tuple[int, ...], group: int, step: Any
) -> Parameter:
    home = source.path / "zero" / name
    if not name or Path(name).name != name or name == ".." or home.is_symlink():
        raise CheckpointError(f"{home} cannot be the folder of a parameter")
    kinds = sorted(file.name.removesuffix(".pt") for file in home.glob("*.pt"))
    if _MASTER not in kinds:
        raise CheckpointError(f"{home} lacks {_MASTER}.pt")
    found = {kind: _value(source.read("zero", name, f"{kind}.pt")) for kind in kinds}
    master = found.pop(_MASTER)
    state: dict[str, Sequence[Tensor]] = {}
    values: dict[str, Any] = {} if step is None else {"step": step}
    for kind, value in found.items():
        if kind != "step" and isinstance(value, Tensor) and value.shape == master.shape:
            state[kind] = [value.reshape(-1)]
        else:
            values[kind] = value
    pieces = {kind: list(parts) for kind, parts in state.items()}
    return Parameter(name, shape, group, [master.reshape(-1)], pieces, values)


def _value(found: Any) -> Any:
    """What a file holds, without what DeepSpeed needs to cut it."""
    value = found["param"] if isinstance(found, dict) else found
    return value.detach() if isinstance(value, Tensor) else value
