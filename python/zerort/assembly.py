"""`initialize`: from a model and a configuration to an engine, with every disagreement between ranks named first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from zerort import _core, optim, schedules
from zerort.boundary import Boundary, Policy
from zerort.comm import Comm, connect
from zerort.config import Config, load
from zerort.data import training_loader
from zerort.engine import Engine, Parts
from zerort.errors import ConfigError, PlanError, PlanMismatch, ZerortError
from zerort.executor import Transport
from zerort.flat import FlatModel, Planned, plannable
from zerort.gradients import Stolen, Summed
from zerort.optim import ShardOptimizer
from zerort.optim.elementwise import why_not_elementwise
from zerort.precision import Precision
from zerort.reduction import Reduction
from zerort.trace import TraceSink, open_sink
from zerort.trace.watch import BucketWatch, Unwatched

__all__ = ["initialize"]

_log = logging.getLogger("zerort")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Engine, Optimizer, DataLoader[Any] | None, Any]:
    """Makes an engine, on every rank alike. Mirrors deepspeed.initialize.

    `optimizer` is an instance or a callable over parameters, and wins over the configuration's; `lr_scheduler` is an
    instance or a callable over the optimizer. `model_parameters` are parameters or group dicts, all of the model's
    when left out. `config` is a dict, a path to JSON, or base64 JSON.

    Returns (engine, optimizer, training loader or None, scheduler or None). The model is moved, cast, broadcast from
    rank 0, and its parameters become views of flat buffers. Raises `ConfigError`, `PlanError` (ranks whose models
    differ included) and `CommError`; on every rank, when one has a reason to.
    """
    for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
        if value is not None:
            raise ConfigError(f"initialize({name}=...) is refused: model parallelism is not built yet; leave it out")
    if model is None:
        raise ConfigError("initialize needs model=: a torch.nn.Module")
    settings = load(config, args, config_params)
    comm = connect(timedelta(seconds=settings.zerort.timeout), _device_of(model))
    chosen, planned, plan = _agreed(comm, lambda: _plan(settings, comm, model, optimizer, model_parameters))
    flat = FlatModel(plan, planned, comm.rank)
    _broadcast(comm, model, flat)
    loader = None
    if training_data is not None:
        micro = settings.resolve_batch(comm.world).micro
        loader = training_loader(
            training_data, micro, comm, drop_last=settings.dataloader_drop_last, collate=collate_fn
        )
    engine = _assemble(settings, comm, model, plan, flat, chosen, lr_scheduler, loader)
    _tell(settings, comm, model, flat)
    return engine, chosen, loader, engine.lr_scheduler


def _device_of(model: nn.Module) -> torch.device | None:
    """The GPU the model is on already, if it is on one."""
    return next((p.device for p in model.parameters() if p.device.type == "cuda"), None)


def _plan(
    settings: Config, comm: Comm, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> tuple[Optimizer, list[Planned], _core.Plan]:
    """What this rank would do: everything that can go wrong for its own reasons happens here."""
    settings.resolve_batch(comm.world)
    precision = Precision.of(settings)
    precision.cast(model)
    model.to(comm.device)
    chosen = _choose_optimizer(settings, model, optimizer, model_parameters)
    groups = {id(p): i for i, group in enumerate(chosen.param_groups) for p in group["params"]}
    planned = plannable(model.named_parameters(), groups)
    if len(planned) < len(groups):
        known = {id(member.tensor) for member in planned}
        strange = [tuple(p.shape) for group in chosen.param_groups for p in group["params"] if id(p) not in known]
        raise PlanError(f"the optimizer holds {len(strange)} parameters that are not the model's, shapes {strange[:3]}")
    window = settings.zerort.window
    plan = _core.Plan(
        [member.spec() for member in planned],
        world=comm.world,
        stage=settings.zero_optimization.stage,
        cap_bytes=settings.cap_bytes,
        cap_elements=settings.cap_elements,
        window=window if isinstance(window, int) else None,
    )
    return chosen, planned, plan


def _choose_optimizer(
    settings: Config, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> Optimizer:
    params = list(model.parameters() if model_parameters is None else model_parameters)
    if isinstance(optimizer, Optimizer):
        chosen = optimizer
    elif callable(optimizer):
        chosen = optimizer(params)
    elif settings.optimizer is not None:
        chosen = optim.build(settings.optimizer.type, params, settings.optimizer.params)
    else:
        raise ConfigError("no optimizer: give initialize(optimizer=...) or the key optimizer {type, params}")
    if chosen.state:
        raise PlanError(
            "the optimizer has state already, and its tensors are about to become shards: make it anew, and load state "
            "with engine.load_checkpoint"
        )
    return chosen


def _agreed(
    comm: Comm, attempt: Callable[[], tuple[Optimizer, list[Planned], _core.Plan]]
) -> tuple[Optimizer, list[Planned], _core.Plan]:
    """Runs `attempt` on all ranks and raises on all if it failed on one, or if they planned different things."""
    mine, failure = None, None
    try:
        mine = attempt()
    except (ZerortError, TypeError, ValueError, RuntimeError) as error:
        failure = error
    told = comm.gather_objects(
        (f"{type(failure).__name__}: {failure}", []) if mine is None else (None, [m.signature() for m in mine[1]])
    )
    if failure is not None:
        raise failure
    assert mine is not None
    for rank, (reason, _) in enumerate(told):
        if reason is not None:
            raise PlanError(f"rank {rank} cannot start, so no rank does. {reason}")
    for rank, (_, signatures) in enumerate(told):
        _compare(told[0][1], signatures, rank)
    digests = comm.gather_objects(mine[2].digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise PlanMismatch(
                f"rank {rank} has rank 0's parameters but another plan: give all ranks the same zero_optimization and "
                "zerort sections"
            )
    return mine


def _compare(ours: Sequence[Any], theirs: Sequence[Any], rank: int) -> None:
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            raise PlanMismatch(
                f"ranks have different models, first in {_told(a)} on rank 0 and {_told(b)} on rank {rank}"
            )
    if len(ours) != len(theirs):
        longer, name = (0, ours) if len(ours) > len(theirs) else (rank, theirs)
        extra = name[min(len(ours), len(theirs))]
        raise PlanMismatch(
            f"ranks have different models: rank 0 has {len(ours)} parameters and rank {rank} {len(theirs)}; the first "
            f"that only rank {longer} has is {_told(extra)}"
        )


def _told(signature: tuple[str, tuple[int, ...], str, int]) -> str:
    name, shape, dtype, group = signature
    return f"{name} {list(shape)} {dtype.removeprefix('torch.')} (group {group})"


def _broadcast(comm: Comm, model: nn.Module, flat: FlatModel) -> None:
    """Everyone starts from rank 0's values; what is not planned travels one by one, once."""
    planned = {id(parameter) for parameter in flat.params}
    with torch.no_grad():
        for bucket in flat.buckets:
            comm.broadcast(bucket.values.tensor)
            bucket.refresh_master()
        for tensor in (*(p for p in model.parameters() if id(p) not in planned), *model.buffers()):
            data = tensor.detach()
            piece = data if data.is_contiguous() else data.contiguous()
            comm.broadcast(piece)
            if piece is not data:
                data.copy_(piece)


def _assemble(
    settings: Config,
    comm: Comm,
    model: nn.Module,
    plan: _core.Plan,
    flat: FlatModel,
    chosen: Optimizer,
    lr_scheduler: Any,
    loader: DataLoader[Any] | None,
) -> Engine:
    batch, precision = settings.resolve_batch(comm.world), Precision.of(settings)
    reason = why_not_elementwise(chosen)
    if reason is not None and plan.shards_optimizer:
        raise ConfigError(
            f"optimizer {type(chosen).__name__} cannot run on shards: {reason}. Use zero_optimization.stage 0, "
            "which keeps the optimizer whole"
        )
    shards = ShardOptimizer(chosen, flat, whole_tensors=reason is not None)
    shards.split()
    sums = batch.accumulation > 1 and not settings.reduce_every_micro_batch
    transports = [
        Transport(
            Summed(bucket) if sums and bucket.has_master else Stolen(bucket),
            precision.wire_for(bucket.params[0].dtype),
        )
        for bucket in flat.buckets
    ]
    sink = _open_sink(settings, comm)
    watch = BucketWatch(sink, flat.names) if sink.enabled else Unwatched()
    reduction = Reduction(plan, flat, comm, transports, watch)
    boundary = Boundary(
        comm,
        flat,
        reduction,
        shards,
        precision.loss_scale,
        Policy(settings.gradient_clipping, settings.zerort.on_nonfinite),
        sink,
    )
    scheduler = _scheduler(settings, chosen, lr_scheduler)
    return Engine(model, Parts(settings, comm, batch, precision, reduction, boundary, scheduler, sink, loader))


def _open_sink(settings: Config, comm: Comm) -> TraceSink:
    wanted = settings.zerort.trace
    return open_sink(
        wanted.path if wanted.enabled else None, rank=comm.rank, world=comm.world, capacity=wanted.capacity
    )


def _scheduler(settings: Config, optimizer: Optimizer, given: Any) -> Any:
    if given is not None:
        return given if hasattr(given, "step") else given(optimizer)
    if settings.scheduler is None:
        return None
    return schedules.build(settings.scheduler.type, settings.scheduler.params, optimizer)


def _tell(settings: Config, comm: Comm, model: nn.Module, flat: FlatModel) -> None:
    """Nothing is ignored in silence."""
    if comm.rank != 0:
        return
    if settings.ignored:
        _log.warning("configuration keys without effect here: %s", ", ".join(settings.ignored))
    if settings.gradient_clipping_defaulted:
        _log.warning("gradient_clipping is not given: gradients are clipped to norm %g", settings.gradient_clipping)
    planned = {id(parameter) for parameter in flat.params}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in planned]
    if left:
        _log.warning("not in the optimizer, so never updated: %s", ", ".join(left))
