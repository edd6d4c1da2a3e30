"""Keys of what is trained: batches, gradients, precision, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.key import Key, ignored, one_of, refused, same

__all__ = ["ROWS"]

ROWS: Sequence[Key] = (
    # batch
    same("train_batch_size", "samples of one optimizer step over all ranks"),
    same("train_micro_batch_size_per_gpu", "samples of one backward on one rank"),
    same("gradient_accumulation_steps", "backwards of one optimizer step"),
    same(
        "managed_gradient_accumulation",
        "false: every step() ends a window, of as many backwards as there were",
    ),
    same(
        "dataloader_drop_last", "the loader made from training_data drops an incomplete last batch"
    ),
    # gradients
    same(
        "gradient_clipping", "largest norm of the averaged gradient; 1.0 when left out, 0 for none"
    ),
    same(
        "prescale_gradients", "gradients are divided before they are summed over ranks, not after"
    ),
    same(
        "gradient_predivide_factor",
        "part of the division that comes before the sum, with prescale_gradients",
    ),
    same("gradient_allreduce_op", 'gradients of the ranks are averaged ("mean") or added ("sum")'),
    same("communication_data_type", "element type on the wire; the compute dtype when left out"),
    refused(
        "sparse_gradients",
        'rows are not sent alone; "zerort": {"sparse_gradients": "densify"} trains the same',
    ),
    refused("seq_parallel_comm_data_type", "sequence parallelism is not built", one_of("fp32")),
    refused("sequence_parallel_size", "sequence parallelism is not built", one_of(1)),
    ignored("disable_allgather", "how updated parameters are gathered is part of the plan"),
    ignored("graph_harvesting", "a step is not captured in a CUDA graph; results are the same"),
    # precision
    same("data_types", "element types beside the parameters'"),
    same(
        "data_types.grad_accum_dtype",
        "what reduced gradients are added up in; fp32, or what masters of less are, when left out",
    ),
    same(
        "data_types.param_dtype", "has to agree with fp16.enabled and bf16.enabled, which decide it"
    ),
    same(
        "data_types.buffer_dtype",
        "floating-point buffers are cast to it; those of the model's own stay when left out",
    ),
    same("fp16", "half precision with a loss scale, at every stage"),
    same(
        "fp16.enabled",
        "parameters are cast to fp16, inputs only by auto_cast; the optimizer keeps fp32 masters",
    ),
    same("fp16.auto_cast", "floating-point inputs are cast to fp16"),
    same("fp16.loss_scale", "a static loss scale; 0 means dynamic"),
    same("fp16.initial_scale_power", "the dynamic scale starts at 2 to this power"),
    same("fp16.loss_scale_window", "clean steps after which the dynamic scale doubles"),
    same(
        "fp16.hysteresis",
        "overflows that are waited out before the scale is halved; at stage 0 too, where DeepSpeed "
        "waits for none",
    ),
    same("fp16.consecutive_hysteresis", "every clean step restores the hysteresis"),
    same(
        "fp16.min_loss_scale",
        "the dynamic scale does not fall below; an overflow there is an error",
    ),
    same(
        "fp16.fp16_master_weights_and_grads",
        "masters and sums are fp16, the optimizer's state is fp32; at every stage",
    ),
    same("bf16", "bfloat16 with fp32 masters; the old spelling bfloat16 is read too"),
    same(
        "bf16.enabled",
        "parameters are cast to bf16, inputs are not; the optimizer keeps fp32 masters",
    ),
    ignored(
        "bf16.check_grad_overflow",
        "a non-finite gradient is never applied; zerort.on_nonfinite says what is done",
    ),
    ignored(
        "bf16.immediate_grad_update", "gradients are accumulated as they are reduced, in any case"
    ),
    same(
        "bf16.bf16_master_weights_and_grads",
        "parameters are their own masters and sums are bf16, at every stage",
    ),
    same(
        "bf16.bf16_optimizer_states",
        "the optimizer's state is bf16 too; false: it is fp32, and so is what a step computes",
    ),
    same(
        "torch_autocast",
        "forward runs under torch.autocast; beside it fp16 or bf16 only of the same dtype",
    ),
    same("torch_autocast.enabled", "turns it on"),
    same("torch_autocast.dtype", "bf16 or fp16; with fp16 the loss is scaled"),
    same(
        "torch_autocast.lower_precision_safe_modules",
        "classes whose gradients are sent in that dtype; Linear and Conv1d to 3d when left out and "
        "communication_data_type is too",
    ),
    same("amp", "mixed precision by Apex's levels, through torch's own means, at every stage"),
    same("amp.enabled", "turns it on"),
    same(
        "amp.opt_level",
        "O0 fp32, O1 autocast in fp16, O2 fp16 with batch norms and outputs in fp32, O4 and O5 "
        "the same in bf16; O3 is refused",
    ),
    same("amp.loss_scale", 'a static loss scale or "dynamic"; the level\'s own when left out'),
    same("amp.min_loss_scale", "the dynamic scale does not fall below; no error there"),
    same("amp.max_loss_scale", "the dynamic scale does not grow beyond; 2^24 when left out"),
    same("amp.keep_batchnorm_fp32", "of O2 and O5: false casts batch norms too"),
    same("amp.cast_model_type", "what opt_level says; any other value is an error"),
    same("amp.patch_torch_functions", "what opt_level says; any other value is an error"),
    same("amp.master_weights", "what opt_level says; any other value is an error"),
    same("amp.cast_model_outputs", "what opt_level says; any other value is an error"),
    refused(
        "amp.num_losses",
        "one loss scale serves all losses: add them up, or give engine.backward one after another",
        one_of(1),
    ),
    ignored("amp.verbosity", "nothing is printed that it would silence"),
    # optimizer and scheduler
    same("optimizer", "the optimizer, unless initialize is given one"),
    same("optimizer.type", "Adam, AdamW, SGD, Adagrad, Lion, Muon or a name of torch.optim"),
    same("optimizer.params", "keyword arguments of its constructor"),
    ignored("optimizer.legacy_fusion", "torch's fused implementation is used where there is one"),
    same("scheduler", "the learning-rate schedule, unless initialize is given one"),
    same(
        "scheduler.type", "LRRangeTest, OneCycle, Warmup*LR or a name of torch.optim.lr_scheduler"
    ),
    same("scheduler.params", "keyword arguments of its constructor"),
    ignored(
        "zero_allow_untested_optimizer",
        "any optimizer that takes one parameter at a time runs at every stage",
    ),
    ignored("zero_force_ds_cpu_optimizer", "optimizers are torch's on every device"),
)
