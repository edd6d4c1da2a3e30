"""What people turn on in a Trainer beside plain training, at stages 2 and 3: an adapter, gradient
checkpointing, evaluation and prediction whose last batch is uneven, a model that is born sharded
because Accelerate's plugin says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import doors
import ranks

pytestmark = [
    pytest.mark.slow,
    doors.needs("accelerate", "transformers", "peft"),
    pytest.mark.parametrize("stage", [2, 3]),
]

STEPS, SAVED, UNEVEN = 4, 2, 7
Numbers = dict[str, Any]


def forget() -> None:
    """Accelerate's state of the last run; the process group stays."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


def trainer(stage: int, source: str, folder: Path, lora: bool = False, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    forget()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=doors.settings(stage, "fp32", zero_optimization=zero),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=SAVED,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    if lora:
        model = adapted(model)
    data, uneven = doors.sentences(2 * 2 * STEPS), doors.sentences(UNEVEN)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=uneven)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(13)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from zerort.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {name: value.float().clone() for name, value in model.state_dict().items()}


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


# ---- the flows, on one rank


def plain(stage: int, source: str, folder: Path) -> Numbers:
    """With `evaluate` and `predict` behind it."""
    made = trainer(stage, source, folder / "plain")
    made.train()
    answers = made.predict(doors.sentences(UNEVEN))
    found = {
        "losses": losses(made),
        "weights": whole(made.model),
        "evaluated": made.evaluate()["eval_loss"],
        "predicted": torch.from_numpy(answers.predictions),
        "labels": torch.from_numpy(answers.label_ids),
    }
    made.accelerator.free_memory()
    return found


def checkpointed(stage: int, source: str, folder: Path) -> Numbers:
    """Activations are computed anew in the backward."""
    calls = [0]
    made = trainer(stage, source, folder / "checkpointed", gradient_checkpointing=True)
    layer = made.model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    made.train()
    found = {"losses": losses(made), "weights": whole(made.model), "forwards": calls[0]}
    made.accelerator.free_memory()
    return found


def lora(stage: int, source: str, folder: Path) -> Numbers:
    made = trainer(stage, source, folder / "lora", lora=True)
    before = whole(made.model)
    made.train()
    trained = whole(made.model)
    moved = sorted(name for name in trained if not torch.equal(trained[name], before[name]))
    made.save_model(str(folder / "lora" / "final"))
    made.accelerator.free_memory()
    again = trainer(stage, source, folder / "lora", lora=True)
    again.train(resume_from_checkpoint=str(folder / "lora" / f"checkpoint-{SAVED}"))
    resumed = whole(again.model)
    again.accelerator.free_memory()
    return {
        "losses": losses(made),
        "weights": trained,
        "moved": moved,
        "steps": [entry["step"] for entry in again.state.log_history if "loss" in entry],
        "resumed": all(torch.equal(resumed[name], value) for name, value in trained.items()),
    }


def born(stage: int, source: str, folder: Path) -> Numbers:
    """`from_pretrained` under a plugin that asks for zero.Init."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from transformers import AutoModelForCausalLM

    forget()
    plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=True)
    one = Accelerator(deepspeed_plugin=plugin)
    model = AutoModelForCausalLM.from_pretrained(source)
    sharded = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.utils.data.DataLoader(doors.sentences(2 * 2 * STEPS), batch_size=2)  # type: ignore[arg-type]
    engine, optimizer, rows = one.prepare(model, optimizer, rows)
    found: Numbers = {"sharded": sharded, "losses": []}
    for batch in rows:
        loss = engine(**batch).loss
        one.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    one.free_memory()
    return found


def on_a_rank(rank: int, world: int, stage: int, source: str, folder: str) -> Numbers:
    doors.enter(rank, world)
    place = Path(folder)
    return {flow.__name__: flow(stage, source, place) for flow in (plain, checkpointed, lora, born)}


@ranks.once(None)
def flows(stage: int, source: str) -> list[Numbers]:
    return ranks.run(2, on_a_rank, stage, source, f"{source}-{stage}", timeout=170)


def prepare(rank: int, world: int, place: str) -> None:
    doors.tiny_llama(place)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("flows") / "model"
    ranks.run(1, prepare, str(place))
    return str(place)


@pytest.fixture
def found(stage: int, source: str) -> list[Numbers]:
    return flows(stage, source)


# ---- what is true of them


def test_an_adapter_alone_is_trained_and_resumed_to_the_bit(found: list[Numbers]) -> None:
    for one in found:
        mine = one["lora"]
        assert len(mine["losses"]) == STEPS
        assert len(mine["moved"]) == 8  # A and B of two projections of two layers
        assert all("lora_" in name for name in mine["moved"])
        assert mine["steps"] == list(range(1, STEPS + 1))
        assert mine["resumed"]


def test_an_adapter_is_all_that_is_saved(found: list[Numbers], stage: int, source: str) -> None:
    from safetensors.torch import load_file

    for place in ("final", f"checkpoint-{STEPS}"):
        folder = Path(f"{source}-{stage}") / "lora" / place
        saved = load_file(folder / "adapter_model.safetensors")
        assert not (folder / "model.safetensors").exists()
        mine = {
            name.replace(".default", ""): value
            for name, value in found[0]["lora"]["weights"].items()
            if "lora_" in name
        }
        assert saved.keys() == mine.keys()
        assert all(torch.equal(saved[name], value) for name, value in mine.items())


def test_gradient_checkpointing_changes_the_memory_and_not_the_numbers(
    found: list[Numbers],
) -> None:
    for one in found:
        mine = one["checkpointed"]
        assert mine["forwards"] == 2 * STEPS
        assert mine["losses"] == one["plain"]["losses"]
        torch.testing.assert_close(mine["weights"], one["plain"]["weights"], rtol=1e-6, atol=1e-7)


def test_an_uneven_last_batch_is_evaluated_and_predicted_once(
    found: list[Numbers], source: str
) -> None:
    from_ranks = [one["plain"] for one in found]
    logits, labels = from_ranks[0]["predicted"], from_ranks[0]["labels"]
    assert logits.shape == (UNEVEN, 8, 32)
    wanted = torch.stack([each["labels"] for each in doors.sentences(UNEVEN)])
    assert torch.equal(labels, wanted)
    expected = ranks.run(1, answers, source, from_ranks[0]["weights"])[0]
    for mine in from_ranks:
        torch.testing.assert_close(mine["predicted"], expected["logits"], rtol=1e-4, atol=1e-5)
        assert mine["evaluated"] == from_ranks[0]["evaluated"]
        # four batches of two: the trainer fills the last with the first and counts it not
        assert mine["evaluated"] == pytest.approx(expected["loss"], rel=1e-4)


def answers(rank: int, world: int, source: str, weights: dict[str, torch.Tensor]) -> Numbers:
    """Of the trained weights in one process, without zerort."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.load_state_dict(weights)
    rows = torch.stack([each["input_ids"] for each in doors.sentences(UNEVEN + 1)])
    rows[UNEVEN] = rows[0]
    with torch.no_grad():
        logits = model.eval()(input_ids=rows).logits
        batches = [model(input_ids=two, labels=two).loss for two in rows.split(2)]
    mean = sum(batch.item() * min(2, UNEVEN - 2 * at) for at, batch in enumerate(batches)) / UNEVEN
    return {"logits": logits[:UNEVEN], "loss": mean}


def test_a_plugin_with_zero3_init_has_models_born_sharded(
    found: list[Numbers], stage: int, source: str
) -> None:
    for one, replicated in zip(found, flows(2, source), strict=True):
        assert one["born"]["sharded"] == (stage == 3)
        assert one["born"]["losses"] == pytest.approx(replicated["born"]["losses"], rel=1e-5)
        assert len(one["born"]["losses"]) == STEPS
