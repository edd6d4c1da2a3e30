"""DeepSpeed's getters of the configuration, one line each: every one returns what one key says.

A table of methods. What is read of a run, rather than of its configuration, is in `readings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from zerort.config import Config
from zerort.config.offload import OffloadParam
from zerort.config.quantize import Eigenvalue, QuantizeTraining
from zerort.optim import name_of

__all__ = ["Getters"]

T = TypeVar("T")
Home = TypeVar("Home", bound=OffloadParam)


def _key(text: str, read: Callable[[Config], T]) -> Callable[[Any], T]:
    """A method that reads the configuration; `text` documents it."""

    def get(self: Any) -> T:
        return read(self.config)

    get.__doc__ = text
    return get


def _eigenvalue(config: Config) -> Eigenvalue:
    """The section, wherever it stands."""
    inner = config.quantize_training.eigenvalue
    return inner if config.quantize_training.enabled and inner.enabled else config.eigenvalue


def _given(section: Home | None, meant: Home) -> Home | None:
    """A section, by the old spellings too."""
    return meant if section is None and meant.on_host else section


def _quantize_training(section: QuantizeTraining) -> tuple[Any, ...]:
    bits, schedule = section.quantize_bits, section.quantize_schedule
    mixed = section.fp16_mixed_quantize
    return (
        section.enabled,
        bits.target_bits,
        bits.start_bits,
        schedule.quantize_period,
        schedule.schedule_offset,
        section.quantize_groups,
        mixed.enabled,
        mixed.quantize_change_ratio,
        "symmetric" if section.symmetric else "asymmetric",
        section.quantize_algo.rounding,
        section.quantize_verbose,
        False,
    )


class Getters:
    """Mixed into the engine, whose `config` and `optimizer` they read."""

    # Placement.

    zero_optimization = _key(
        "Whether anything is sharded: the stage is not 0.",
        lambda c: c.zero_optimization.shards_optimizer,
    )
    zero_optimization_stage = _key("The ZeRO stage.", lambda c: c.zero_optimization.stage)
    zero_optimization_partition_gradients = _key(
        "Whether gradients are sharded: from stage 2 on.",
        lambda c: c.zero_optimization.shards_gradients,
    )
    zero_optimization_partition_weights = _key(
        "Whether parameters are sharded: at stage 3.",
        lambda c: c.zero_optimization.shards_parameters,
    )
    zero_gather_16bit_weights_on_model_save = _key(
        "Whether `save_16bit_model` writes the weights at stage 3.",
        lambda c: c.zero_optimization.gathers_weights,
    )

    zero_offload_optimizer = _key(
        "The section `offload_optimizer`, in whichever spelling; None where neither is given.",
        lambda c: _given(c.zero_optimization.offload_optimizer, c.zero_optimization.offloads[0]),
    )
    zero_offload_param = _key(
        "The section `offload_param`, likewise.",
        lambda c: _given(c.zero_optimization.offload_param, c.zero_optimization.offloads[1]),
    )
    zero_cpu_offload = _key(
        "Whether masters, sums and optimizer state are at home on the host.",
        lambda c: c.zero_optimization.offloads[0].on_host,
    )
    zero_use_cpu_optimizer = _key(
        "The same: what is at home there is updated there.",
        lambda c: c.zero_optimization.offloads[0].on_host,
    )

    # Gradients.

    managed_gradient_accumulation = _key(
        "Whether windows end by count; False: where the caller steps.",
        lambda c: c.managed_gradient_accumulation,
    )
    gradient_clipping = _key(
        "The largest norm of the averaged gradient; 0 where nothing is clipped.",
        lambda c: c.gradient_clipping,
    )
    postscale_gradients = _key(
        "Whether gradients are divided behind the sum over ranks alone.",
        lambda c: not c.prescale_gradients,
    )
    gradient_predivide_factor = _key(
        "The part of the division that comes before the sum.",
        lambda c: c.gradient_predivide_factor,
    )

    # Precision.

    fp16_master_weights_and_gradients = _key(
        "Whether fp16 parameters are their own masters.",
        lambda c: c.fp16.fp16_master_weights_and_grads,
    )
    bf16_master_weights_and_gradients = _key(
        "Whether bf16 parameters are their own masters.",
        lambda c: c.bf16.bf16_master_weights_and_grads,
    )
    bf16_optimizer_states = _key(
        "Whether the optimizer's state is bf16 too.", lambda c: c.bf16.bf16_optimizer_states
    )
    fp16_enabled = _key("Whether parameters are fp16.", lambda c: c.fp16.enabled)
    bfloat16_enabled = _key("Whether parameters are bf16.", lambda c: c.bf16.enabled)
    fp16_auto_cast = _key("Whether inputs are cast to fp16.", lambda c: c.fp16.auto_cast)
    torch_autocast_enabled = _key(
        "Whether the forward runs under torch.autocast.", lambda c: c.torch_autocast.enabled
    )
    dynamic_loss_scale = _key(
        "Whether the key `fp16.loss_scale` asks for a scale that moves.", lambda c: c.fp16.dynamic
    )
    initial_dynamic_scale = _key(
        "The scale that a dynamic one begins with.", lambda c: 2.0**c.fp16.initial_scale_power
    )

    # Optimizer and schedule.

    def optimizer_name(self: Any) -> str | None:
        """The configured name; the class of the optimizer where none is configured; None where
        there is no optimizer.
        """
        if self.config.optimizer is not None:
            return str(self.config.optimizer.type)
        return None if self.optimizer is None else name_of(self.optimizer)

    optimizer_params = _key(
        "Arguments of the configured optimizer; None where none is configured.",
        lambda c: None if c.optimizer is None else dict(c.optimizer.params),
    )
    scheduler_name = _key(
        "The configured schedule's name; None where none is configured.",
        lambda c: None if c.scheduler is None else c.scheduler.type,
    )
    scheduler_params = _key(
        "Arguments of the configured schedule; None where none is configured.",
        lambda c: None if c.scheduler is None else dict(c.scheduler.params),
    )

    # What is printed, and features.

    steps_per_print = _key(
        "Steps between lines of progress; None for never.", lambda c: c.steps_per_print
    )
    wall_clock_breakdown = _key(
        "Whether times are taken and logged: of `flops_profiler` too.", lambda c: c.breaks_down
    )
    dump_state = _key("Whether the configuration is logged at the start.", lambda c: c.dump_state)
    log_level = _key(
        "The level of the logger `zerort`, as it was given; None where it was not.",
        lambda c: c.log_level,
    )
    memory_breakdown = _key("False: memory use is not printed.", lambda c: False)
    pld_enabled = _key(
        "Whether progressive layer drop is on.", lambda c: c.progressive_layer_drop.enabled
    )
    pld_theta = _key(
        "What the share of layers kept falls to.", lambda c: c.progressive_layer_drop.theta
    )
    pld_gamma = _key("How fast it falls.", lambda c: c.progressive_layer_drop.gamma)
    pld_params = _key(
        "Both, by name; False where it is off.",
        lambda c: (
            c.progressive_layer_drop.enabled
            and {"theta": c.progressive_layer_drop.theta, "gamma": c.progressive_layer_drop.gamma}
        ),
    )
    quantize_training = _key(
        "Whether it is on, target and start bits, period, offset, groups, mixed, change ratio, "
        "kind, rounding, verbose, kernel: in DeepSpeed's order.",
        lambda c: _quantize_training(c.quantize_training),
    )
    flops_profiler_enabled = _key(
        "Whether a step's forward is profiled.", lambda c: c.flops_profiler.enabled
    )
    flops_profiler_profile_step = _key(
        "Steps before the one that is profiled.", lambda c: c.flops_profiler.profile_step
    )
    flops_profiler_recompute_fwd_factor = _key(
        "Part of the forward that the backward computes anew.",
        lambda c: c.flops_profiler.recompute_fwd_factor,
    )
    flops_profiler_module_depth = _key(
        "Depths of modules in the report; -1 for all but the deepest.",
        lambda c: c.flops_profiler.module_depth,
    )
    flops_profiler_top_modules = _key(
        "Classes of modules at each depth.", lambda c: c.flops_profiler.top_modules
    )
    flops_profiler_detailed = _key(
        "Whether the report has the tree of modules.", lambda c: c.flops_profiler.detailed
    )
    flops_profiler_output_file = _key(
        "The report's file; None for standard output.", lambda c: c.flops_profiler.output_file
    )
    eigenvalue_enabled = _key(
        "Whether block eigenvalues are computed.", lambda c: _eigenvalue(c).enabled
    )
    eigenvalue_verbose = _key("Whether each is logged.", lambda c: _eigenvalue(c).verbose)
    eigenvalue_max_iter = _key("Iterations, at most.", lambda c: _eigenvalue(c).max_iter)
    eigenvalue_tol = _key(
        "Relative change at which the iteration ends.", lambda c: _eigenvalue(c).tol
    )
    eigenvalue_stability = _key(
        "What is added to the norm that vectors are divided by.", lambda c: _eigenvalue(c).stability
    )
    eigenvalue_gas_boundary_resolution = _key(
        "Boundaries from one computation to the next.",
        lambda c: _eigenvalue(c).gas_boundary_resolution,
    )
    eigenvalue_layer_name = _key("Path to the blocks.", lambda c: _eigenvalue(c).layer_name)
    eigenvalue_layer_num = _key("How many there are.", lambda c: _eigenvalue(c).layer_num)
    amp_enabled = _key("Whether `amp` is on.", lambda c: c.amp.enabled)
    amp_params = _key(
        "What stands in `amp` beside `enabled`; False where it is off.",
        lambda c: c.amp.enabled and c.amp.model_dump(exclude={"enabled"}, exclude_unset=True),
    )


for _name, _getter in vars(Getters).items():
    if callable(_getter) and not _name.startswith("_"):
        _getter.__name__, _getter.__qualname__ = _name, f"{Getters.__name__}.{_name}"
