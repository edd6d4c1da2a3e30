"""transformers under an `HfDeepSpeedConfig` of stage 3: a model is born sharded, has what was
saved, and trains.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import doors
import ranks

pytestmark = doors.needs("accelerate", "transformers")

Numbers = dict[str, Any]


def settings() -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0,
        "steps_per_print": float("inf"),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    }


def held(model: nn.Module) -> int:
    """Bytes that this rank's parameters have memory for."""
    with torch._C.DisableTorchFunctionSubclass():
        return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    from zerort.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {name: value.clone() for name, value in model.state_dict().items()}


def born(rank: int, world: int, place: str) -> Numbers:
    doors.enter(rank, world)
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig(settings())
    loaded = AutoModelForCausalLM.from_pretrained(place)
    torch.manual_seed(rank)  # whatever a rank draws itself, rank 0's numbers count
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
    found: Numbers = {
        "status": {parameter.ds_status.name for parameter in loaded.parameters()},
        "held": held(loaded),
        "loaded": whole(loaded),
        "drawn": whole(drawn),
        "buffers": {name: buffer.clone() for name, buffer in loaded.named_buffers()},
    }
    engine, *_ = deepspeed.initialize(model=loaded, config=kept.config)
    found["losses"] = [train(engine, step) for step in range(3)]
    found["trained"] = whole(engine.module)
    return found


def train(engine: Any, step: int) -> float:
    rows = doors.sentences(12)[4 * step : 4 * step + 4]
    tokens = torch.stack([row["input_ids"] for row in rows]).chunk(2)[int(os.environ["RANK"])]
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def plain(rank: int, world: int, place: str) -> Numbers:
    """Makes the model, and does the same on one process: both ranks' samples."""
    from transformers import AutoModelForCausalLM

    doors.tiny_llama(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    found: Numbers = {
        "loaded": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        rows = doors.sentences(12)[4 * step : 4 * step + 4]
        tokens = torch.stack([row["input_ids"] for row in rows])
        for part in tokens.chunk(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["trained"] = model.state_dict()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Numbers], Numbers]:
    place: Path = tmp_path_factory.mktemp("pretrained") / "model"
    [alone] = ranks.run(1, plain, str(place), timeout=150)
    return ranks.run(2, born, str(place), timeout=150), alone


Found = tuple[list[Numbers], Numbers]


def test_a_model_is_sharded_as_soon_as_it_is_made(found: Found) -> None:
    for one in found[0]:
        assert one["status"] == {"NOT_AVAILABLE"}
        assert one["held"] < found[1]["bytes"] / 2  # nothing of it is whole here


def test_it_has_the_values_that_were_saved_and_the_buffers_of_a_whole_one(found: Found) -> None:
    for one in found[0]:
        torch.testing.assert_close(one["loaded"], found[1]["loaded"], rtol=0, atol=0)
        torch.testing.assert_close(one["buffers"], found[1]["buffers"], rtol=0, atol=0)


def test_a_new_model_is_drawn_alike_on_all_ranks_and_not_zero(found: Found) -> None:
    one, other = (each["drawn"] for each in found[0])
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    weights = [value for name, value in one.items() if value.ndim == 2]
    assert all(0.015 < float(weight.std()) < 0.025 for weight in weights)  # initializer_range


def test_it_trains_as_a_whole_one_does(found: Found) -> None:
    for one in found[0]:
        torch.testing.assert_close(one["trained"], found[1]["trained"], rtol=1e-4, atol=1e-5)
