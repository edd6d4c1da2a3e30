"""Configuration: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import base64
import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from zerort import _core
from zerort.config import Batch, Config, describe, load
from zerort.config.keys import KEYS, SIZES, Fate, as_markdown
from zerort.errors import ConfigError

MIGRATION = Path(__file__).parents[3] / "docs" / "migration.md"

# What a Trainer or Accelerate hands over after it has filled in its "auto" values.
FILLED_IN = {
    "fp16": {
        "enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
        "hysteresis": 2, "min_loss_scale": 1,
    },
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "steps_per_print": 2000,
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "wall_clock_breakdown": False,
}  # fmt: skip


def refusal(config: Any, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config, **arguments)
    return str(caught.value)


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


# Where a configuration comes from


def test_a_dict_a_path_base64_and_args_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILLED_IN))
    encoded = base64.urlsafe_b64encode(json.dumps(FILLED_IN).encode()).decode()
    from_dict = load(FILLED_IN)
    assert load(path) == load(str(path)) == load(encoded) == from_dict
    assert (
        load(args=Namespace(deepspeed_config=str(path)))
        == load(args=Namespace(deepscale_config=str(path), deepspeed_config=None))
        == load(config_params=FILLED_IN)
        == from_dict
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"args": Namespace()}, {"args": Namespace(deepspeed_config=None)}]
)
def test_no_configuration_is_an_error_that_names_the_three_ways(arguments: dict[str, Any]) -> None:
    message = refusal(None, **arguments)
    assert (
        message == "no configuration: give one of config, config_params and args.deepspeed_config"
    )


def test_two_configurations_are_an_error_that_names_both() -> None:
    assert (
        refusal({}, config_params={})
        == "config and config_params are both given; give one configuration"
    )
    old = Namespace(deepspeed_config="x.json", deepscale_config="y.json")
    assert "args.deepspeed_config and args.deepscale_config are both given" in refusal(
        None, args=old
    )
    assert "config and args.deepspeed_config" in refusal(
        {}, args=Namespace(deepspeed_config="x.json")
    )


def test_a_missing_file_is_named() -> None:
    message = refusal("no/such/ds.json")
    assert message == (
        'configuration file "no/such/ds.json" cannot be read: No such file or directory (looked '
        f"for in {Path.cwd()})"
    )


def test_text_that_is_no_json_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {"enabled": tru}}')
    assert refusal(path).startswith(f"{path}: not JSON: ")
    assert "line 1, column" in refusal(path)
    path.write_text("[1]")
    assert refusal(path) == f"{path}: expected an object, got [1]"


def test_every_key_given_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"train_batch_size": 1, "fp16": {"enabled": true, "enabled": false}, "train_batch_size": '
        "2}"
    )
    message = refusal(path)
    assert "\n  fp16.enabled: given twice" in message
    assert "\n  train_batch_size: given twice" in message


# Keys


def test_a_filled_in_integration_config_is_taken_whole() -> None:
    config = load(FILLED_IN)
    assert config.compute_dtype == "bf16"
    assert config.cap_elements == 200_000_000
    assert config.cap_bytes is None
    assert config.resolve_batch(2) == Batch(train=64, micro=8, accumulation=4)
    assert config.optimizer is not None
    assert config.optimizer.params["betas"] == [0.9, 0.999]
    assert set(config.ignored) == {
        "zero_optimization.allgather_partitions",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_scatter",
        "zero_optimization.contiguous_gradients",
    }


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("train_batch_sze", "train_batch_size"),
        ("grad_clipping", "gradient_clipping"),
        ("zero_optimization.stge", "stage"),
        ("stage", "zero_optimization.stage"),
        ("zero_optimization.offload_optimzer", "offload_optimizer"),
        ("sparse_gradient", None),
        ("fp16.initial_scale_powr", "initial_scale_power"),
        ("zerort.trace.pth", "path"),
        ("checkpoint.tag_validtion", "tag_validation"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(
    path: str, nearest: str | None
) -> None:
    # the nearest name is never one that is itself refused
    guess = f'; did you mean "{nearest}"?' if nearest else ""
    assert refusal(nested(path, 1)) == f"configuration: {path}: unknown key{guess}"


def test_an_unknown_key_like_no_other_is_refused_without_a_guess() -> None:
    assert refusal({"xyzzy": 1}) == "configuration: xyzzy: unknown key"


@pytest.mark.parametrize(
    "key", [key for key in KEYS.values() if key.fate is Fate.IGNORED], ids=lambda key: key.path
)
def test_an_ignored_key_is_accepted_and_listed(key: Any) -> None:
    config = nested(key.path, {"x": 1})
    if "optimizer" in config:
        config["optimizer"]["type"] = "AdamW"
    assert load(config).ignored == (key.path,)


@pytest.mark.parametrize(
    "key", [key for key in KEYS.values() if key.fate is Fate.REFUSED], ids=lambda key: key.path
)
def test_a_refused_key_gives_its_reason_unless_its_value_asks_for_nothing(key: Any) -> None:
    assert load(nested(key.path, None)).ignored == ()
    assert f"configuration: {key.path}: refused: {key.effect}" in refusal(
        nested(key.path, "something")
    )


@pytest.mark.parametrize(
    ("path", "harmless", "asking"),
    [
        ("elasticity", {"enabled": False, "version": "auto"}, {"enabled": True}),
        ("amp.num_losses", 1, 2),
        ("zero_optimization.offload_optimizer.super_offload", False, True),
        ("zero_optimization.load_from_fp32_weights", True, False),
        ("zero_optimization.zero_quantized_weights", False, True),
        ("compile", {"deepcompile": False}, {"deepcompile": True}),
        ("tensor_parallel", {"autotp_size": 1}, {"autotp_size": 4}),
        ("sparse_gradients", False, True),
    ],
)
def test_a_refused_key_may_stand_at_the_value_that_turns_it_off(
    path: str, harmless: Any, asking: Any
) -> None:
    assert load(nested(path, harmless)).ignored == ()
    assert "refused" in refusal(nested(path, asking))


@pytest.mark.parametrize(("stage", "size"), [(0, 8), (2, 8), (2, 1), (3, 8), (3, 0)])
def test_what_a_host_keeps_is_of_stage_3(stage: int, size: int) -> None:
    path = "zero_optimization.zero_hpz_partition_size"
    zero = {"stage": stage, "zero_hpz_partition_size": size}
    settings = load({"zero_optimization": zero})
    assert settings.ignored == ((path,) if stage < 3 and size > 1 else ())
    assert settings.zero_optimization.secondary_size == (size if (stage, size) == (3, 8) else None)
    assert path in refusal(nested(path, -1))


@pytest.mark.parametrize(
    "path", ["zero_optimization.zenflow", "sparse_attention", "datastates_ckpt"]
)
def test_an_empty_section_is_refused_where_it_turns_a_feature_on(path: str) -> None:
    assert load(nested(path, None)).ignored == load(nested(path, False)).ignored == ()
    message = refusal(nested(path, {}))
    assert f"configuration: {path}: refused: " in message
    assert "an empty section asks for" in message
    assert describe(nested(path, {}))[0][2].startswith("error: refused: ")


def test_auto_is_refused_wherever_it_is_left_and_says_who_fills_it_in() -> None:
    message = refusal(
        {
            "train_batch_size": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "zero_optimization": {"overlap_comm": "auto"},
        }
    )
    lines = message.splitlines()
    assert lines[0] == "configuration has 3 errors:"
    paths = [line.split(":")[0].strip() for line in lines[1:]]
    assert paths == ["train_batch_size", "optimizer.params.lr", "zero_optimization.overlap_comm"]
    assert all("Trainer" in line and "Accelerate" in line for line in lines[1:])


@pytest.mark.parametrize("path", sorted(SIZES))
def test_a_size_left_at_auto_is_as_if_it_were_left_out(path: str) -> None:
    config = load(nested(path, "auto"))
    assert (config.cap_bytes, config.cap_elements) == (None, None)
    assert config.ignored == (() if KEYS[path].fate is Fate.SAME else (path,))
    assert describe(nested(path, "auto")) == [(path, '"auto"', "auto: as if it were left out")]


# A file of a tutorial, in which the Trainer fills in what is "auto".
TUTORIAL = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": float("inf"),
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_a_file_full_of_auto_is_explained_and_its_mistakes_are_found() -> None:
    rows = {path: (value, effect) for path, value, effect in describe(TUTORIAL)}
    filled = {path for path, (_, effect) in rows.items() if effect.startswith("auto: an integr")}
    assert filled == {
        "fp16.enabled",
        "bf16.enabled",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "scheduler.params.warmup_num_steps",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    }
    assert all(rows[path][0] == '"auto"' for path in filled)
    assert not any(effect.startswith("error") for _, effect in rows.values())
    wrong = {**TUTORIAL, "gradient_cliping": "auto", "fp16": {"enabled": "auto", "hysteresis": 0}}
    errors = {path for path, _, effect in describe(wrong) if effect.startswith("error")}
    assert errors == {"gradient_cliping", "fp16.hysteresis"}


def test_what_is_left_at_auto_is_named_and_sizes_are_not() -> None:
    message = refusal(TUTORIAL)
    for path, _, effect in describe(TUTORIAL):
        assert (f"  {path}: is " in message) == effect.startswith("auto: an integration")


# Values


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train_batch_size", 0, "expected a number of at least 1, got 0"),
        ("train_batch_size", "8", 'expected an integer, got "8"'),
        ("train_batch_size", True, "expected an integer, got true"),
        ("steps_per_print", 2.5, "expected an integer, got 2.5"),
        ("gradient_clipping", -1, "expected a number of at least 0, got -1"),
        ("gradient_clipping", float("nan"), "expected a finite number, got NaN"),
        ("gradient_clipping", None, "expected a number, got null"),
        ("gradient_predivide_factor", 0, "expected a number of at least 1e-30, got 0"),
        ("gradient_allreduce_op", "max", "expected 'mean' or 'sum', got \"max\""),
        ("communication_data_type", "bfp16", "expected 'fp32', 'fp16' or 'bf16', got \"bfp16\""),
        ("data_types.grad_accum_dtype", "int8", "expected 'fp32', 'fp16' or 'bf16', got \"int8\""),
        ("prescale_gradients", "true", 'expected true or false, got "true"'),
        ("fp16", True, "expected an object, got true"),
        ("fp16.enabled", 1, "expected true or false, got 1"),
        ("fp16.loss_scale", -1, "expected a number of at least 0, got -1"),
        ("fp16.hysteresis", 0, "expected a number of at least 1, got 0"),
        ("zero_optimization", False, "expected an object, got false"),
        ("zero_optimization.stage", 4, "expected a number of at most 3, got 4"),
        ("zero_optimization.stage", -1, "expected a number of at least 0, got -1"),
        ("checkpoint.tag_validation", "loud", "expected 'WARN', 'IGNORE' or 'FAIL', got \"loud\""),
        ("torch_autocast.dtype", "float32", "expected 'fp16' or 'bf16', got \"float32\""),
        ("scheduler", {"params": {}}, "required, but left out"),
        ("zerort.window", "some", "expected an integer or 'all', got \"some\""),
        ("zerort.timeout", 0, "expected a number of at least 1, got 0"),
        ("zerort.on_nonfinite", "warn", "expected 'skip' or 'raise', got \"warn\""),
    ],
)
def test_a_wrong_value_is_told_by_path_what_was_expected_and_what_was_found(
    path: str, value: Any, said: str
) -> None:
    message = refusal(nested(path, value))
    assert message.startswith(f"configuration: {path}")
    assert message.endswith(f": {said}")


def test_clipping_among_optimizer_parameters_is_sent_to_its_own_key() -> None:
    message = refusal({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}})
    assert "optimizer.params: max_grad_norm" in message
    assert "gradient_clipping" in message


@pytest.mark.parametrize("other", ["bf16", "bfloat16", "torch_autocast", "amp"])
def test_two_precisions_at_once_are_refused(other: str) -> None:
    message = refusal({"fp16": {"enabled": True}, other: {"enabled": True}})
    assert message.startswith("configuration: fp16 and ")
    assert message.endswith("cannot be enabled together; choose one")


def test_two_bucket_sizes_are_refused() -> None:
    message = refusal(
        {"zero_optimization": {"reduce_bucket_size": 5}, "zerort": {"bucket_bytes": 5}}
    )
    assert "zerort.bucket_bytes and zero_optimization.reduce_bucket_size" in message


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"stage": 2, "fp16": {"enabled": "yes"}, "amp": {"enabled": 1}, "train_batch_size": -4}'
    )
    lines = refusal(path).splitlines()
    assert lines[0] == f"{path} has 4 errors:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "stage",
        "fp16.enabled",
        "amp.enabled",
        "train_batch_size",
    }


# What the keys mean together


def test_the_defaults_are_the_contracts() -> None:
    config = load({})
    assert (config.gradient_clipping, config.gradient_clipping_defaulted) == (1.0, True)
    assert not load({"gradient_clipping": 1.0}).gradient_clipping_defaulted
    assert (config.cap_bytes, config.cap_elements) == (None, None)
    assert (config.fp16.dynamic, config.fp16.initial_scale, config.fp16.hysteresis) == (
        True,
        65536.0,
        2,
    )
    assert (config.compute_dtype, config.communication_data_type, config.steps_per_print) == (
        "fp32",
        None,
        None,
    )
    assert (config.zerort.timeout, config.zerort.trace.active, config.unused_parameters) == (
        300.0,
        False,
        "zero",
    )


@pytest.mark.parametrize(("stage", "every"), [(0, False), (1, False), (2, True)])
def test_gradients_travel_by_stage_unless_told_otherwise(stage: int, every: bool) -> None:
    plan = _core.Plan([(4, "f32", 0, 0)], world=2, stage=stage, cap_bytes=64)
    assert plan.reduces_every_micro_batch is every
    assert load({}).reduces_every_micro_batch(every) is every
    assert load({"zerort": {"reduce_at": "micro_batch"}}).reduces_every_micro_batch(every)
    assert not load({"zerort": {"reduce_at": "boundary"}}).reduces_every_micro_batch(every)


def test_spellings_of_deepspeed_are_read() -> None:
    config = load(
        {
            "bfloat16": {"enabled": True},
            "communication_data_type": "FP16",
            "gradient_allreduce_op": "SUM",
            "data_types": {"grad_accum_dtype": "torch.float32"},
            "checkpoint": {"tag_validation": "Fail"},
            "zero_optimization": {"ignore_unused_parameters": False, "reduce_bucket_size": 5e8},
        }
    )
    assert (config.compute_dtype, config.communication_data_type) == ("bf16", "fp16")
    assert (config.gradient_allreduce_op, config.data_types.grad_accum_dtype) == ("sum", "fp32")
    assert (config.checkpoint.tag_validation, config.unused_parameters) == ("FAIL", "raise")
    assert config.cap_elements == 500_000_000


def test_a_static_loss_scale_is_not_dynamic() -> None:
    fp16 = load({"fp16": {"enabled": True, "loss_scale": 128}}).fp16
    assert (fp16.dynamic, fp16.initial_scale) == (False, 128.0)


def test_a_configuration_cannot_be_changed() -> None:
    config = load({})
    with pytest.raises(ValidationError, match="frozen"):
        config.zero_optimization.stage = 1
    assert config.zero_optimization.stage == 0


# The batch triad


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "world", "batch"),
    [
        (32, 4, 2, 4, Batch(32, 4, 2)),
        (32, 4, None, 4, Batch(32, 4, 2)),
        (32, None, 2, 4, Batch(32, 4, 2)),
        (None, 4, 2, 4, Batch(32, 4, 2)),
        (32, None, None, 4, Batch(32, 8, 1)),
        (None, 4, None, 4, Batch(16, 4, 1)),
    ],
)
def test_two_sizes_of_the_triad_give_the_third(
    train: int | None, micro: int | None, accumulation: int | None, world: int, batch: Batch
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = {
        key: size
        for key, size in zip(keys, (train, micro, accumulation), strict=True)
        if size is not None
    }
    assert load(given).resolve_batch(world) == batch


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "world", "message"),
    [
        (
            None,
            None,
            2,
            1,
            "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided",
        ),
        (
            None,
            None,
            None,
            1,
            "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided",
        ),
        (
            None,
            2**20,
            2**20,
            2,
            "train_batch_size: 2199023255552 samples of one step are more than 2147483647; lower "
            "train_micro_batch_size_per_gpu or gradient_accumulation_steps",
        ),
        (2, None, None, 4, "Micro batch size per gpu: 0 has to be greater than 0"),
        (4, 4, None, 2, "Gradient accumulation steps: 0 has to be greater than 0"),
        (8, None, 0, 2, "Gradient accumulation steps: 0 has to be greater than 0"),
        (
            33,
            4,
            2,
            4,
            "Check batch related parameters. train_batch_size is not equal to "
            "micro_batch_per_gpu * gradient_acc_step * world_size 33 != 4 * 2 * 4",
        ),
        (
            7,
            None,
            None,
            2,
            "Check batch related parameters. train_batch_size is not equal to "
            "micro_batch_per_gpu * gradient_acc_step * world_size 7 != 3 * 1 * 2",
        ),
    ],
)
def test_a_triad_that_does_not_multiply_up_is_refused_in_deepspeeds_words(
    train: int | None, micro: int | None, accumulation: int | None, world: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Batch.resolve(train, micro, accumulation, world)
    assert str(caught.value) == message


# The table


def _fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    paths = set()
    for name, field in model.model_fields.items():
        paths.add(f"{prefix}{name}")
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                paths |= _fields(kind, f"{prefix}{name}.")
    return paths


def test_the_table_and_the_models_have_the_same_keys() -> None:
    assert {key.path for key in KEYS.values() if key.fate is Fate.SAME} == _fields(Config)


def test_no_key_stands_in_the_table_twice_and_every_section_is_a_key() -> None:
    lines = as_markdown().splitlines()
    assert len(lines) == len(KEYS) + 2
    assert all(section in KEYS for path in KEYS if (section := path.rpartition(".")[0]))


def test_the_migration_page_holds_the_table() -> None:
    begin, end = "<!-- config keys -->\n", "<!-- end of config keys -->"
    page = MIGRATION.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()
    assert page == as_markdown().strip(), (
        "paste the output of zerort.config.keys.as_markdown() into docs/migration.md"
    )


# describe


def test_describe_tells_of_every_key_of_a_file_what_it_will_do(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage": 2, "overlap_comm": true, "offload_param": {"device": '
        '"none"}}}'
    )
    assert describe(path) == [
        ("zero_optimization.stage", "2", KEYS["zero_optimization.stage"].effect),
        (
            "zero_optimization.overlap_comm",
            "true",
            "ignored: communication always overlaps the backward",
        ),
        (
            "zero_optimization.offload_param.device",
            '"none"',
            "cpu: on the host, copied before they are gathered",
        ),
    ]


def test_describe_shows_mistakes_in_their_rows() -> None:
    rows = describe(
        {
            "train_batch_sze": 8,
            "fp16": {"enabled": "yes"},
            "optimizer": {},
            "elasticity": {"enabled": True},
        }
    )
    assert rows == [
        ("train_batch_sze", "8", 'error: unknown key; did you mean "train_batch_size"?'),
        ("fp16.enabled", '"yes"', 'error: expected true or false, got "yes"'),
        (
            "elasticity",
            '{"enabled": true}',
            'error: refused: batch sizes are not chosen for the job; give them (got {"enabled": '
            "true})",
        ),
        ("optimizer.type", "", "error: required, but left out"),
    ]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_type_of_parameters_that_is_not_theirs_is_an_error(dtype: str) -> None:
    config = {"train_batch_size": 1, "data_types": {"param_dtype": dtype}}
    assert f"data_types.param_dtype is {dtype}, and parameters are fp32" in refusal(config)
    load({**config, dtype: {"enabled": True}})


# As a mapping


def test_by_keys_a_configuration_is_what_was_given_and_by_attributes_what_holds() -> None:
    given = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8},
        "bfloat16": {"enabled": True},
        "steps_per_print": float("inf"),
    }
    config = load(given)
    assert dict(config) == given and json.loads(json.dumps(dict(config))) == given
    assert config["zero_optimization"]["stage"] == config.zero_optimization.stage == 2
    assert config.get("zero_optimization", {}).get("stage") == 2
    assert "bfloat16" in config and "bf16" not in config and config.bf16.enabled
    assert config.get("fp16") is None and config.get("fp16", {}) == {}
    assert len(config) == len(given) and list(config) == list(given)
    with pytest.raises(KeyError):
        config["fp16"]


def test_a_configuration_given_again_is_the_same() -> None:
    config = load({"train_batch_size": 8, "zero_optimization": {"stage": 1}})
    assert load(config) == config and dict(load(config)) == dict(config)
    assert copy.deepcopy(config) == config and dict(copy.deepcopy(config)) == dict(config)


def test_a_file_and_base64_are_mappings_too(tmp_path: Path) -> None:
    given = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    encoded = base64.urlsafe_b64encode(json.dumps(given).encode()).decode()
    for config in (str(path), encoded):
        assert json.loads(json.dumps(dict(load(config)))) == given


def test_what_becomes_of_the_callers_dict_afterwards_is_not_what_was_given() -> None:
    given: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    config = load(given)
    given["zero_optimization"]["stage"] = 3
    given["fp16"] = {"enabled": True}
    assert config["zero_optimization"] == {"stage": 2} and "fp16" not in config


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device is cpu"),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "offload_optimizer.ratio is 0.5 at stage 2",
        ),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "refused: offloading to NVMe"),
        (
            {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}},
            "cpu_offload is an old spelling of offload_optimizer, which is given too",
        ),
        ({"stage": 2, "offload_optimizer": {"device": "disk"}}, "'cpu' or 'none'"),
    ],
)
def test_offloading_that_cannot_be_is_refused_by_name(zero: Any, message: str) -> None:
    assert message in refusal({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("zero", "optimizer", "param"),
    [
        ({"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True}, True, False),
        ({"stage": 3, "cpu_offload_params": True, "cpu_offload": False}, False, True),
        ({"stage": 0, "offload_optimizer": None, "offload_param": {}}, False, False),
        ({"stage": 3, "offload_optimizer": {"device": None}}, False, False),
        (
            {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "buffer_count": 4, "fast_init": False},
                "offload_param": {"device": "cpu", "buffer_size": 1e8, "max_in_cpu": 1e9},
            },
            True,
            True,
        ),
    ],
)
def test_spellings_of_offloading(zero: Any, optimizer: bool, param: bool) -> None:
    state, shards = load({"zero_optimization": zero}).offloads
    assert (state.on_host, shards.on_host) == (optimizer, param)
    assert state.pin_memory == bool(zero.get("cpu_offload_use_pin_memory"))


@pytest.mark.parametrize(
    ("zero", "idle"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, ["offload_param"]),
        ({"stage": 1, "cpu_offload_param": True}, ["cpu_offload_param"]),
        ({"stage": 0, "cpu_offload_params": True}, ["cpu_offload_params"]),
        ({"stage": 2, "offload_param": {"device": "none"}}, []),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, []),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, []),
    ],
)
def test_offloading_whole_parameters_is_nothing_and_listed_so(zero: Any, idle: list[str]) -> None:
    config = load({"zero_optimization": zero})
    assert config.ignored == tuple(f"zero_optimization.{name}" for name in idle)
    assert config.offloads[1].on_host == (zero["stage"] == 3)
