"""Keys of checkpoints, and zerort's own."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.key import Key, absent, disabled, ignored, refused, same

__all__ = ["ROWS"]

ROWS: Sequence[Key] = (
    # checkpoints
    same("checkpoint", "saving and loading"),
    same("checkpoint.tag_validation", "ranks that name different tags: WARN, IGNORE or FAIL"),
    refused(
        "checkpoint.load_universal",
        "checkpoints load on any number of ranks as they are; leave it out",
    ),
    refused(
        "checkpoint.use_node_local_storage", "a checkpoint is one directory that all ranks see"
    ),
    ignored("checkpoint.parallel_write", "every rank writes its own file at the same time"),
    ignored("checkpoint.writer", "files are written by one protocol, with hashes and fsync"),
    refused("nebula", "the Nebula checkpoint service is not supported", disabled),
    refused(
        "datastates_ckpt",
        "the DataStates checkpoint engine is not supported, and an empty section asks for it; "
        "leave it out",
        absent,
    ),
    # zerort's own
    same("zerort", "what DeepSpeed has no key for"),
    same(
        "zerort.window",
        'launched and unretired buckets, a number or "all"; the back end\'s choice when left out',
    ),
    same("zerort.bucket_bytes", "upper bound of a bucket in bytes, instead of reduce_bucket_size"),
    same(
        "zerort.tune",
        "true: bucket_bytes and window are chosen before the first update, by what is measured",
    ),
    same(
        "zerort.wire",
        '"fp32", "bf16", "fp16" or "int8"; follows communication_data_type when left out',
    ),
    same(
        "zerort.wire_error_feedback",
        'whether what "int8" rounds off is added to the next gradient: "auto" (at stages 0 and 1), '
        'true, false, or "checkpoint", which saves it too',
    ),
    same(
        "zerort.hierarchy",
        '"auto", "flat" or {"inner": L}: whether hosts sum gradients inside before they send them',
    ),
    same("zerort.reduce_at", '"micro_batch" or "boundary": when gradients are reduced'),
    same(
        "zerort.publish",
        'stages 1 and 2: "overlapped": updated parameters arrive beside the next forward, whose '
        'modules wait for their own; "step": step waits for all; "auto", also when left out: what '
        "a few steps show to be faster",
    ),
    same(
        "zerort.transport",
        'on CPU: "auto", also when left out: gradients and parameters go through memory that '
        'ranks share where all of a group can, else over gloo; "shared": through it, or there is '
        'an error; "gloo": over sockets',
    ),
    same(
        "zerort.reshard_after_forward",
        "stage 3: true for the smallest room, false for room for the whole model",
    ),
    same(
        "zerort.whole_padding",
        "how much longer a bucket may become so that shards hold whole parameters; 0.1 when left "
        "out; where it is not enough, parts are exchanged",
    ),
    same(
        "zerort.load_from",
        "stage 3: a .safetensors file, its index or their folder, for tensors on the meta device",
    ),
    same("zerort.on_nonfinite", '"skip" or "raise": a step with an infinity or NaN'),
    same("zerort.unused_parameters", '"zero" or "raise": a parameter without a gradient'),
    same("zerort.sparse_gradients", '"refuse" or "densify"'),
    same(
        "zerort.timeout",
        "seconds a rank waits for its peers in a step (while they start, at least 300); 300 when "
        "left out",
    ),
    same(
        "zerort.peak_flops",
        "flops that a device does a second at most, for the MFU; looked up else",
    ),
    same("zerort.trace", "where runtime events go"),
    same("zerort.trace.enabled", "false: no events even with a path"),
    same("zerort.trace.path", "Chrome trace file, one per rank"),
    same("zerort.trace.capacity", "events kept; older ones are overwritten"),
    same("zerort.mlflow", "rank 0 writes to a run of MLflow, one that is open or a new one"),
    same("zerort.mlflow.enabled", "turns it on; needs the package mlflow-skinny or mlflow"),
    same(
        "zerort.mlflow.tracking_uri",
        "the store; MLFLOW_TRACKING_URI when left out, the folder mlruns without it",
    ),
    same("zerort.mlflow.experiment", "experiment of the run"),
    same("zerort.mlflow.run_name", "name of the run"),
    same("zerort.loader", "how the loader made from training_data fetches samples"),
    same("zerort.loader.workers", "processes of each rank that fetch samples; none when left out"),
    same("zerort.loader.persistent_workers", "they stay from one epoch to the next"),
    same(
        "zerort.loader.pin_memory",
        "false: batches do not go through page-locked memory on their way to an accelerator",
    ),
    same("zerort.checkpoint", "defaults of save_checkpoint"),
    same("zerort.checkpoint.overwrite", "an existing tag is replaced"),
    same("zerort.checkpoint.keep_last", "number of tags kept; all when left out"),
    same(
        "zerort.checkpoint.asynchronous",
        "true: save_checkpoint copies the state, which is written beside training",
    ),
    same(
        "zerort.checkpoint.timeout",
        "seconds that a rank may write or read nothing while the others wait",
    ),
)
