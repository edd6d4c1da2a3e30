"""What the calls promise: tags, `latest`, overwriting, pruning, client state, parts of a load,
errors on all ranks.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ranks
import zerort
from saved import Net, adamw, config_of, contents, engine_of, manifest_of, train, weights
from zerort.errors import CheckpointError


@pytest.fixture
def engine() -> Any:
    engine = engine_of(config_of(2))
    train(engine, 0, 1, range(2))
    yield engine
    engine.destroy()


def fresh(**more: Any) -> Any:
    return engine_of(config_of(2, **more))


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def named(folder: Path) -> str:
    return (folder / "latest").read_text().splitlines()[0]


# Tags.


def test_the_default_tag_counts_steps_and_latest_names_it(engine: Any, tmp_path: Path) -> None:
    assert engine.save_checkpoint(tmp_path / "a" / "b") is True
    assert names(tmp_path / "a" / "b") == {"global_step2", "latest", "zero_to_fp32.py"}
    assert named(tmp_path / "a" / "b") == "global_step2"
    path, client_state = fresh().load_checkpoint(str(tmp_path / "a" / "b"))
    assert (path, client_state) == (str(tmp_path / "a" / "b" / "global_step2"), {})


def test_save_latest_false_leaves_latest_alone(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path, "one")
    engine.save_checkpoint(tmp_path, "two", save_latest=False)
    assert named(tmp_path) == "one"


@pytest.mark.parametrize(
    "tag",
    [
        *("", ".", "..", "../up", "a/b", ".hidden", "-x", "a b", "ü", "x" * 129, 7),
        *("latest", "LATEST", "manifest.json", "Manifest.JSON", "zero_to_fp32.py"),
        "rank_0.safetensors",
    ],
)
def test_a_tag_that_could_be_something_else_is_refused(
    tag: Any, engine: Any, tmp_path: Path
) -> None:
    for call in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(CheckpointError, match="tag"):
            call(tmp_path, tag)
    assert list(tmp_path.iterdir()) == []


def test_without_latest_nothing_is_loaded_and_a_warning_says_so(
    engine: Any, tmp_path: Path, caplog: Any
) -> None:
    before = weights(engine)
    for folder in (tmp_path, tmp_path / "missing"):
        with caplog.at_level(logging.WARNING, "zerort"):
            assert engine.load_checkpoint(folder) == (None, {})
        assert "nothing was loaded" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def test_a_tag_that_exists_is_refused_and_exchanged_with_overwrite(
    engine: Any, tmp_path: Path
) -> None:
    engine.save_checkpoint(tmp_path, "best")
    old = manifest_of(tmp_path / "best")
    train(engine, 0, 1, range(2, 3))
    with pytest.raises(CheckpointError, match=r"overwrite=True.*zerort\.checkpoint\.overwrite"):
        engine.save_checkpoint(tmp_path, "best")
    assert manifest_of(tmp_path / "best") == old
    engine.save_checkpoint(tmp_path, "best", overwrite=True)
    assert manifest_of(tmp_path / "best")["counters"]["global_steps"] == 3
    assert names(tmp_path) == {"best", "latest", "zero_to_fp32.py"}
    by_config = fresh(zerort={"checkpoint": {"overwrite": True}})
    by_config.save_checkpoint(tmp_path, "best")
    assert manifest_of(tmp_path / "best")["counters"]["global_steps"] == 0


def test_a_folder_that_is_a_file_is_an_error_that_names_it(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        engine.save_checkpoint(tmp_path / "file", "a")


# On all ranks.


def save_with_tags_apart(rank: int, world: int, folder: str, validation: str) -> str:
    engine = fresh(checkpoint={"tag_validation": validation})
    try:
        engine.save_checkpoint(folder, f"t{rank}")
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_ranks_that_name_different_tags_take_rank_0s_or_fail(tmp_path: Path) -> None:
    told = ranks.run(2, save_with_tags_apart, str(tmp_path), "FAIL")
    assert told[0] == told[1] and "0: t0, 1: t1" in told[0]
    assert ranks.run(2, save_with_tags_apart, str(tmp_path), "WARN") == ["saved"] * 2
    assert names(tmp_path) == {"t0", "latest", "zero_to_fp32.py"}


def fail_everywhere(rank: int, world: int, folder: str) -> list[str]:
    engine, told = fresh(), []
    engine.save_checkpoint(folder, "good")
    strange = {"x": object()} if rank == 0 else {}
    calls = [
        lambda: engine.save_checkpoint(folder, "bad", client_state=strange),
        lambda: engine.save_checkpoint(folder, "../bad"),
        lambda: engine.save_checkpoint(folder, "good"),
        lambda: engine.save_checkpoint(Path(folder) / "good" / "manifest.json", "bad"),
        lambda: engine.load_checkpoint(folder, "missing"),
        lambda: engine.load_checkpoint(
            folder, "good", custom_load_fn=None, load_module_strict=True
        ),
    ]
    if rank == 0:
        os.truncate(Path(folder) / "good" / "rank_1.safetensors", 10)
    for call in calls:
        try:
            call()
            told.append("no error")
        except CheckpointError as error:
            told.append(str(error))
    return told


def test_every_failure_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    one, other = ranks.run(2, fail_everywhere, str(tmp_path))
    assert one == other
    for message, part in zip(
        one, ["object", "'../bad'", "exists", "", "does not exist", "rank_1"], strict=True
    ):
        assert message != "no error" and part in message
    assert names(tmp_path) == {"good", "latest", "zero_to_fp32.py"}


# What is kept.


def test_client_state_comes_back_type_for_type(engine: Any, tmp_path: Path) -> None:
    state = {
        "none": None,
        "numbers": [1, -(2**80), 1.5, float("inf"), True, 10**4300 - 1, 1 - 10**4300],
        "text": "ü\U0001f600",
        "tuple": ((1, 2), [(3,)]),
        "by id": {3: "three", -1: {"$tuple": "no tag"}},
        "tensors": [
            torch.arange(6.0).view(2, 3),
            torch.tensor(2, dtype=torch.int16),
            torch.empty(0, 2).bfloat16(),
        ],
        "mask": torch.tensor([True, False]),
        "counter": Counter({5: 2}),
    }
    engine.save_checkpoint(tmp_path, "t", client_state=state)
    _, found = fresh().load_checkpoint(tmp_path)
    tensors, expected = found.pop("tensors"), state.pop("tensors")
    assert torch.equal(found.pop("mask"), state.pop("mask"))
    assert found == state and [type(v) for v in found["numbers"]] == [
        type(v) for v in state["numbers"]
    ]
    assert type(found["tuple"]) is tuple and type(found["counter"]) is Counter
    for one, other in zip(tensors, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": print}, r"client_state\['a'\]"),
        ({"a": [10**4300]}, r"client_state\['a'\]\[0\] is an integer of more than 4300 digits"),
        ({"a": {-(10**4300): 1}}, r"a key of client_state\['a'\] is an integer of more than 4300"),
        ({"a": "\ud800"}, r"client_state\['a'\] is a string with half of a surrogate pair"),
        ({"a": {"\udfff": 1}}, r"a key of client_state\['a'\] is a string with half"),
    ],
)
def test_a_client_state_that_cannot_be_kept_is_an_error_with_the_path(
    value: Any, path: str, engine: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=path):
        engine.save_checkpoint(tmp_path, "t", client_state=value)
    assert list(tmp_path.iterdir()) == []


def test_client_state_that_contains_itself_is_an_error(engine: Any, tmp_path: Path) -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(CheckpointError, match="nested"):
        engine.save_checkpoint(tmp_path, "t", client_state={"knot": knot})


class Everything(nn.Module):
    """Tied and frozen weights, buffers that are kept and not, a state of its own, and odd shapes
    and strides.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.base = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(6, 6).t())
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("angle", torch.ones(2, dtype=torch.complex64))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden = self.norm(self.base(self.embed(x) @ self.turned) * self.gain)
        return self.head(hidden) + self.none.sum()

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def everything(seed: int, optimizer: Any = torch.optim.NAdam) -> Any:
    model = Everything()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed)
    model.base.weight.requires_grad_(False)
    trainable = [p for name, p in model.named_parameters() if not name.startswith("base.bias")]
    return engine_of(
        config_of(2), model, lambda _: optimizer(trainable, lr=0.01), model_parameters=trainable
    )


def step(engine: Any) -> None:
    engine.backward(engine(torch.arange(8)).square().mean())
    engine.step()


def test_every_kind_of_parameter_and_buffer_comes_back(tmp_path: Path) -> None:
    one, other = everything(0), everything(1)
    step(one)
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert same_weights(one, other) and other.module.seen == 1
    assert torch.equal(other.module.norm.running_mean, one.module.norm.running_mean)
    step(one)
    step(other)
    assert same_weights(one, other)
    assert manifest_of(tmp_path / "global_step1")["aliases"] == {"head.weight": "embed.weight"}


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    one = everything(0)
    step(one)
    one.save_checkpoint(tmp_path, "whole")
    one.save_checkpoint(tmp_path, "part", exclude_frozen_parameters=True)
    assert "base.weight master" in contents(tmp_path / "whole")
    assert contents(tmp_path / "part")["base.weight master"].isnan().all()
    other = everything(1)
    frozen = other.module.base.weight.clone()
    other.load_checkpoint(tmp_path, "part")
    assert torch.equal(other.module.base.weight, frozen)
    assert torch.equal(other.module.embed.weight, one.module.embed.weight)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": adamw,
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    stage = 0 if name == "Adafactor" else 2
    one, other = (engine_of(config_of(stage), optimizer=OPTIMIZERS[name]) for _ in range(2))
    train(one, 0, 1, range(3))
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    other.module.norm.requires_grad_(False)
    for engine in (one, other):
        train(engine, 0, 1, range(3, 6))
    assert same_weights(one, other)


def test_schedule_loss_scale_counters_and_random_numbers_go_on(tmp_path: Path) -> None:
    def scaled() -> Any:
        config = {**config_of(1), "gradient_accumulation_steps": 2}
        config["torch_autocast"] = {"enabled": True, "dtype": "fp16"}
        del config["bf16"]
        schedule = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3], 0.1)  # noqa: E731
        return engine_of(config, lr_scheduler=schedule)

    one = scaled()
    for _ in range(5):
        one.backward(one(torch.randn(1, 10)).square().mean())
        one.step()
    one.save_checkpoint(tmp_path)
    drawn = torch.rand(3), random.random(), np.random.rand()
    other = scaled()
    other.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), drawn[0]) and (random.random(), np.random.rand()) == drawn[1:]
    assert other.get_lr() == one.get_lr() and other.loss_scale == one.loss_scale
    assert other.lr_scheduler.state_dict() == one.lr_scheduler.state_dict()
    assert (other.global_steps, other.global_samples, other.skipped_steps) == (
        2,
        4,
        one.skipped_steps,
    )
    # The window that was half full is begun anew: its gradients are in no checkpoint.
    assert other.micro_steps == 4 and one.micro_steps == 5


def test_a_checkpoint_holds_the_schedule_that_is_assigned_now(tmp_path: Path) -> None:
    constant = torch.optim.lr_scheduler.ConstantLR
    one, other = (engine_of(config_of(1), lr_scheduler=constant) for _ in range(2))
    for engine in (one, other):
        engine.lr_scheduler = torch.optim.lr_scheduler.StepLR(engine.optimizer, 2, gamma=0.1)
    train(one, 0, 1, range(3))
    one.save_checkpoint(tmp_path, "with")
    one.lr_scheduler = None
    one.save_checkpoint(tmp_path, "without")
    other.load_checkpoint(tmp_path, "with")
    assert other.lr_scheduler.last_epoch == 3 and other.get_lr() == one.get_lr()
    other.load_checkpoint(tmp_path, "without")
    assert any("StepLR stays as it is" in line for line in other.last_load.not_restored)


# Parts of a load.


def test_module_only_takes_weights_and_nothing_else(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path)
    other = engine_of(config_of(1), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    other.load_checkpoint(tmp_path, load_module_only=True)
    assert same_weights(engine, other) and other.global_steps == 0 and other.get_lr() == [0.5]


def test_another_optimizer_is_refused_unless_its_state_is_left_out(
    engine: Any, tmp_path: Path
) -> None:
    engine.save_checkpoint(tmp_path)
    other = engine_of(config_of(1), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    with pytest.raises(CheckpointError, match=r"AdamW.*SGD.*load_optimizer_states=False"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert same_weights(engine, other) and other.global_steps == 2


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)


def test_a_model_with_other_names_is_refused_unless_asked_not_to_be_strict(
    engine: Any, tmp_path: Path
) -> None:
    engine.save_checkpoint(tmp_path)
    other = engine_of(config_of(1), Longer())
    extra = other.module.extra.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"lacks extra\.weight, extra\.bias.*load_module_strict=False"
    ):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(other.module.extra.weight, extra)
    assert torch.equal(other.module.exit.weight, engine.module.exit.weight)
    other.save_checkpoint(tmp_path, "longer")
    with pytest.raises(CheckpointError, match=r"the model lacks extra\.weight"):
        engine.load_checkpoint(tmp_path, "longer")


def test_a_parameter_of_another_shape_is_named(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path)
    model = Net()
    model.exit = nn.Linear(23, 11)
    other = engine_of(config_of(1), model)
    with pytest.raises(
        CheckpointError, match=r"exit\.weight has shape \[11, 23\], in the checkpoint \[10, 23\]"
    ):
        other.load_checkpoint(tmp_path)


def test_a_custom_function_may_load_the_weights(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path)
    other = fresh()

    def load(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        dst.load_state_dict({name: value + 1 for name, value in src.items()})

    other.load_checkpoint(tmp_path, custom_load_fn=load)
    for name, value in weights(engine).items():
        assert torch.equal(weights(other)[name], value + 1)
    assert other.global_steps == 2


def test_the_data_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    def made() -> Any:
        data = [torch.full((10,), float(i)) for i in range(8)]
        return zerort.initialize(
            model=Net(), optimizer=adamw, training_data=data, config=config_of(1)
        )

    (one, _, loader, _), (other, _, resumed, _) = made(), made()
    batches = iter(loader)
    seen = [float(next(batches)[0, 0]) for _ in range(3)]
    one.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    rest = [float(batch[0, 0]) for batch in batches]
    assert sorted(seen + rest) == list(range(8))
    assert [float(batch[0, 0]) for batch in resumed] == rest
    assert [float(batch[0, 0]) for batch in resumed] == [float(batch[0, 0]) for batch in loader]
