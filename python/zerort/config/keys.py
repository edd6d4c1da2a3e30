"""Every configuration key of DeepSpeed 0.19 and of zerort, and what becomes of it here.

One table, three fates. `SAME`: acted upon with DeepSpeed's meaning (deviations are in the text).
`IGNORED`: it tunes speed or memory of a mechanism that works differently here, so that leaving it
out changes no result. `REFUSED`: it asks for something that is not there, and going on without it
would train another model than the one asked for; a value that asks for nothing is accepted. A key
that is not in the table is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = ["ALIASES", "KEYS", "SIZES", "Fate", "Key", "as_markdown"]


class Fate(Enum):
    """What becomes of a key."""

    SAME = "same"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Key:
    """One row of the table."""

    path: str
    """Dotted path from the root of the file."""
    fate: Fate
    effect: str
    """What the key does, why nothing is lost without it, or why it is refused."""
    harmless: Callable[[Any], bool] = lambda value: False
    """For a refused key: whether a value asks for nothing and may stand."""


def _off(value: Any) -> bool:
    return value is None or value is False or value == {}


def _disabled(value: Any) -> bool:
    return _off(value) or (isinstance(value, Mapping) and value.get("enabled", False) is False)


def _without_device(value: Any) -> bool:
    return _off(value) or (
        isinstance(value, Mapping) and value.get("device", "none") in (None, "none")
    )


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or any(value == v and type(value) is type(v) for v in values)


def _without(key: str, *values: Any) -> Callable[[Any], bool]:
    harmless = _one_of(*values)
    return lambda value: _off(value) or (isinstance(value, Mapping) and harmless(value.get(key)))


def _same(path: str, effect: str) -> Key:
    return Key(path, Fate.SAME, effect)


def _ignored(path: str, effect: str) -> Key:
    return Key(path, Fate.IGNORED, effect)


def _refused(path: str, effect: str, harmless: Callable[[Any], bool] = _off) -> Key:
    return Key(path, Fate.REFUSED, effect, harmless)


_STAGE_3 = "of stage 3 only; has no effect at stages 0 to 2"

_ROWS = (
    # batch
    _same("train_batch_size", "samples of one optimizer step over all ranks"),
    _same("train_micro_batch_size_per_gpu", "samples of one backward on one rank"),
    _same("gradient_accumulation_steps", "backwards of one optimizer step"),
    _refused(
        "managed_gradient_accumulation",
        "boundaries that the caller manages are not built yet",
        _one_of(True),
    ),
    _same(
        "dataloader_drop_last", "the loader made from training_data drops an incomplete last batch"
    ),
    # gradients
    _same(
        "gradient_clipping", "largest norm of the averaged gradient; 1.0 when left out, 0 for none"
    ),
    _same(
        "prescale_gradients", "gradients are divided before they are summed over ranks, not after"
    ),
    _same(
        "gradient_predivide_factor",
        "part of the division that comes before the sum, with prescale_gradients",
    ),
    _same("gradient_allreduce_op", 'gradients of the ranks are averaged ("mean") or added ("sum")'),
    _same("communication_data_type", "element type on the wire; the compute dtype when left out"),
    _refused(
        "sparse_gradients",
        'rows are not sent alone; "zerort": {"sparse_gradients": "densify"} trains the same',
    ),
    _refused("seq_parallel_comm_data_type", "sequence parallelism is not built", _one_of("fp32")),
    _refused("sequence_parallel_size", "sequence parallelism is not built", _one_of(1)),
    _ignored("disable_allgather", "how updated parameters are gathered is part of the plan"),
    _ignored("graph_harvesting", "a step is not captured in a CUDA graph; results are the same"),
    # precision
    _same("data_types", "element types beside the parameters'"),
    _same(
        "data_types.grad_accum_dtype", "what reduced gradients are added up in; fp32 when left out"
    ),
    _refused("data_types.param_dtype", "parameters take their dtype from fp16, bf16 or the model"),
    _refused("data_types.buffer_dtype", "buffers keep the dtype they have in the model"),
    _same("fp16", "half precision with a loss scale, at every stage"),
    _same(
        "fp16.enabled",
        "parameters are cast to fp16, inputs only by auto_cast; the optimizer keeps fp32 masters",
    ),
    _same("fp16.auto_cast", "floating-point inputs are cast to fp16"),
    _same("fp16.loss_scale", "a static loss scale; 0 means dynamic"),
    _same("fp16.initial_scale_power", "the dynamic scale starts at 2 to this power"),
    _same("fp16.loss_scale_window", "clean steps after which the dynamic scale doubles"),
    _same("fp16.hysteresis", "overflows that are waited out before the scale is halved"),
    _same("fp16.consecutive_hysteresis", "every clean step restores the hysteresis"),
    _same(
        "fp16.min_loss_scale",
        "the dynamic scale does not fall below; an overflow there is an error",
    ),
    _refused("fp16.fp16_master_weights_and_grads", "masters are fp32"),
    _same("bf16", "bfloat16 with fp32 masters; the old spelling bfloat16 is read too"),
    _same(
        "bf16.enabled",
        "parameters are cast to bf16, inputs are not; the optimizer keeps fp32 masters",
    ),
    _ignored(
        "bf16.check_grad_overflow",
        "a non-finite gradient is never applied; zerort.on_nonfinite says what is done",
    ),
    _ignored(
        "bf16.immediate_grad_update", "gradients are accumulated as they are reduced, in any case"
    ),
    _refused("bf16.bf16_master_weights_and_grads", "masters are fp32"),
    _refused("bf16.bf16_optimizer_states", "optimizer state is fp32"),
    _same("torch_autocast", "forward runs under torch.autocast"),
    _same("torch_autocast.enabled", "turns it on"),
    _same("torch_autocast.dtype", "bf16 or fp16; with fp16 the loss is scaled"),
    _same(
        "torch_autocast.lower_precision_safe_modules",
        "classes whose gradients are sent in that dtype; Linear and Conv1d to 3d when left out and "
        "communication_data_type is too",
    ),
    _refused(
        "amp",
        "Apex-style mixed precision is not built yet; fp16, bf16 and torch_autocast are",
        _disabled,
    ),
    # optimizer and scheduler
    _same("optimizer", "the optimizer, unless initialize is given one"),
    _same("optimizer.type", "Adam, AdamW, SGD, Adagrad, Lion or a name of torch.optim"),
    _same("optimizer.params", "keyword arguments of its constructor"),
    _ignored("optimizer.legacy_fusion", "torch's fused implementation is used where there is one"),
    _same("scheduler", "the learning-rate schedule, unless initialize is given one"),
    _same(
        "scheduler.type", "LRRangeTest, OneCycle, Warmup*LR or a name of torch.optim.lr_scheduler"
    ),
    _same("scheduler.params", "keyword arguments of its constructor"),
    _ignored(
        "zero_allow_untested_optimizer", "any elementwise optimizer of torch works at every stage"
    ),
    _ignored("zero_force_ds_cpu_optimizer", "optimizers are torch's on every device"),
    # ZeRO
    _same("zero_optimization", "how optimizer state and gradients are placed"),
    _same(
        "zero_optimization.stage",
        "0: nothing sharded; 1: optimizer state; 2: gradients too; 3 is not built yet",
    ),
    _same(
        "zero_optimization.reduce_bucket_size",
        "upper bound of a bucket in elements; 25 MiB when left out",
    ),
    _same(
        "zero_optimization.ignore_unused_parameters",
        "false: a parameter without a gradient is an error",
    ),
    _ignored(
        "zero_optimization.allgather_bucket_size",
        "parameters are gathered by the buckets of gradients",
    ),
    _ignored(
        "zero_optimization.allgather_partitions",
        "parameters are gathered in place, bucket by bucket",
    ),
    _ignored("zero_optimization.overlap_comm", "communication always overlaps the backward"),
    _ignored("zero_optimization.reduce_scatter", "the plan chooses the collective of a stage"),
    _ignored(
        "zero_optimization.contiguous_gradients", "buffers are planned once and are always flat"
    ),
    _ignored(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        "every bucket is cut evenly among the ranks",
    ),
    _ignored(
        "zero_optimization.round_robin_gradients", "every bucket is cut evenly among the ranks"
    ),
    _ignored(
        "zero_optimization.elastic_checkpoint", "every checkpoint loads on any number of ranks"
    ),
    _ignored("zero_optimization.sub_group_size", "every bucket is updated by itself"),
    _ignored(
        "zero_optimization.cpu_offload_use_pin_memory",
        "of offloading, which is refused where it is asked for",
    ),
    _ignored("zero_optimization.enable_sanity_checks", "checks are always on"),
    _same(
        "zero_optimization.stage3_prefetch_bucket_size",
        "elements that are gathered before they are needed",
    ),
    _same(
        "zero_optimization.stage3_param_persistence_threshold",
        "parameters of at most so many elements stay whole on every rank",
    ),
    _same(
        "zero_optimization.stage3_model_persistence_threshold",
        "elements of all that stay whole together, at most",
    ),
    _same(
        "zero_optimization.stage3_max_live_parameters",
        "room: elements that may be whole at once; three units and at least 5e7 when left out",
    ),
    _ignored(
        "zero_optimization.stage3_max_reuse_distance",
        "the order of use is known, and what is used last is freed first",
    ),
    _same(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "whether save_16bit_model may gather at stage 3",
    ),
    _same(
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "the old name of stage3_gather_16bit_weights_on_model_save",
    ),
    _ignored("zero_optimization.stage3_module_granularity_threshold", "units are cut by size"),
    _ignored(
        "zero_optimization.stage3_use_all_reduce_for_fetch_params", "all-gathers are made in place"
    ),
    _ignored("zero_optimization.stage3_allgather_sequential", "the order of gathers is planned"),
    _ignored(
        "zero_optimization.stage3_partition_stream_chunk_size", "a bucket is sent in one piece"
    ),
    _ignored(
        "zero_optimization.memory_efficient_linear",
        "a freed weight is brought back in its own memory",
    ),
    _ignored("zero_optimization.pipeline_loading_checkpoint", _STAGE_3),
    _ignored("zero_optimization.override_module_apply", _STAGE_3),
    _ignored(
        "zero_optimization.log_trace_cache_warnings",
        "the order of use is learnt anew when it changes",
    ),
    _same("zero_optimization.leaf_module", "modules that are one stop at stage 3"),
    _same("zero_optimization.leaf_module.classes", "classes of modules that are one stop"),
    _same("zero_optimization.leaf_module.names", "names of modules that are one stop"),
    _same("zero_optimization.leaf_module.name_suffixes", "ends of such names"),
    _ignored("zero_optimization.save_muon_momentum_buffer_in_memory", _STAGE_3),
    _refused(
        "zero_optimization.load_from_fp32_weights",
        "masters are always restored from fp32",
        _one_of(True),
    ),
    _refused("zero_optimization.legacy_stage1", "there is one stage 1"),
    _refused("zero_optimization.offload_optimizer", "offloading is not built yet", _without_device),
    _refused("zero_optimization.offload_param", "offloading is not built yet", _without_device),
    _refused("zero_optimization.cpu_offload", "offloading is not built yet"),
    _refused("zero_optimization.cpu_offload_param", "offloading is not built yet"),
    _refused("zero_optimization.zenflow", "ZenFlow is not built"),
    _refused(
        "zero_optimization.zero_hpz_partition_size",
        "hierarchical partitions are not built",
        _one_of(0, 1),
    ),
    _refused(
        "zero_optimization.zero_quantized_weights", "quantized communication is not built yet"
    ),
    _refused(
        "zero_optimization.zero_quantized_nontrainable_weights",
        "quantized weights are not built yet",
    ),
    _refused(
        "zero_optimization.zero_quantized_gradients", "quantized communication is not built yet"
    ),
    _refused("zero_optimization.zeropp_loco_param", "quantized communication is not built yet"),
    _refused("zero_optimization.mics_shard_size", "MiCS sharding is not built", _one_of(-1)),
    _refused("zero_optimization.mics_hierarchical_params_gather", "MiCS sharding is not built"),
    # checkpoints
    _same("checkpoint", "saving and loading"),
    _same("checkpoint.tag_validation", "ranks that name different tags: WARN, IGNORE or FAIL"),
    _refused(
        "checkpoint.load_universal",
        "checkpoints load on any number of ranks as they are; leave it out",
    ),
    _refused(
        "checkpoint.use_node_local_storage", "a checkpoint is one directory that all ranks see"
    ),
    _ignored("checkpoint.parallel_write", "every rank writes its own file at the same time"),
    _ignored("checkpoint.writer", "files are written by one protocol, with hashes and fsync"),
    _refused("nebula", "the Nebula checkpoint service is not supported", _disabled),
    _refused("datastates_ckpt", "the DataStates checkpoint engine is not supported", _off),
    # what is printed and recorded
    _same(
        "steps_per_print", "a line in the log every so many steps; none when left out or Infinity"
    ),
    _same(
        "wall_clock_breakdown",
        "a line in the log at each step: times of forward, backward, optimizer, publish",
    ),
    _same("dump_state", "the configuration, with all defaults, in the log at the start"),
    _ignored("memory_breakdown", "memory use is not printed"),
    _ignored("log_level", "the level of Python's logger named zerort decides"),
    _ignored("timers", "times come from the trace"),
    _refused("flops_profiler", "the flops profiler is not built yet", _disabled),
    _refused("comms_logger", "not built yet; the trace shows every collective", _disabled),
    _refused("tensorboard", "monitors are not built yet", _disabled),
    _refused("wandb", "monitors are not built yet", _disabled),
    _refused("csv_monitor", "monitors are not built yet", _disabled),
    _refused("comet", "monitors are not built yet", _disabled),
    _refused("trackio", "monitors are not built yet", _disabled),
    # what else DeepSpeed does
    _ignored(
        "activation_checkpointing",
        "of DeepSpeed's own checkpointing; torch.utils.checkpoint works without it",
    ),
    _ignored("aio", "of offloading to disk, which is refused where it is asked for"),
    _ignored("vocabulary_size", "DeepSpeed only warns when it is not a multiple of 8"),
    _refused("progressive_layer_drop", "progressive layer drop is not built yet", _disabled),
    _refused("eigenvalue", "eigenvalue estimates are not built yet", _disabled),
    _refused(
        "compile",
        "DeepCompile is not built; torch.compile works on the model",
        _without("deepcompile", False),
    ),
    _refused("tensor_parallel", "tensor parallelism is not built", _without("autotp_size", 0, 1)),
    _refused("expert_parallel", "expert parallelism is not built", _disabled),
    _refused("use_data_before_expert_parallelism", "expert parallelism is not built"),
    _refused("moe", "mixture of experts is not built", _disabled),
    _refused("pipeline", "pipeline parallelism is not built"),
    _refused("sparse_attention", "attention is the model's own"),
    _refused("compression_training", "compression is not built"),
    _refused("quantize_training", "compression is not built", _disabled),
    _refused("weight_quantization", "compression is not built"),
    _refused(
        "curriculum_learning",
        "curricula are not built; give initialize a sampler's loader",
        _disabled,
    ),
    _refused("data_efficiency", "data sampling and routing are not built", _disabled),
    _refused("elasticity", "batch sizes are not chosen for the job; give them", _disabled),
    _refused("autotuning", "tuning runs are not built", _disabled),
    _refused("hybrid_engine", "training only; generation engines are not built", _disabled),
    # zerort's own
    _same("zerort", "what DeepSpeed has no key for"),
    _same(
        "zerort.window",
        'launched and unretired buckets, a number or "all"; the back end\'s choice when left out',
    ),
    _same("zerort.bucket_bytes", "upper bound of a bucket in bytes, instead of reduce_bucket_size"),
    _same("zerort.wire", "name of a wire format; follows communication_data_type when left out"),
    _same("zerort.reduce_at", '"micro_batch" or "boundary": when gradients are reduced'),
    _same(
        "zerort.reshard_after_forward",
        "stage 3: true for the smallest room, false for room for the whole model",
    ),
    _same(
        "zerort.load_from",
        "stage 3: a .safetensors file, its index or their folder, for tensors on the meta device",
    ),
    _same("zerort.on_nonfinite", '"skip" or "raise": a step with an infinity or NaN'),
    _same("zerort.unused_parameters", '"zero" or "raise": a parameter without a gradient'),
    _same("zerort.sparse_gradients", '"refuse" or "densify"'),
    _same(
        "zerort.timeout",
        "seconds a rank waits for its peers in a step (while they start, at least 300); 300 when "
        "left out",
    ),
    _same("zerort.trace", "where runtime events go"),
    _same("zerort.trace.enabled", "false: no events even with a path"),
    _same("zerort.trace.path", "Chrome trace file, one per rank"),
    _same("zerort.trace.capacity", "events kept; older ones are overwritten"),
    _same("zerort.loader", "how the loader made from training_data fetches samples"),
    _same("zerort.loader.workers", "processes of each rank that fetch samples; none when left out"),
    _same("zerort.loader.persistent_workers", "they stay from one epoch to the next"),
    _same(
        "zerort.loader.pin_memory",
        "false: batches do not go through page-locked memory on their way to an accelerator",
    ),
    _same("zerort.checkpoint", "defaults of save_checkpoint"),
    _same("zerort.checkpoint.overwrite", "an existing tag is replaced"),
    _same("zerort.checkpoint.keep_last", "number of tags kept; all when left out"),
    _same(
        "zerort.checkpoint.timeout",
        "seconds that a rank may write or read nothing while the others wait",
    ),
)

KEYS: Mapping[str, Key] = {key.path: key for key in _ROWS}
"""The table, by path."""

SIZES = frozenset(
    f"zero_optimization.{name}"
    for name in (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    )
)
"""Keys whose value "auto" means the default: an integration that leaves it has no better number."""

ALIASES: Mapping[str, str] = {"bfloat16": "bf16"}
"""Old spellings of top-level sections."""


def as_markdown() -> str:
    """The table for the documentation, one line a key."""
    lines = ["| key | here | what it does, or why not |", "|---|---|---|"]
    lines += [f"| `{key.path}` | {key.fate.value} | {key.effect} |" for key in _ROWS]
    return "\n".join(lines) + "\n"
