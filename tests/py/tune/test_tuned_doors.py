"""Tuning through other libraries' doors: Accelerate's loop, the Trainer of transformers, Lightning.
What each of them is given is its own configuration with a `zerort` section.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import doors
import ranks
from zerort.tune import feature
from zerort.tune.feature import WARM_UP
from zerort.tune.model import Best, Setting
from zerort.tune.task import VARIABLE, Task

pytestmark = [
    pytest.mark.slow,  # what is tested is whether libraries get on with it, not tuning itself
    pytest.mark.timeout(400),
    doors.needs("accelerate", "transformers", "pytorch_lightning"),
]

Runtime = Mapping[str, Any]
Weights = dict[str, torch.Tensor]

BEGUN, CHOSEN = 64, Setting(4000, None)
STAGE, STEPS, ACCUMULATION = 2, 4, 2


def copied(model: torch.nn.Module) -> Weights:
    return {name: value.float().clone() for name, value in model.state_dict().items()}


# The doors: each trains for so many steps, with this section beside its own configuration.


def accelerate(runtime: Runtime, steps: int, folder: Path) -> Weights:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = DeepSpeedPlugin(
        hf_ds_config=doors.settings(STAGE, "fp32", gradient_clipping=0.05, zerort=dict(runtime)),
        gradient_accumulation_steps=ACCUMULATION,
    )
    accelerator = Accelerator(deepspeed_plugin=plugin)
    rows = doors.rows(steps * ACCUMULATION * doors.BATCH * dist.get_world_size())
    net = doors.net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*rows), batch_size=doors.BATCH
    )
    model, optimizer, data = accelerator.prepare(net, optimizer, data)
    for inputs, targets in data:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    return copied(accelerator.unwrap_model(model))


def transformers(runtime: Runtime, steps: int, folder: Path) -> Weights:
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=False)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=doors.settings(STAGE, "fp32", zerort=dict(runtime)),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = Trainer(model, arguments, train_dataset=doors.sentences(4 * steps * ACCUMULATION))
    trainer.train()
    return copied(trainer.model)


def lightning(runtime: Runtime, steps: int, folder: Path) -> Weights:
    import lightning_flows as flows
    from zerort.compat.lightning import ZerortStrategy

    module = flows.net()
    strategy = ZerortStrategy(STAGE, {"zerort": dict(runtime)})
    options = {"max_epochs": 99, "max_steps": steps, "accumulate_grad_batches": ACCUMULATION}
    flows.trainer(strategy, **options).fit(module, flows.data())
    return copied(module)


DOORS: list[Callable[[Runtime, int, Path], Weights]] = [accelerate, transformers, lightning]


def tuned(door: Callable[[Runtime, int, Path], Weights], folder: Path) -> tuple[int, int, bool]:
    """Buckets before and behind the first boundary, and whether all bits are those of a run that
    began with the chosen ones.
    """
    seen: list[Any] = []
    own = feature.proposal

    def proposal(parts: Any, *_: Any) -> Best:
        seen.append((parts, len(parts.reduction.plan.buckets)))
        return Best(CHOSEN, 1e-6)

    feature.proposal = proposal
    try:
        moved = door({"bucket_bytes": BEGUN, "tune": True}, STEPS, folder)
    finally:
        feature.proposal = own
    began = door({"bucket_bytes": CHOSEN.bucket_bytes, "window": "all"}, STEPS, folder)
    ((parts, before),) = seen
    same = moved.keys() == began.keys()
    same = same and all(torch.equal(moved[name], began[name]) for name in began)
    return before, len(parts.reduction.plan.buckets), same


def asked(door: Callable[[Runtime, int, Path], Weights], folder: Path) -> Any:
    """How a run ends that the command has started, and what it has found."""
    file = folder / f"{door.__name__}.json"
    os.environ[VARIABLE] = Task(str(file), 1).environment()[VARIABLE]
    try:
        door({"bucket_bytes": BEGUN}, WARM_UP + 4, folder)
    except SystemExit as ended:
        return ended.code, json.loads(file.read_text()) if dist.get_rank() == 0 else None
    finally:
        del os.environ[VARIABLE]
    return "went on", None


def every_door(rank: int, world: int, folder: str) -> Any:
    doors.enter(rank, world)
    place = Path(folder)
    if rank == 0:
        doors.tiny_llama(place / "model")
    dist.barrier()
    return {door.__name__: (tuned(door, place), asked(door, place)) for door in DOORS}


@ranks.once(None)
def results(folder: str) -> Any:
    return ranks.run(2, every_door, folder, timeout=380)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("doors"))


@pytest.mark.parametrize("door", [door.__name__ for door in DOORS])
def test_a_first_window_is_tuned_and_the_run_is_one_with_the_chosen_buckets(
    door: str, folder: str
) -> None:
    for found in results(folder):
        before, after, same = found[door][0]
        assert before > after
        assert same


@pytest.mark.parametrize("door", [door.__name__ for door in DOORS])
def test_a_run_that_the_command_has_started_ends_behind_its_steps(door: str, folder: str) -> None:
    first, second = (found[door][1] for found in results(folder))
    assert (first[0], second[0]) == (0, 0)
    assert first[1]["state"] == "measured"
    assert first[1]["steps"] == 1
    assert first[1]["present"]["bucket_bytes"] == BEGUN
