"""TRL's trainers on two ranks: SFT, with an adapter too, DPO with a reference model, reward, and
GRPO and RLOO, which generate through the engine's module. Stage 3 does what stage 2 does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import doors
import ranks

pytestmark = [pytest.mark.slow, doors.needs("accelerate", "transformers", "trl", "peft")]

STEPS = 3
KINDS = ("sft", "lora", "dpo", "reward", "grpo", "rloo")
Numbers = dict[str, Any]
Halves = list[tuple[str, str]]


def options(stage: int, folder: str) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "output_dir": folder,
        "deepspeed": doors.settings(stage, "fp32", zero_optimization=zero),
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trainer(kind: str, stage: int, source: str, folder: str) -> Any:
    from transformers import AutoTokenizer

    given = {"model_init_kwargs": {"dtype": "float32"}, **options(stage, folder)}
    tokenizer, lines = AutoTokenizer.from_pretrained(source), doors.said_in_words(32)
    if kind in ("sft", "lora"):
        return of_text(kind, source, given, lines, tokenizer)
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    if kind in ("dpo", "reward"):
        return of_pairs(kind, source, given, halves, tokenizer)
    return of_rewards(kind, source, given, halves, tokenizer)


def of_text(kind: str, source: str, given: Numbers, lines: list[str], tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        source,
        SFTConfig(max_length=16, **given),
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=tokenizer,
        peft_config=adapter() if kind == "lora" else None,
    )


def of_pairs(kind: str, source: str, given: Numbers, halves: Halves, tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    options, trainer = (DPOConfig, DPOTrainer) if kind == "dpo" else (RewardConfig, RewardTrainer)
    pairs = {
        "prompt": [first for first, _ in halves],
        "chosen": [rest for _, rest in halves],
        "rejected": [" ".join(reversed(rest.split())) for _, rest in halves],
    }
    return trainer(
        source,
        args=options(max_length=24, **given),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )


def of_rewards(kind: str, source: str, given: Numbers, halves: Halves, tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    options, trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    return trainer(
        source,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=options(num_generations=2, max_completion_length=4, beta=0.1, **given),
        train_dataset=Dataset.from_dict({"prompt": [first for first, _ in halves]}),
        processing_class=tokenizer,
    )


def through_trl(rank: int, world: int, kind: str, stage: int, source: str, folder: str) -> Numbers:
    doors.enter(rank, world)
    from zerort.zero import GatheredParameters

    made = trainer(kind, stage, source, folder)
    made.train()
    with GatheredParameters(list(made.model.parameters())):
        weights = {
            name: parameter.detach().clone()
            for name, parameter in made.model.named_parameters()
            if parameter.requires_grad
        }
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "reference": type(getattr(made, "ref_model", None)).__name__,
        "rewards": [entry["reward"] for entry in logs if "reward" in entry],
        "engine": type(made.model_wrapped).__name__,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("trl") / "model"
    ranks.run(1, prepare, str(place), timeout=120)
    return str(place)


def prepare(rank: int, world: int, place: str) -> None:
    doors.tiny_llama(place)
    doors.tiny_tokenizer(place)


@ranks.once(None)
def trained(kind: str, stage: int, source: str) -> list[Numbers]:
    folder = f"{source}-{kind}-{stage}"
    return ranks.run(2, through_trl, kind, stage, source, folder, timeout=300)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_trains_and_the_ranks_agree(kind: str, stage: int, source: str) -> None:
    found = trained(kind, stage, source)
    for one in found:
        assert len(one["losses"]) == STEPS
        assert one["engine"] == "DeepSpeedEngine"
        assert all(norm > 0 for norm in one["norms"])
    assert found[0]["weights"].keys() == found[1]["weights"].keys()
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name]), name


@pytest.mark.timeout(800)
@pytest.mark.parametrize("kind", ["sft", "lora", "dpo", "reward"])
def test_stage_3_trains_what_stage_2_does(kind: str, source: str) -> None:
    two, three = trained(kind, 2, source)[0], trained(kind, 3, source)[0]
    for key in ("losses", "norms", "weights"):
        torch.testing.assert_close(two[key], three[key], rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_in_a_checkpoint_of_its_weights(source: str) -> None:
    from safetensors.torch import load_file

    trained("lora", 3, source)
    place = Path(f"{source}-lora-3") / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    saved = load_file(place)
    assert all("lora_" in name for name in saved)
    assert all(value.numel() > 0 for value in saved.values())
