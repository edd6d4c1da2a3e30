"""Values for a model on the meta device, which stage 3 makes in parts.

They come from the files that `zerort.load_from` names, of which each rank reads its part; else
module by module, children first as constructors run, from `reset_parameters` of the module and
`_init_weights` of the model, on rank 0's random numbers. What neither gives is refused by name.

What this guarantees: a parameter stays the object it is, so that optimizers and ties hold; and no
rank has more than its part of the model and one module. What it does not do: below stage 3 a model
has to have its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn

from zerort.config import Config
from zerort.errors import PlanError
from zerort.mesh import Mesh
from zerort.start import gathered
from zerort.start.weights import Weights
from zerort.zero.born import exchange
from zerort.zero.init import opened, rank_zeros_numbers
from zerort.zero.nursery import Nursery

__all__ = ["give_values"]


def give_values(model: nn.Module, settings: Config, mesh: Mesh) -> None:
    """Gives every tensor on the meta device its values. All ranks call it.

    Raises `PlanError` naming one that nothing gives values, and where ranks do not have the same on
    the meta device.
    """
    if not settings.zero_optimization.shards_parameters:
        return
    names = gathered(mesh.control, lambda: [name for name, _ in _on_meta(model)])
    if not any(names):
        return
    if any(other != names[0] for other in names):
        raise PlanError(
            "ranks do not have the same tensors on the meta device: "
            + "; ".join(
                f"rank {rank} has {len(own)}{f', the first {own[0]}' if own else ''}"
                for rank, own in enumerate(names)
            )
        )
    nursery = opened(timedelta(seconds=settings.zerort.timeout))
    give_back = rank_zeros_numbers(nursery)
    nursery.building += 1
    failure: BaseException | None = None
    try:
        _give(model, settings.zerort.load_from, nursery)
    except BaseException as error:
        failure = error
        raise
    finally:
        nursery.building -= 1
        give_back()
        nursery.finish(failure)


def _on_meta(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            yield name, tensor


@torch.no_grad()
def _give(model: nn.Module, path: str | None, nursery: Nursery) -> None:
    if path is not None:
        _load(model, Weights(path), nursery)
        return
    for prefix, module, start in _children_first("", model, None):
        _start(prefix, module, start, nursery)


# From files.


def _load(model: nn.Module, weights: Weights, nursery: Nursery) -> None:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            stored = next((other for other in names[id(parameter)] if other in weights), None)
            _refuse_missing(stored, name)
            assert stored is not None

            def read(lo: int, hi: int, stored: str = stored, like: Tensor = parameter) -> Tensor:
                return weights.flat(stored, like, lo, hi)

            nursery.bear_from(parameter, name, read)
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                name = f"{prefix}.{key}" if prefix else key
                _refuse_missing(name if name in weights else None, name)
                values = weights.whole(name).to(nursery.mesh.device, buffer.dtype)
                module._buffers[key] = values


def _refuse_missing(stored: str | None, name: str) -> None:
    if stored is None:
        raise PlanError(
            f"{name} is on the meta device, and zerort.load_from has no tensor of this name: give "
            "weights of the whole model, or make this one on a real device"
        )


# From the modules themselves.

Start = Callable[[nn.Module], object]


def _children_first(
    prefix: str, module: nn.Module, start: Start | None
) -> Iterator[tuple[str, nn.Module, Start | None]]:
    """Modules with the nearest `_init_weights` above them."""
    start = getattr(module, "_init_weights", start)
    for name, child in module._modules.items():
        if child is not None:
            yield from _children_first(f"{prefix}{name}.", child, start)
    yield prefix, module, start


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Its own tensors on the meta device."""
    tensors = {**module._parameters, **module._buffers}
    return {name: t for name, t in tensors.items() if t is not None and t.is_meta}


def _start(prefix: str, module: nn.Module, start: Start | None, nursery: Nursery) -> None:
    strides = {name: tensor.stride() for name, tensor in _own(module).items()}
    names = list(strides)
    versions = {name: _unset(module, name, nursery.mesh.device) for name in names}
    for reset in ("reset_parameters", "_reset_parameters"):
        if names and callable(getattr(module, reset, None)):
            getattr(module, reset)()
    if start is not None:
        start(module)
    left = _left(module, versions)
    if left:
        raise PlanError(
            f"{prefix}{left[0]} is on the meta device, and neither reset_parameters() of "
            f"{type(module).__name__} nor _init_weights() of the model gives it values: name files "
            'in "zerort": {"load_from": ...}, or make it on a real device'
        )
    for name in names:
        if name not in module._parameters:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = _laid_out(buffer, strides[name])
        else:
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.data = _laid_out(parameter.data, strides[name])
            nursery.bear(parameter, f"{prefix}{name}", parameter.dtype, source=None)


def _unset(module: nn.Module, name: str, device: torch.device) -> int:
    """Memory for a tensor, with values that tell whether they are replaced; returns its version."""
    tensor = module._parameters.get(name)
    meta = module._buffers[name] if tensor is None else tensor
    assert meta is not None
    # A module draws its numbers in the order of memory, and gets a memory format afterwards.
    strides = (
        torch.empty(meta.shape, device="meta").stride() if _has_format(meta) else meta.stride()
    )
    fresh = torch.empty_strided(meta.shape, strides, dtype=meta.dtype, device=device)
    if fresh.is_floating_point():
        fresh.fill_(torch.nan)
    if tensor is None:
        module._buffers[name] = fresh
        return fresh._version
    exchange(tensor, fresh)
    return tensor._version


def _has_format(tensor: Tensor) -> bool:
    """Whether its elements lie as `module.to(memory_format=...)` puts them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(tensor.dim())
    return memory_format is not None and tensor.is_contiguous(memory_format=memory_format)


def _laid_out(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    if values.stride() == strides:
        return values
    laid = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device)
    return laid.copy_(values)


def _left(module: nn.Module, versions: dict[str, int]) -> list[str]:
    """What has no values yet."""
    return [name for name, version in versions.items() if _is_unset(module, name, version)]


def _is_unset(module: nn.Module, name: str, version: int) -> bool:
    own = module._parameters.get(name)
    tensor = module._buffers[name] if own is None else own
    assert tensor is not None
    if tensor.is_floating_point() and tensor.numel():
        return bool(tensor.isnan().any())
    return bool(tensor.numel()) and tensor._version == version
