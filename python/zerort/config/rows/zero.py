"""Keys of `zero_optimization`."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.key import Key, absent, ignored, one_of, refused, same

__all__ = ["ROWS"]

_STAGE_3 = "of stage 3 only; has no effect at stages 0 to 2"

ROWS: Sequence[Key] = (
    # ZeRO
    same("zero_optimization", "how optimizer state and gradients are placed"),
    same(
        "zero_optimization.stage",
        "0: nothing sharded; 1: optimizer state; 2: gradients too; 3: parameters too",
    ),
    same(
        "zero_optimization.reduce_bucket_size",
        "upper bound of a bucket in elements; a tenth of the model when left out, 25 MiB at most",
    ),
    same(
        "zero_optimization.ignore_unused_parameters",
        "false: a parameter without a gradient is an error",
    ),
    ignored(
        "zero_optimization.allgather_bucket_size",
        "parameters are gathered by the buckets of gradients",
    ),
    ignored(
        "zero_optimization.allgather_partitions",
        "parameters are gathered in place, bucket by bucket",
    ),
    ignored("zero_optimization.overlap_comm", "communication always overlaps the backward"),
    ignored("zero_optimization.reduce_scatter", "the plan chooses the collective of a stage"),
    ignored(
        "zero_optimization.contiguous_gradients", "buffers are planned once and are always flat"
    ),
    ignored(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        "every bucket is cut evenly among the ranks",
    ),
    ignored(
        "zero_optimization.round_robin_gradients", "every bucket is cut evenly among the ranks"
    ),
    ignored(
        "zero_optimization.elastic_checkpoint", "every checkpoint loads on any number of ranks"
    ),
    ignored("zero_optimization.sub_group_size", "every bucket is updated by itself"),
    ignored("zero_optimization.enable_sanity_checks", "checks are always on"),
    same(
        "zero_optimization.stage3_prefetch_bucket_size",
        "elements that are gathered before they are needed",
    ),
    same(
        "zero_optimization.stage3_param_persistence_threshold",
        "parameters of at most so many elements stay whole on every rank",
    ),
    same(
        "zero_optimization.stage3_model_persistence_threshold",
        "elements of all that stay whole together, at most",
    ),
    same(
        "zero_optimization.stage3_max_live_parameters",
        "room: elements that may be whole at once; three units and at least 5e7 when left out",
    ),
    ignored(
        "zero_optimization.stage3_max_reuse_distance",
        "the order of use is known, and what is used last is freed first",
    ),
    same(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "whether save_16bit_model may gather at stage 3",
    ),
    same(
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "the old name of stage3_gather_16bit_weights_on_model_save",
    ),
    ignored("zero_optimization.stage3_module_granularity_threshold", "units are cut by size"),
    ignored(
        "zero_optimization.stage3_use_all_reduce_for_fetch_params", "all-gathers are made in place"
    ),
    ignored("zero_optimization.stage3_allgather_sequential", "the order of gathers is planned"),
    ignored(
        "zero_optimization.stage3_partition_stream_chunk_size", "a bucket is sent in one piece"
    ),
    ignored(
        "zero_optimization.memory_efficient_linear",
        "a freed weight is brought back in its own memory",
    ),
    ignored("zero_optimization.pipeline_loading_checkpoint", _STAGE_3),
    ignored("zero_optimization.override_module_apply", _STAGE_3),
    ignored(
        "zero_optimization.log_trace_cache_warnings",
        "the order of use is learnt anew when it changes",
    ),
    same("zero_optimization.leaf_module", "modules that are one stop at stage 3"),
    same("zero_optimization.leaf_module.classes", "classes of modules that are one stop"),
    same("zero_optimization.leaf_module.names", "names of modules that are one stop"),
    same("zero_optimization.leaf_module.name_suffixes", "ends of such names"),
    ignored("zero_optimization.save_muon_momentum_buffer_in_memory", _STAGE_3),
    refused(
        "zero_optimization.load_from_fp32_weights",
        "masters are always restored from fp32",
        one_of(True),
    ),
    refused("zero_optimization.legacy_stage1", "there is one stage 1"),
    refused(
        "zero_optimization.zenflow",
        "ZenFlow is not built, and an empty section asks for it; leave it out",
        absent,
    ),
    same(
        "zero_optimization.zero_hpz_partition_size",
        "stage 3: so many consecutive ranks keep what a gather from all has brought, until "
        "parameters change; 1 is off",
    ),
    refused("zero_optimization.zero_quantized_weights", "quantized weights are not built yet"),
    refused(
        "zero_optimization.zero_quantized_nontrainable_weights",
        "quantized weights are not built yet",
    ),
    same(
        "zero_optimization.zero_quantized_gradients",
        'true: gradients are sent as zerort.wire "int8" does, at any stage, without error feedback',
    ),
    refused(
        "zero_optimization.zeropp_loco_param",
        'error feedback is zerort.wire_error_feedback, beside zerort.wire "int8"',
    ),
    same(
        "zero_optimization.mics_shard_size",
        "consecutive ranks that hold one copy of the model state; all ranks when left out",
    ),
    ignored(
        "zero_optimization.mics_hierarchical_params_gather",
        "a copy over several hosts is gathered between them first by itself (zerort.hierarchy)",
    ),
)
