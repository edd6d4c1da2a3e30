"""What stands behind DeepSpeed's names: each answers as its callers expect, with nothing installed
into this process.
"""

from __future__ import annotations

import importlib
import logging
import pickle

import pytest
import torch
from torch import nn

import zerort
from zerort.compat.deepspeed import accelerator, adam, comm, experts, names, pieces, settings
from zerort.compat.deepspeed import logging as said
from zerort.compat.deepspeed.placeholder import placeholder
from zerort.errors import NotBuiltError

ASKED = """
accelerator get_accelerator
checkpoint.utils clone_tensors_for_torch_save
checkpointing checkpoint configure is_configured
comm init_distributed is_initialized get_rank get_world_size get_local_rank barrier log_summary
launcher.runner DEEPSPEED_ENVIRONMENT_NAME
moe.utils is_moe_param has_moe_layers split_params_into_different_moe_groups_for_optimizer
git_version_info version torch_info compatible_ops
ops __compatible_ops__
ops.op_builder FusedAdamBuilder CPUAdamBuilder FusedLambBuilder AsyncIOBuilder UtilsBuilder
ops.adagrad DeepSpeedCPUAdagrad
ops.adam FusedAdam DeepSpeedCPUAdam
ops.lion FusedLion DeepSpeedCPULion
profiling.flops_profiler FlopsProfiler get_model_profile
runtime.activation_checkpointing.checkpointing checkpoint configure
runtime.base_optimizer DeepSpeedOptimizer ZeROOptimizer
runtime.config DeepSpeedConfig DeepSpeedConfigError ADAM_OPTIMIZER LAMB_OPTIMIZER MUON_OPTIMIZER
runtime.config get_gradient_clipping get_log_level
runtime.constants GRADIENT_CLIPPING_DEFAULT LOG_LEVEL_DEFAULT
runtime.precision_config DeepSpeedFP16Config DeepSpeedBF16Config get_bfloat16_config
runtime.dataloader RepeatingLoader DeepSpeedDataLoader
runtime.engine DeepSpeedEngine
runtime.lr_schedules VALID_LR_SCHEDULES WarmupLR WarmupDecayLR WarmupCosineLR OneCycle LRRangeTest
runtime.utils see_memory_usage
runtime.zero Init GatheredParameters
runtime.zero.config ZeroStageEnum
runtime.zero.offload_config OffloadDeviceEnum
runtime.zero.partition_parameters ZeroParamStatus Init GatheredParameters _orig_torch_arange
zero.partition_parameters ZeroParamStatus Init GatheredParameters
runtime.zero.stage3 DeepSpeedZeroOptimizer_Stage3 estimate_zero3_model_states_mem_needs_all_live
runtime.zero.stage_1_and_2 DeepSpeedZeroOptimizer estimate_zero2_model_states_mem_needs_all_cold
utils logger log_dist safe_get_full_fp32_param safe_set_full_fp32_param safe_get_full_grad
utils safe_get_full_optimizer_state safe_get_local_grad set_z3_leaf_modules RepeatingLoader
utils.groups _get_data_parallel_group _get_data_parallel_world_size
utils.logging logger
utils.z3_leaf_module set_z3_leaf_modules
utils.zero_to_fp32 get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint
zero Init GatheredParameters register_external_parameter
"""
"""Imported by Accelerate, transformers, PEFT, TRL and Lightning, or in many public loops."""


@pytest.mark.parametrize("line", ASKED.strip().splitlines(), ids=lambda line: line.split()[0])
def test_what_integrations_import_is_answered_for(line: str) -> None:
    module, *asked = line.split()
    missing = [name for name in asked if name not in names.MODULES[f"deepspeed.{module}"]]
    assert missing == []


def test_single_keys_and_sections_are_read_as_a_files_are() -> None:
    assert settings.get_gradient_clipping({}) == settings.DEFAULTS["GRADIENT_CLIPPING_DEFAULT"] == 1
    assert settings.get_gradient_clipping({"gradient_clipping": 0.0}) == 0
    assert settings.get_log_level({}) is None
    assert settings.get_log_level({"log_level": "ERROR"}) == "ERROR"
    assert settings.get_bfloat16_config({"bfloat16": {"enabled": True}}).enabled
    assert not settings.get_bfloat16_config({}).enabled
    assert settings.get_float16_config({"fp16": {"loss_scale": "3"}}).loss_scale == 3
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        settings.PRECISIONS["DeepSpeedFP16Config"](loss_scale=-1)


def test_stages_have_names() -> None:
    assert [pieces.ZeroStageEnum(stage).name for stage in range(4)] == [
        "disabled",
        "optimizer_states",
        "gradients",
        "weights",
    ]
    assert pieces.ZeroStageEnum.max_stage == 3


def test_the_top_has_what_loops_call() -> None:
    top = names.MODULES["deepspeed"]
    for name in ("initialize", "init_distributed", "add_config_arguments", "DeepSpeedEngine"):
        assert name in top
    assert top["__version__"].split("+")[0].split(".") == [
        str(top[f"__version_{part}__"]) for part in ("major", "minor", "patch")
    ]


def test_no_name_of_the_table_is_itself_a_placeholder() -> None:
    kind = type(placeholder("deepspeed.x"))
    found = [
        (module, name)
        for module, content in names.MODULES.items()
        for name, value in content.items()
        if isinstance(value, kind)
    ]
    assert found == []


def test_nothing_else_in_the_package_imports_this_room() -> None:
    for name in ("zerort.engine", "zerort.initialize", "zerort.zero", "zerort.utils"):
        module = importlib.import_module(name)
        assert "compat" not in vars(module)


# ---- optimizers


def test_fused_adam_is_torchs_and_decouples_the_decay_unless_told() -> None:
    model = nn.Linear(3, 3)
    chosen = adam.FusedAdam(model.parameters(), lr=0.1, weight_decay=0.2)
    assert type(chosen) is torch.optim.AdamW
    assert isinstance(chosen, adam.FusedAdam)
    assert not isinstance(chosen, adam.FusedLion)
    (group,) = chosen.param_groups
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.1, 0.2, True)
    assert type(adam.FusedAdam(model.parameters(), adam_w_mode=False)) is torch.optim.Adam
    assert adam.FusedAdam(model.parameters()).param_groups[0]["weight_decay"] == 0


def test_the_cpu_adam_takes_the_groups_of_another_optimizer() -> None:
    model = nn.Linear(3, 3)
    before = torch.optim.AdamW(
        [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}], foreach=True
    )
    made = adam.DeepSpeedCPUAdam(before.param_groups, lr=0.1, adamw_mode=False)
    assert type(made) is torch.optim.Adam
    assert [group["lr"] for group in made.param_groups] == [0.5, 0.001]
    assert [group["fused"] for group in made.param_groups] == [True, True]
    assert [group["foreach"] for group in made.param_groups] == [None, None]
    assert not any(group["decoupled_weight_decay"] for group in made.param_groups)
    assert before.param_groups[0]["foreach"]  # theirs is as it was


def test_the_other_two_are_torchs_adagrad_and_lion() -> None:
    model = nn.Linear(3, 3)
    assert type(adam.DeepSpeedCPUAdagrad(model.parameters())) is torch.optim.Adagrad
    lion = adam.DeepSpeedCPULion(model.parameters(), lr=0.1)
    assert isinstance(lion, adam.FusedLion)
    assert lion.param_groups[0]["betas"] == (0.9, 0.999)


# ---- the accelerator


def test_the_accelerator_of_a_cpu_orders_nothing_and_counts_the_process() -> None:
    device = accelerator.Accelerator("cpu")
    assert device.current_device_name() == device.device_name(0) == "cpu"
    assert device.communication_backend_name() == "gloo"
    assert device.is_synchronized_device()
    assert device.Stream is device.Event is device.current_stream() is None
    with device.stream(None), device.device(0):
        device.synchronize()
        device.empty_cache()
    assert 0 < device.memory_allocated() < device.total_memory()
    assert device.memory_cached() == device.max_memory_reserved() > 0
    assert device.on_accelerator(torch.zeros(1))
    assert device.FloatTensor is torch.FloatTensor
    assert torch.bfloat16 in device.supported_dtypes()
    state = device.get_rng_state()
    drawn = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    with pytest.raises(AttributeError, match="no_such"):
        device.no_such()


def test_the_accelerator_hands_on_what_torchs_module_has(monkeypatch: pytest.MonkeyPatch) -> None:
    device = accelerator.Accelerator("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index=None: 12)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device.memory_cached() == device.memory_reserved() == 12
    assert device.current_device_name() == "cuda:1"
    assert not device.is_synchronized_device()
    assert device.Stream is torch.cuda.Stream


# ---- the rest


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert (comm.get_rank(), comm.get_world_size(), comm.get_world_group()) == (0, 1, None)
    assert comm.barrier() is None
    assert names.MODULES["deepspeed.utils.groups"]["_get_data_parallel_world_size"]() == 1


def test_tensors_for_torch_save_are_copies_in_the_same_containers() -> None:
    flat = torch.arange(10.0)
    given = {"a": flat[:2], "b": [flat[2:4], (flat[4:5], "text")], "c": 3}
    made = pieces.clone_tensors_for_torch_save(given)
    assert made["b"][1][1] == "text"
    assert made["c"] == 3
    assert made["a"].untyped_storage().nbytes() == 8
    assert torch.equal(made["b"][0], flat[2:4])
    assert made["a"].data_ptr() != flat.data_ptr()


def test_versions_of_torch_are_compared_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    assert pieces.required_torch_version("2.9")
    assert pieces.required_torch_version(min_version=2.4, max_version="2.10")
    assert not pieces.required_torch_version(min_version="2.11")
    assert not pieces.required_torch_version(max_version="2.9")


def test_a_model_without_experts_keeps_its_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}]
    assert experts.split_params_into_different_moe_groups_for_optimizer(groups) == groups
    assert experts.has_moe_layers(nn.Linear(1, 1)) == (False, 0)
    expert = nn.Parameter(torch.zeros(1))
    expert.allreduce = False  # type: ignore[attr-defined]
    shared, apart = experts.split_params_into_shared_and_expert_params(
        [expert, groups[0]["params"][0]]
    )
    assert (shared[0] is groups[0]["params"][0], apart[0] is expert) == (True, True)


def test_log_lines_go_to_zerorts_logger_once_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zerort"):
        for _ in range(2):
            said.log_dist("twice", ranks=[0])
            said.log_dist_once("once %s", ranks=[0])
        said.see_memory_usage("now", force=True)
        said.see_memory_usage("never")
    texts = [record.getMessage() for record in caplog.records]
    assert texts[:3] == ["twice", "once %s", "twice"]
    assert len(texts) == 4
    assert "GiB at most" in texts[3]


def test_a_schedule_by_its_name_is_the_engines() -> None:
    content = names.MODULES["deepspeed.runtime.lr_schedules"]
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = content["WarmupLR"](optimizer, 0.0, 0.1, 4, content["WARMUP_LINEAR_RATE"])
    for _ in range(4):
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.075)]  # the first step is number 0
    assert content["WARMUP_MAX_LR"] == "warmup_max_lr"


def test_notebooks_may_ask_a_placeholder_how_it_is_shown() -> None:
    stands = placeholder("deepspeed.runtime.x")
    for name in ("_repr_html_", "_ipython_display_", "__wrapped__"):
        assert not hasattr(stands, name)
    assert repr(stands) == "<deepspeed.runtime.x, which zerort does not have>"


def test_an_error_of_ones_own_kind_may_be_caught_by_a_placeholder_and_is_not() -> None:
    with pytest.raises(KeyError):
        try:
            raise KeyError
        except placeholder("deepspeed.runtime.CheckpointError"):
            pass
    with pytest.raises(NotBuiltError, match=r"^deepspeed\.runtime\.CheckpointError is DeepSpeed's"):
        raise placeholder("deepspeed.runtime.CheckpointError")("x")


def test_configurations_are_read_by_the_old_class() -> None:
    made = pieces.DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": {"stage": 2}})
    assert (made.train_micro_batch_size_per_gpu, made.gradient_accumulation_steps) == (4, 1)
    assert made["train_batch_size"] == 4
    assert (made.train_batch_size, made.zero_optimization.stage) == (4, 2)
    with pytest.raises(zerort.ConfigError, match="train_bach_size"):
        pieces.DeepSpeedConfig({"train_bach_size": 4})


def test_operations_are_known_by_their_builders_names() -> None:
    compatible = names.MODULES["deepspeed.ops"]["__compatible_ops__"]
    builders = names.MODULES["deepspeed.ops.op_builder"]
    assert {builders[f"{kind}Builder"].NAME for kind in ("FusedAdam", "FusedLamb", "AsyncIO")} == {
        "fused_adam",
        "fused_lamb",
        "async_io",
    }
    assert compatible["cpu_adam"]
    assert not compatible["fused_lamb"]
    for builder in builders.values():
        assert builder().is_compatible() is compatible[builder.NAME]
        with pytest.raises(NotBuiltError, match=rf"op_builder\.{builder.__name__}\.load"):
            builder().load()


def test_a_device_of_offloading_is_text_in_a_configuration() -> None:
    device = names.MODULES["deepspeed.runtime.zero.offload_config"]["OffloadDeviceEnum"]
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": device.cpu}},
    }
    assert zerort.config.load(config) == zerort.config.load(
        {
            "train_batch_size": 1,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        }
    )
    assert pickle.loads(pickle.dumps(device.nvme)) == "nvme"


def test_the_names_of_optimizers_are_what_a_configuration_takes() -> None:
    here = names.MODULES["deepspeed.runtime.config"]
    for name in ("ADAM", "ADAMW", "ADAGRAD", "LION"):
        config = {"train_batch_size": 1, "optimizer": {"type": here[f"{name}_OPTIMIZER"]}}
        engine, *_ = zerort.initialize(model=nn.Linear(1, 1), config=config)
        assert engine.optimizer is not None
        engine.destroy()
