"""Keys of what is done beside gradients."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.key import Key, absent, disabled, ignored, refused, same, without

__all__ = ["ROWS"]


def _eigenvalue(section: str) -> Sequence[Key]:
    """The keys of a section that may stand in two places."""
    keys = {
        "enabled": "turns it on",
        "verbose": "each block's eigenvalue in the log",
        "max_iter": "Hessian-vector products a block, at most; 100",
        "tol": "relative change at which the iteration ends; 0.01",
        "stability": "added to the norm that vectors are divided by; 1e-6",
        "gas_boundary_resolution": "boundaries from one computation to the next; 1",
        "layer_name": "path from the module to its blocks; bert.encoder.layer",
        "layer_num": "how many blocks",
    }
    return [same(f"{section}.{key}", effect) for key, effect in keys.items()]


ROWS: Sequence[Key] = (
    # what is printed and recorded
    same(
        "steps_per_print",
        "a line in the log every so many steps, with samples/s; none when left out or Infinity",
    ),
    same(
        "wall_clock_breakdown",
        "a line in the log at each step: times of forward, backward, optimizer, publish",
    ),
    same("dump_state", "the configuration, with all defaults, in the log at the start"),
    ignored("memory_breakdown", "memory use is not printed"),
    same(
        "log_level",
        "level of Python's logger named zerort: debug, info, warning, error or critical; left out, "
        "it is as it was, or info on rank 0 and warning on the others",
    ),
    same("timers", "what is timed"),
    same("timers.throughput", "engine.tput_timer, and samples/s in the lines of progress"),
    same("timers.throughput.enabled", "false turns it off"),
    ignored("timers.throughput.synchronized", "no device is synchronised for a time"),
    same("flops_profiler", "a report of what each module's forward costs, at one step"),
    same("flops_profiler.enabled", "turns it on, and wall_clock_breakdown with it"),
    same("flops_profiler.profile_step", "steps before the one that is profiled; 1 when left out"),
    same("flops_profiler.recompute_fwd_factor", "part of the forward that backward computes anew"),
    same("flops_profiler.module_depth", "depths in the aggregated part; -1: all but the deepest"),
    same("flops_profiler.top_modules", "classes of modules at each depth; 1 when left out"),
    same("flops_profiler.detailed", "false: without the tree of modules"),
    same("flops_profiler.output_file", "a file instead of standard output; it is overwritten"),
    same("comms_logger", "engine.communication_summary()"),
    same("comms_logger.enabled", "turns it on"),
    same("comms_logger.verbose", "a line in the log for each collective"),
    same("comms_logger.prof_all", "false: only those of prof_ops"),
    same("comms_logger.prof_ops", "reduce_scatter, all_gather, with or without torch's endings"),
    ignored("comms_logger.debug", "DeepSpeed puts the caller's name before each collective's"),
    # monitors
    same("tensorboard", "rank 0 writes loss, learning rate and more for TensorBoard"),
    same("tensorboard.enabled", "turns it on; needs the package tensorboard"),
    same("tensorboard.output_path", "folder of the jobs' folders; the working directory if empty"),
    same("tensorboard.job_name", "folder of this job's events"),
    same("csv_monitor", "rank 0 writes a file for each name, a row for each boundary"),
    same("csv_monitor.enabled", "turns it on"),
    same("csv_monitor.output_path", "folder of the jobs' folders; the working directory if empty"),
    same("csv_monitor.job_name", "folder of this job's files; a resumed run goes on in them"),
    same("wandb", "rank 0 writes to a run of Weights & Biases, one that is open or a new one"),
    same("wandb.enabled", "turns it on; needs the package wandb"),
    same("wandb.group", "group of the run"),
    same("wandb.team", "entity of the run"),
    same("wandb.project", "project of the run"),
    same("comet", "rank 0 writes to an experiment of Comet, one that is open or a new one"),
    same("comet.enabled", "turns it on; needs the package comet_ml"),
    same("comet.samples_log_interval", "samples between two values of a name; 100 when left out"),
    same("comet.project", "project of the experiment"),
    same("comet.workspace", "workspace of the project"),
    same("comet.api_key", "Comet's key; better in COMET_API_KEY than in a file"),
    same("comet.experiment_name", "name of the experiment"),
    same("comet.experiment_key", "key of the experiment"),
    same("comet.online", "false: an archive on this machine, to be uploaded later"),
    same("comet.mode", "get, create or get_or_create an experiment"),
    same("trackio", "rank 0 writes to a run of Trackio, one that is open or a new one"),
    same("trackio.enabled", "turns it on; needs the package trackio"),
    same("trackio.project", "project of the run"),
    # what else DeepSpeed does
    same("activation_checkpointing", "of zerort.checkpointing, which is torch.utils.checkpoint"),
    refused(
        "activation_checkpointing.partition_activations",
        "activations are not cut over ranks, as there is no model parallelism; leave it out",
    ),
    refused(
        "activation_checkpointing.contiguous_memory_optimization",
        "there is no buffer for partitioned activations; leave it out",
    ),
    refused(
        "activation_checkpointing.cpu_checkpointing",
        "activations stay where they are computed; call checkpoint() within "
        "torch.autograd.graph.save_on_cpu()",
    ),
    ignored(
        "activation_checkpointing.number_checkpoints",
        "it sizes the buffer of contiguous activations, of which there is none",
    ),
    ignored(
        "activation_checkpointing.synchronize_checkpoint_boundary",
        "it makes DeepSpeed's times exact; no result depends on it",
    ),
    ignored(
        "activation_checkpointing.profile",
        "it prints times of each checkpoint; torch.profiler and the trace have them",
    ),
    ignored("aio", "of offloading to disk, which is refused where it is asked for"),
    ignored("vocabulary_size", "DeepSpeed only warns when it is not a multiple of 8"),
    same("progressive_layer_drop", "the module's forward is told how many layers to keep"),
    same("progressive_layer_drop.enabled", "turns it on"),
    same("progressive_layer_drop.theta", "the share of layers kept in the end; 0.5 when left out"),
    same("progressive_layer_drop.gamma", "how fast it falls per step; 0.001 when left out"),
    same("eigenvalue", "the largest eigenvalue of the loss's Hessian over each block"),
    *_eigenvalue("eigenvalue"),
    same("quantize_training", "MoQ: parameters are quantized after each step, masters are not"),
    same("quantize_training.enabled", "turns it on; needs fp16 or bf16"),
    same("quantize_training.quantize_verbose", "each fall of a layer's bits in the log"),
    ignored("quantize_training.quantizer_kernel", "there is one way to quantize"),
    same("quantize_training.quantize_groups", "runs of a parameter with a scale each; 1"),
    same("quantize_training.quantize_type", "an older place of quantize_algo.q_type"),
    same("quantize_training.quantize_bits", "what bits fall from and to"),
    same("quantize_training.quantize_bits.start_bits", "bits at first, 1 to 16; 16"),
    same("quantize_training.quantize_bits.target_bits", "bits in the end; 8 without the section"),
    same("quantize_training.quantize_schedule", "when bits fall"),
    same(
        "quantize_training.quantize_schedule.quantize_period",
        "steps to the first fall, a bit a time; each period is twice the one before; 1000",
    ),
    same(
        "quantize_training.quantize_schedule.schedule_offset",
        "steps before anything is quantized; 1000",
    ),
    same("quantize_training.quantize_algo", "how values are rounded"),
    same("quantize_training.quantize_algo.q_type", "symmetric or asymmetric; symmetric"),
    same("quantize_training.quantize_algo.rounding", "nearest or stochastic; nearest"),
    same("quantize_training.fp16_mixed_quantize", "parameters and quantized ones, mixed"),
    same("quantize_training.fp16_mixed_quantize.enabled", "turns it on"),
    same(
        "quantize_training.fp16_mixed_quantize.quantize_change_ratio",
        "how much more is quantized with each step; 0.001",
    ),
    same("quantize_training.eigenvalue", "as the section of this name at top level"),
    *_eigenvalue("quantize_training.eigenvalue"),
    refused(
        "compile",
        "DeepCompile is not built; torch.compile works on the model",
        without("deepcompile", False),
    ),
    refused("tensor_parallel", "tensor parallelism is not built", without("autotp_size", 0, 1)),
    refused("expert_parallel", "expert parallelism is not built", disabled),
    refused("use_data_before_expert_parallelism", "expert parallelism is not built"),
    refused("moe", "mixture of experts is not built", disabled),
    refused("pipeline", "pipeline parallelism is not built"),
    refused(
        "sparse_attention",
        "attention is the model's own, and an empty section asks for DeepSpeed's; leave it out",
        absent,
    ),
    refused("compression_training", "compression is not built"),
    refused("weight_quantization", "compression is not built"),
    refused(
        "curriculum_learning",
        "curricula are not built; give initialize a sampler's loader",
        disabled,
    ),
    refused("data_efficiency", "data sampling and routing are not built", disabled),
    refused("elasticity", "batch sizes are not chosen for the job; give them", disabled),
    refused("autotuning", "tuning runs are not built", disabled),
    refused("hybrid_engine", "training only; generation engines are not built", disabled),
)
