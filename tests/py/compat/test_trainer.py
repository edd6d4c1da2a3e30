"""The Trainer of transformers with `deepspeed=` a configuration, on two ranks: train, evaluate,
save, go on from a checkpoint, take the best model; against the Trainer without DeepSpeed, which is
DDP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import doors
import ranks

pytestmark = doors.needs("accelerate", "transformers")

Case = tuple[int, str]
Numbers = dict[str, Any]
PLAIN: Case = (-1, "fp32")
FEW: list[Case] = [(2, "fp32"), (3, "bf16")]
REST = [
    (stage, kind) for stage in range(4) for kind in ("fp32", "bf16") if (stage, kind) not in FEW
]
STEPS, SAVED = 6, 3


class Training:
    """One run on one rank."""

    def __init__(self, case: Case, model: str, folder: Path) -> None:
        self.case, self.source, self.folder = case, model, folder
        self.found: Numbers = {}

    def arguments(self, **more: Any) -> Any:
        from transformers import TrainingArguments

        stage, precision = self.case
        zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        given = doors.settings(stage, precision, zero_optimization=zero)
        return TrainingArguments(
            output_dir=str(self.folder),
            deepspeed=given if stage >= 0 else None,
            accelerator_config={"use_configured_state": True},
            use_cpu=True,
            bf16=precision == "bf16",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            warmup_steps=2,
            logging_steps=1,
            save_steps=SAVED,
            eval_steps=SAVED,
            eval_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
            disable_tqdm=True,
            **more,
        )

    def trainer(self, **more: Any) -> Any:
        from transformers import AutoModelForCausalLM, Trainer

        arguments = self.arguments(**more)
        model = AutoModelForCausalLM.from_pretrained(self.source)
        return Trainer(
            model,
            arguments,
            train_dataset=doors.sentences(32),
            eval_dataset=doors.sentences(8),
        )

    def run(self) -> Numbers:
        trainer = self.trainer()
        trainer.train()
        logs = trainer.state.log_history
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            self.found[key] = [entry[key] for entry in logs if key in entry]
        self.found["best"] = trainer.state.best_model_checkpoint
        self.found["evaluated"] = trainer.evaluate()["eval_loss"]
        trained = whole(trainer.model)
        self.found["weights"] = trained
        trainer.save_model(str(self.folder / "final"))
        trainer.accelerator.free_memory()
        if self.case != PLAIN:
            self.resume(trained)
        return self.found

    def resume(self, trained: dict[str, torch.Tensor]) -> None:
        forget()
        trainer = self.trainer()
        trainer.train(resume_from_checkpoint=str(self.folder / f"checkpoint-{SAVED}"))
        self.found["resumed_at"] = [
            entry["step"] for entry in trainer.state.log_history if "loss" in entry
        ]
        again = whole(trainer.model)
        self.found["resumed"] = all(torch.equal(again[name], trained[name]) for name in trained)
        trainer.accelerator.free_memory()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from zerort.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {name: value.float().clone() for name, value in model.state_dict().items()}


def forget() -> None:
    """Accelerate's state of the last run; the process group stays."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


def enter(rank: int, world: int, case: Case) -> None:
    doors.enter(rank, world)
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    if case == PLAIN:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        PartialState(cpu=True, backend="gloo")
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")


def trainings(rank: int, world: int, cases: list[Case], folder: str) -> dict[Case, Numbers]:
    doors.enter(rank, world)
    if rank == 0:
        doors.tiny_llama(f"{folder}/model")
    dist.barrier()
    found = {}
    for case in cases:
        enter(rank, world, case)
        place = Path(folder) / f"{case[0]}-{case[1]}"
        found[case] = Training(case, f"{folder}/model", place).run()
    return found


@ranks.once(None)
def trained(cases: tuple[Case, ...], folder: str) -> list[dict[Case, Numbers]]:
    return ranks.run(2, trainings, [*cases, PLAIN], folder, timeout=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(
    params=[
        *(pytest.param(case, id=f"{case[0]}-{case[1]}") for case in FEW),
        *(pytest.param(c, id=f"{c[0]}-{c[1]}", marks=pytest.mark.slow) for c in REST),
    ]
)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def found(case: Case, folder: Path) -> list[dict[Case, Numbers]]:
    return trained(tuple(FEW if case in FEW else REST), str(folder))


def near(precision: str) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.05}


def test_losses_norms_rates_and_weights_are_those_of_ddp(
    found: list[dict[Case, Numbers]], case: Case
) -> None:
    for one in found:
        mine, other = one[case], one[PLAIN]
        assert len(mine["loss"]) == STEPS
        assert mine["learning_rate"] == other["learning_rate"]
        for key in ("loss", "grad_norm", "eval_loss", "weights"):
            torch.testing.assert_close(mine[key], other[key], **near(case[1]))


def test_the_best_model_is_loaded_and_evaluated(
    found: list[dict[Case, Numbers]], case: Case
) -> None:
    for one in found:
        best = one[case]["best"]
        assert best.endswith(f"checkpoint-{STEPS}")
        assert one[case]["evaluated"] == one[case]["eval_loss"][-1]


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(
    found: list[dict[Case, Numbers]], case: Case
) -> None:
    for one in found:
        assert one[case]["resumed_at"] == list(range(1, STEPS + 1))
        assert one[case]["resumed"]


def test_what_is_saved_is_read_without_zerort(
    found: list[dict[Case, Numbers]], case: Case, folder: Path
) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / f"{case[0]}-{case[1]}" / "final" / "model.safetensors")
    mine = found[0][case]["weights"]
    assert {
        name: value.float().equal(mine[name]) for name, value in saved.items()
    } == dict.fromkeys(saved, True)
    assert len(saved) == len(mine)
