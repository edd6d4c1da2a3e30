"""`initialize`: from a model and a configuration to an engine, with every disagreement between
ranks named first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from zerort import _core, log
from zerort.config import Batch, Config, load
from zerort.device import device_for, place_of
from zerort.engine import Engine
from zerort.features import monitors
from zerort.grads.reduction import Reduction
from zerort.grads.sources import transport_of
from zerort.memory import FlatModel, Layout, PlannedParameter, plannable
from zerort.mesh import Mesh
from zerort.optim import Abilities
from zerort.params.hall import HALL, Place
from zerort.params.leaves import mark_configured
from zerort.params.publish import Publishing
from zerort.run.exchange import Exchange
from zerort.start import agreed, checks, first
from zerort.start.broadcast import broadcast, loose
from zerort.start.caps import log_cap
from zerort.start.compare import (
    compare_data,
    compare_loose,
    compare_optimizers,
    compare_plans,
)
from zerort.start.connect import connected, log_transport, started
from zerort.start.facts import facts_of, name_of_run
from zerort.start.grains import grains_of, log_ways
from zerort.start.homes import homes_for, log_homes
from zerort.start.loader import TrainingLoader, open_loader
from zerort.start.meta import give_values
from zerort.start.observers import Observers
from zerort.start.optimizer import Chosen, choose_optimizer, log_members
from zerort.start.place import gather_loose, log_never, log_whole, meet_heirs, move, unplanned
from zerort.start.planning import Planner, Sizes, plan_of
from zerort.start.units import Standing, passes_over, room_for
from zerort.step.boundary import Boundary, Policy
from zerort.step.compiling import COMPILED_WHOLE
from zerort.step.mode import said_of_apex
from zerort.step.overlap import Overlap
from zerort.step.precision import Precision
from zerort.step.readings import Components, Relocation
from zerort.tune.task import overridden
from zerort.wire import Terms
from zerort.zero.init import close_if_empty, inherit, origin_of

__all__ = ["initialize"]

_log = logging.getLogger("zerort")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | Callable[[Iterable[Any]], Optimizer] | None = None,
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
) -> tuple[Engine, Optimizer | None, TrainingLoader | None, Any]:
    """Makes an engine, on every rank alike. Mirrors deepspeed.initialize.

    `optimizer` is an instance, a list of instances over different parameters, or a callable over
    parameters, and wins over the configuration's; where there is none, the engine only runs
    forward. `lr_scheduler` is an instance or a callable over the optimizer. `model_parameters` are
    parameters or group dicts, all of the model's when left out. `config` is a dict, a path to JSON,
    or base64 JSON.

    Returns (engine, optimizer or None, training loader or None, scheduler or None). The model is
    moved, cast, broadcast from rank 0, and its parameters become views of flat buffers. Raises
    `ConfigError`, `PlanError` (ranks whose models differ included) and `CommError`; on every rank,
    when one has a reason to.
    """
    given = Arguments(
        model,
        optimizer,
        model_parameters,
        training_data,
        lr_scheduler,
        collate_fn,
        refused={"mpu": mpu, "mesh_param": mesh_param},
    )
    with ExitStack() as undo:
        settings, mesh = connected(
            lambda: overridden(load(config, args, config_params)), model, undo
        )
        log.show(mesh.rank)
        if settings.log_level is not None:
            log.set_level(settings.log_level)
        meet_heirs(
            model if isinstance(model, nn.Module) else None,
            mesh.control,
            timedelta(seconds=settings.zerort.timeout),
        )
        if isinstance(model, nn.Module):
            give_values(model, settings, mesh)
        setup = _set_up(settings, mesh, given, undo)
        flat = _move(setup, undo)
        standing = _standing(setup, flat)
        engine = agreed(mesh.control, lambda: _assemble(setup, flat, standing, undo))
        engine._parts.boundary.exchange.follow()
        run = name_of_run(mesh.control)
        sink = setup.observers.sink
        if sink.enabled:
            sink.about(facts_of(run, settings, setup.batch, mesh, setup.plan, flat.names))
        started(mesh, settings)
        undo.pop_all()
    _log_start(setup, flat, engine)
    return engine, setup.chosen.optimizer, setup.loader, engine.lr_scheduler


@dataclass(frozen=True)
class Arguments:
    """What `initialize` was given, beside the configuration."""

    model: Any
    optimizer: Any
    model_parameters: Iterable[Any] | None
    training_data: Dataset[Any] | None
    lr_scheduler: Any
    collate_fn: Callable[[Any], Any] | None
    refused: Mapping[str, Any]
    """Arguments that have to be left out."""


@dataclass(frozen=True)
class Setup:
    """What a rank has decided by itself, before ranks are compared and memory moves."""

    config: Config
    mesh: Mesh
    model: nn.Module
    batch: Batch
    precision: Precision
    chosen: Chosen
    planner: Planner
    plan: _core.Plan
    observers: Observers
    loader: TrainingLoader | None
    collate_fn: Callable[[Any], Any] | None
    scheduler: Any
    abilities: Sequence[Abilities]
    """What each optimizer can be given."""

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for its peers."""
        return timedelta(seconds=self.config.zerort.timeout)

    @property
    def planned(self) -> Sequence[PlannedParameter]:
        """The parameters in the plan, by id."""
        return self.planner.members

    @property
    def layout(self) -> Layout:
        """Where the model's memory will lie."""
        return self.layout_of(self.plan)

    def layout_of(self, plan: _core.Plan) -> Layout:
        """Where it would by a plan of it."""
        every = self.config.reduces_every_micro_batch(plan.reduces_every_micro_batch)
        local_sums = self.batch.accumulation > 1 and not every
        precision, zero = self.precision, self.config.zero_optimization
        return Layout(
            plan,
            self.mesh.shard.rank,
            precision.sums,
            local_sums,
            homes=homes_for(self.config, plan, self.mesh.device, self.chosen.optimizer),
            low_masters=precision.low_masters,
            wide_states=precision.wide_states,
            keeps_secondary=self.mesh["inner"].world == zero.secondary_size,
        )


def _set_up(settings: Config, mesh: Mesh, given: Arguments, undo: ExitStack) -> Setup:
    """What each rank would do by itself, compared: the ranks differ in nothing that matters."""
    control = mesh.control
    setup = agreed(control, lambda: _decide(settings, mesh, given, undo))
    trains = setup.chosen.optimizer is not None  # of this rank: all take part in what follows
    first(control, lambda: monitors.check(settings) if trains else None)
    compare_plans(control, setup.planned, setup.plan.digest)
    compare_loose(control, loose(setup.model, [member.tensor for member in setup.planned]))
    compare_optimizers(control, setup.chosen.optimizer)
    compare_data(control, setup.loader)
    return setup


def _move(setup: Setup, undo: ExitStack) -> FlatModel:
    """Parameters into buckets, with rank 0's values on all ranks."""
    mesh, job = setup.mesh, setup.mesh.job
    gather_loose(setup.model, [member.tensor for member in setup.planned])
    flat = agreed(job.control, lambda: FlatModel(setup.model, setup.planned, setup.layout))
    undo.callback(lambda: inherit(flat.sharded, mesh, flat.state, setup.timeout))
    broadcast(job, setup.model, flat)
    close_if_empty(job.control)
    return flat


def _decide(settings: Config, mesh: Mesh, given: Arguments, undo: ExitStack) -> Setup:
    """What this rank would do: everything that can go wrong for its own reasons happens here, the
    user's factories included, before anything is moved into buckets.
    """
    checks.refuse_arguments(given.refused)
    model = checks.checked(given.model)
    batch, precision = settings.resolve_batch(mesh.world), Precision.of(settings)
    checks.refuse_unready(model)
    mark_configured(model, settings)
    checks.settle_sparse(model, settings.zerort.sparse_gradients)
    place_of(model.named_parameters())  # refuses what is not supported
    precision.cast(model)
    move(model, mesh.device)
    chosen = choose_optimizer(settings, model, given.optimizer, given.model_parameters)
    abilities = chosen.able(shards=settings.zero_optimization.shards_optimizer)
    planned = plannable(
        list(model.named_parameters()),
        chosen.groups,
        precision.wires(model),
        origin_of,
        holds=settings.zero_optimization.shards_parameters,
    )
    planner, plan = plan_of(
        settings,
        model,
        planned,
        sizes=Sizes.of(mesh),
        window=mesh.shard.window,
        grains_of=partial(grains_of, chosen.optimizer, abilities),
    )
    observers = Observers.of(settings, mesh)
    undo.callback(observers.sink.close)
    return Setup(
        settings,
        mesh,
        model,
        batch,
        precision,
        chosen,
        planner,
        plan,
        observers,
        loader=open_loader(given.training_data, batch, mesh.job, settings, given.collate_fn),
        collate_fn=given.collate_fn,
        scheduler=chosen.scheduler(settings, given.lr_scheduler),
        abilities=abilities,
    )


def _standing(setup: Setup, flat: FlatModel) -> Standing | None:
    """All ranks, before their engines are made; None where parameters are not sharded."""
    if not setup.plan.units:
        return None
    mesh, timeout = setup.mesh, setup.timeout
    place = Place(HALL, HALL.prepare(mesh.control, timeout), type(setup.model).__name__)
    return Standing(place, lambda left: inherit(left, mesh, flat.state, timeout))


def _assemble(setup: Setup, flat: FlatModel, standing: Standing | None, undo: ExitStack) -> Engine:
    config, mesh, precision = setup.config, setup.mesh, setup.precision
    sink = setup.observers.sink
    update = setup.chosen.over(flat, setup.abilities)
    update.split()
    update.settle_rates()
    terms = Terms(precision.predivide, config.wire_feedback, mesh.rank)
    transports = {bucket.spec.id: transport_of(bucket, terms, mesh) for bucket in flat.trained}
    watch = setup.observers.watch(flat)
    names = flat.names if mesh.rank == 0 else None
    room = room_for(config, setup.plan, names) if setup.plan.units else None
    elements = None if room is None else room.elements
    reduction = Reduction(setup.plan, flat, mesh, transports, watch, elements)
    undo.callback(reduction.close)
    passes = passes_over(setup.model, flat, reduction, mesh, room, standing)
    undo.callback(passes.detach)
    publishing = Publishing(setup.model, flat, reduction.executor)
    undo.callback(publishing.close)
    policy = Policy(config.gradient_clipping, config.zerort.on_nonfinite)
    exchange = Exchange(setup.plan, flat, mesh.shard, reduction.executor.waits, sink)
    overlap = _overlap(setup, flat, reduction)
    boundary = Boundary(
        mesh, flat, reduction, exchange, update, precision.loss_scale, policy, sink, overlap
    )
    parts = Components(
        config,
        mesh,
        setup.batch,
        precision,
        reduction,
        boundary,
        setup.scheduler,
        sink,
        setup.loader,
        setup.collate_fn,
        passes,
        setup.observers.times,
        setup.observers.communication,
        _relocation(setup),
    )
    return Engine(setup.model, parts)


def _overlap(setup: Setup, flat: FlatModel, reduction: Reduction) -> Overlap:
    """At stage 3 a pass gathers what it needs; what stays whole there comes with the step."""
    publishes = bool(reduction.published) and setup.mesh.shard.world > 1
    return Overlap(
        setup.config.zerort.publish,
        flat,
        setup.mesh,
        able=publishes and not setup.plan.units,
        timed=device_for(setup.mesh.device).blocks,
    )


def _relocation(setup: Setup) -> Relocation:
    planner = setup.planner.settled()
    layout_of = replace(setup, planner=planner).layout_of
    return Relocation(planner.members, planner.other_plan, layout_of)


def _log_start(setup: Setup, flat: FlatModel, engine: Engine) -> None:
    """Nothing is ignored in silence."""
    settings, model = setup.config, setup.model
    if setup.mesh.rank != 0:
        return
    if settings.dump_state:
        _log.info("configuration: %s", settings.model_dump_json(indent=2))
    if settings.ignored:
        _log.info("configuration keys without effect here: %s", ", ".join(settings.ignored))
    if line := said_of_apex(settings):
        _log.info(line)
    log_homes(flat)
    log_transport(settings, setup.mesh)
    left = unplanned(model, flat.params)
    if setup.chosen.optimizer is None:
        _log.info("the engine only runs forward, %s", setup.chosen.reason)
    else:
        _log_training(settings, engine)
        log_never(left)
        log_cap(setup.planner.cap(settings), setup.mesh.world)
        log_members(setup.chosen.optimizer, flat)
        log_ways(setup.plan, flat)
    if settings.zero_optimization.shards_parameters:
        log_whole(left, settings.zero_optimization.stage3_param_persistence_threshold)


def _log_training(settings: Config, engine: Engine) -> None:
    if settings.gradient_clipping_defaulted:
        _log.info(
            "gradient_clipping is not given: gradients are clipped to norm %g",
            settings.gradient_clipping,
        )
    if engine.is_compiled:
        _log.warning(COMPILED_WHOLE)
