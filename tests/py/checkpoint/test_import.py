"""DeepSpeed's checkpoints: what was recorded with a real one goes on here as it went on there."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranks
import zerort
from deepspeed_run import (
    AFTER,
    BEFORE,
    NAMES,
    NAMES_WITHOUT_DECAY,
    Net,
    config_of,
    optimizer_of,
    train,
)
from saved import contents, manifest_of
from zerort import cli
from zerort.checkpoint import get_fp32_state_dict, problems
from zerort.checkpoint.deepspeed.convert import ImportOptions, import_checkpoint
from zerort.checkpoint.deepspeed.files import VERSIONS
from zerort.checkpoint.formats import ExportOptions, export_checkpoint
from zerort.errors import CheckpointError

RECORDED = Path(__file__).parents[2] / "data" / "deepspeed"
IN_ORDER = (*NAMES, *NAMES_WITHOUT_DECAY)
CASES = sorted(
    f"{version.name}/{case.name}"
    for version in RECORDED.glob("0.*")
    for case in version.glob("?-*")
)


def imported(case: Path, out: Path) -> Path:
    """The tag's folder."""
    names = IN_ORDER if case.name == "0-fp32" else None
    return import_checkpoint(case, None, out, ImportOptions(names=names)).path


def recorded(case: Path, when: str) -> dict[str, torch.Tensor]:
    """The weights that DeepSpeed's script gave."""
    found = load_file(case / "weights.safetensors").items()
    return {k.removeprefix(f"{when}."): v for k, v in found if k.startswith(f"{when}.")}


def test_all_stages_and_versions_are_recorded() -> None:
    stages = {name.split("/")[1][0] for name in CASES}
    versions = {name.split("/")[0].rpartition(".")[0] for name in CASES}
    assert stages == set("0123") and versions == set(VERSIONS)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_state_and_count_is_taken_to_the_bit(name: str, tmp_path: Path) -> None:
    case = RECORDED / name
    folder = imported(case, tmp_path)
    assert problems(tmp_path, "global_step3") == [] and (tmp_path / "latest").exists()
    found = get_fp32_state_dict(tmp_path)
    expected = recorded(case, "before")
    for key, value in expected.items():
        if key == "head.weight" and key not in found:
            continue  # stage 3 does not say whose name it is
        if name.endswith("0-bf16"):  # what is recorded there are the module's
            assert torch.equal(found[key].bfloat16().float(), value), key
        else:
            assert torch.equal(found[key], value), key
    check_rest(folder, name)


def check_rest(folder: Path, name: str) -> None:
    """What was recorded beside the weights."""
    manifest = manifest_of(folder)
    skipped = name.endswith("fp16")
    counts = {"global_steps": 3, "global_samples": 24, "micro_steps": 3, "skipped_steps": skipped}
    assert manifest["counters"] == counts
    assert manifest["client_state"] == {"epoch": 2, "seen": [1, 2]}
    last = {"last_batch_iteration": 2 - skipped}
    assert manifest["scheduler"] == {"name": "WarmupLR", "state": last}
    assert (manifest["loss_scale"] is not None) == skipped
    groups = manifest["optimizer"]["groups"]
    if name.endswith("elastic"):  # which keeps no options
        assert groups == [{}, {}]
    else:
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sorted(manifest["frozen"]) == ["base.bias", "base.weight"]
    assert {entry["name"] for entry in manifest["params"]} == set(IN_ORDER)
    held = contents(folder)
    assert held.keys() >= {f"{key} state.exp_avg_sq" for key in IN_ORDER}


def go_on(rank: int, world: int, folder: str, stage: int, dtype: str) -> dict[str, Any]:
    model = Net()
    config = config_of(stage, dtype)
    config["train_micro_batch_size_per_gpu"] = 8 // world
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer_of(model), config=config)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and client_state == {"epoch": 2, "seen": [1, 2]}
    assert engine.global_steps == BEFORE and not engine.last_load.stayed
    train(engine, rank, world, range(BEFORE, AFTER))
    engine.save_checkpoint(f"{folder}/on")
    scale = torch.tensor(float(engine.loss_scale)) if dtype == "fp16" else None
    engine.destroy()
    found = get_fp32_state_dict(f"{folder}/on")
    return found if scale is None else {**found, "loss_scale": scale}


HOW = [
    ("0.19.8/0-fp32", 1, 2),
    ("0.19.8/2-fp32", 3, 2),
    ("0.19.8/3-fp32", 2, 1),
    ("0.19.8/3-fp32-sub", 2, 2),
    ("0.19.8/2-fp32-elastic", 2, 1),
    ("0.16.9/3-fp32", 0, 2),
    ("0.19.8/1-bf16", 2, 2),
    ("0.17.6/2-bf16", 1, 1),
    ("0.18.9/2-fp32", 3, 1),
    ("0.18.9/3-bf16", 2, 2),
    ("0.19.8/2-fp16", 1, 2),
    ("0.19.8/3-fp16", 3, 1),
]


@pytest.mark.parametrize(("name", "stage", "world"), HOW)
def test_a_run_goes_on_as_it_went_on_under_deepspeed(
    name: str, stage: int, world: int, tmp_path: Path
) -> None:
    case, dtype = RECORDED / name, name.split("-")[1]
    imported(case, tmp_path)
    found = ranks.run(world, go_on, str(tmp_path), stage, dtype)[0]
    compare(found, case, dtype)


def compare(found: dict[str, torch.Tensor], case: Path, dtype: str) -> None:
    expected, before = recorded(case, "after"), recorded(case, "before")
    # in 16 bits gradients are summed in them there
    tolerance = {"fp32": 2e-6, "fp16": 5e-4, "bf16": 2e-3}[dtype]
    assert found.get("loss_scale") == expected.get("loss_scale")
    for key in IN_ORDER:
        assert torch.allclose(found[key], expected[key], rtol=0, atol=tolerance), key
        moved = (expected[key] - before[key]).abs().max()
        assert moved > 2 * tolerance, f"{key} did not move enough to tell"


# Universal checkpoints.

UNIVERSAL = RECORDED / "universal"


def same_contents(one: Path, other: Path) -> None:
    """To the bit, step counts included."""
    ours, theirs = contents(one), contents(other)
    assert ours.keys() == theirs.keys() and all("step" in ours[f"{n} values"] for n in IN_ORDER)
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else None
        assert ours[key] == value if same is None else same, key


@pytest.mark.parametrize("name", ["2-fp32", "3-fp32-sub"])
def test_a_universal_checkpoint_is_that_which_it_was_made_of(name: str, tmp_path: Path) -> None:
    made = import_checkpoint(UNIVERSAL / name, None, tmp_path / "made").path
    check_rest(made, name)
    same_contents(made, imported(RECORDED / "0.19.8" / name, tmp_path / "direct"))
    found = ranks.run(1, go_on, str(tmp_path / "made"), 3, "fp32")[0]
    compare(found, RECORDED / "0.19.8" / name, "fp32")


@pytest.mark.parametrize("name", ["0.19.8/2-fp32", "0.19.8/3-fp32", "0.19.8/1-bf16"])
def test_an_export_to_the_universal_form_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    first = imported(RECORDED / name, tmp_path / "one")
    options = ExportOptions(ranks=2)
    export_checkpoint(tmp_path / "one", None, tmp_path / "u", "deepspeed-universal", options)
    again = import_checkpoint(tmp_path / "u", None, tmp_path / "two").path
    same_contents(again, first)
    one, two = manifest_of(first), manifest_of(again)
    for key in ("counters", "client_state", "scheduler", "aliases", "frozen"):
        assert one[key] == two[key], key
    assert one["optimizer"] == two["optimizer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda home: (home / "mid.bias" / "fp32.pt").unlink(), "mid.bias lacks fp32.pt"),
        (lambda home: os.truncate(home / "mid.bias" / "exp_avg.pt", 300), "does not read"),
        (lambda home: os.truncate(home / "optimizer_state.pt", 300), "does not read"),
        (lambda home: (home / "optimizer_state.pt").unlink(), "does not read"),
        (
            lambda home: torch.save({"param": torch.ones(3)}, home / "mid.bias" / "fp32.pt"),
            "mid.bias has 5 elements, and the files hold 3 of its master",
        ),
        (lambda home: torch.save({"x": 1}, home / "mid.bias" / "fp32.pt"), "is not laid out as"),
        (lambda home: torch.save([1], home / "optimizer_state.pt"), "is not laid out as"),
        (
            lambda home: torch.save({"param": Attack()}, home / "mid.bias" / "fp32.pt"),
            "would run code: .*exec",
        ),
    ],
)
def test_a_universal_checkpoint_that_is_not_whole_is_one_error(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = Path(shutil.copytree(UNIVERSAL / "2-fp32", tmp_path / "ds"))
    change(case / "global_step3" / "zero")
    refused(case, message, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_parameter_s_name_does_not_lead_out_of_a_universal_checkpoint(tmp_path: Path) -> None:
    case = Path(shutil.copytree(UNIVERSAL / "2-fp32", tmp_path / "ds"))
    home = case / "global_step3" / "zero"
    for name in ("../mid.bias", "..", ""):
        rewrite(case, lambda model, n=name: model["param_shapes"][1].update({n: torch.Size([5])}))
        refused(case, "cannot be the folder of a parameter|is not laid out", tmp_path)
        rewrite(case, lambda model, n=name: model["param_shapes"][1].pop(n))
    (home / "mid.bias").rename(tmp_path / "elsewhere")
    (home / "mid.bias").symlink_to(tmp_path / "elsewhere")
    refused(case, "cannot be the folder of a parameter", tmp_path)


# Bad input.


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED / "0.19.8" / "2-fp32", tmp_path / "ds"))


def refused(case: Path, message: str, tmp_path: Path, tag: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(case, tag, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("which", ["mp_rank_00_model", "zero_pp_rank_1_mp_rank_00_optim"])
@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_cut_file_is_named(which: str, size: int, case: Path, tmp_path: Path) -> None:
    os.truncate(case / "global_step3" / f"{which}_states.pt", size)
    refused(case, f"{which}_states.pt does not read, it may be cut", tmp_path)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


class Quiet:
    """An object of the caller's, in client_state."""


def test_a_namespace_of_values_is_taken_and_given_back(case: Path, tmp_path: Path) -> None:
    given = argparse.Namespace(lr=0.5, dtype=torch.bfloat16, seen=torch.arange(3), nested={"a": 1})
    rewrite(case, lambda model: model.update(args=given, sizes=(1, argparse.Namespace(n=2))))
    folder = import_checkpoint(case, None, tmp_path / "out").path
    engine = zerort.initialize(
        model=(model := Net()), optimizer=optimizer_of(model), config=config_of(2, "fp32")
    )[0]
    _, found = engine.load_checkpoint(folder.parent)
    assert type(found["args"]) is argparse.Namespace and found["args"].lr == 0.5
    assert found["args"].dtype == torch.bfloat16 and found["args"].nested == {"a": 1}
    assert torch.equal(found["args"].seen, torch.arange(3))
    assert found["sizes"] == (1, argparse.Namespace(n=2)) and found["epoch"] == 2
    engine.save_checkpoint(str(tmp_path / "again"), client_state={"args": found["args"]})
    _, again = engine.load_checkpoint(str(tmp_path / "again"))
    assert again["args"].lr == 0.5
    with pytest.raises(CheckpointError, match=r"client_state\['args'\]\.hook is a .*Quiet"):
        kept = {"args": argparse.Namespace(lr=1, hook=Quiet())}
        engine.save_checkpoint(str(tmp_path / "again"), client_state=kept)
    engine.destroy()


def test_a_namespace_that_holds_an_object_is_refused_or_left_out(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = argparse.Namespace(lr=0.5, run=Attack())
    rewrite(case, lambda model: model.update(args=bad, more=[{"x": (Quiet(),)}]))
    refused(case, r"would run code: .*exec.*--skip-objects", tmp_path)
    done = import_checkpoint(case, None, tmp_path / "out", ImportOptions(skip_objects=True))
    assert "client_state: 'args', 'more' held objects and is left out" in done.notes
    assert manifest_of(done.path)["client_state"] == {"epoch": 2, "seen": [1, 2]}
    path = case / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Attack()}, path)  # where there have to be values
    with pytest.raises(CheckpointError, match="is not laid out as"):
        import_checkpoint(case, None, tmp_path / "two", ImportOptions(skip_objects=True))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_holds_code_is_refused_and_nothing_runs(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = case / "global_step3" / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=True)
    for value, named in ((Attack(), r"builtins\.exec"), (Quiet(), r"Quiet")):
        torch.save({**model, "client": value}, path)
        refused(case, f"would run code: .*{named}", tmp_path)
    other = case / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save(model, path)
    torch.save({"optimizer_state_dict": {"zero_stage": Attack()}}, other)
    refused(case, r"optim_states\.pt holds more .* would run code: .*exec", tmp_path)
    for path in (path, other):  # noqa: B020
        path.write_bytes(pickle.dumps({"module": Attack()}))
        refused(case, "does not read", tmp_path)
    assert not (tmp_path / "ran").exists()


def rewrite(case: Path, change: Any) -> None:
    path = case / "global_step3" / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=True)
    change(model)
    torch.save(model, path)


def test_what_is_of_another_kind_or_version_is_refused(case: Path, tmp_path: Path) -> None:
    folder = case / "global_step3"
    refused(case, "does not exist", tmp_path, "missing")
    refused(case, "cannot be the tag", tmp_path, "../ds")
    refused(tmp_path, "no file `latest`", tmp_path)
    refused(folder.parent / "global_step3" / "nothing", "no file `latest`", tmp_path)
    for other in ("0.15.4", "0.20.0", "1.0", None):
        rewrite(case, lambda model, other=other: model.update(ds_version=other))
        refused(case, f"written by DeepSpeed {other}.*0.16 to 0.19", tmp_path)
    rewrite(case, lambda model: model.update(ds_version="0.19.9", mp_world_size=2))
    refused(case, "one of 2 parts of a model", tmp_path)
    rewrite(case, lambda model: model.update(mp_world_size=1))
    for name, message in (
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_00-model_states.pt", "pipeline or expert"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "pipeline or expert"),
    ):
        (folder / name).touch()
        refused(case, message, tmp_path)
        (folder / name).unlink()
    second = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.rename(folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    refused(case, "lacks the optim_states file of rank 1", tmp_path)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    refused(case, "written by 2 ranks, and holds the optimizer files of 1", tmp_path)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    refused(case, "no state of an optimizer", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["param_shapes"][0].update({"mid.weight": torch.Size([50, 60])}),
        lambda model: model.update(param_shapes=[{"a": torch.Size([1])}] * 5),
        lambda model: model.update(param_shapes=None),
        lambda model: model.update(param_shapes=7),
        lambda model: model.pop("buffer_names"),
        lambda model: model.update(buffer_names=["no such"]),
    ],
)
def test_files_that_contradict_one_another_are_one_error(
    change: Any, case: Path, tmp_path: Path
) -> None:
    rewrite(case, change)
    refused(case, r"elements, and the files hold|is not laid out as", tmp_path)


def test_an_assignment_by_shapes_that_is_not_the_only_one_asks_for_names(tmp_path: Path) -> None:
    case = RECORDED / "0.19.8" / "0-fp32"
    refused(case, "more than one assignment agrees.*--names", tmp_path)
    for names, message in ((["x"], "1 names were given"), (["x"] * 7, "the module has no x")):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(case, None, tmp_path / "out", ImportOptions(names=names))


def test_the_command_line_imports_and_says_what_it_guessed(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert cli.main(["ckpt", "import", str(case), str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "7 trained parameters, 2 others, 1 buffers" in said and "--optimizer names" in said
    assert cli.main(["ckpt", "import", str(case), "global_step3", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    names = tmp_path / "names"
    names.write_text("\n".join(IN_ORDER) + "\n")
    argv = ["ckpt", "import", str(RECORDED / "0.19.8" / "0-fp32"), str(tmp_path / "zero")]
    assert cli.main([*argv, "--names", str(names), "--optimizer", "Adam"]) == 0
    assert manifest_of(tmp_path / "zero" / "global_step3")["optimizer"]["name"] == "Adam"


# With a real DeepSpeed.


def a_deepspeed() -> str | None:
    """A Python that has it: the one that DEEPSPEED_PYTHON names, or this one."""
    if "DEEPSPEED_PYTHON" in os.environ:
        return os.environ["DEEPSPEED_PYTHON"]
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return None
    return sys.executable


def run_deepspeed(*argv: str) -> None:
    script = [str(a_deepspeed()), "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*script, "--nproc_per_node=2", str(RECORDED / "make.py"), *argv],
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""},
        timeout=400,
    )


REAL = pytest.mark.skipif(
    a_deepspeed() is None, reason="no DeepSpeed here: DEEPSPEED_PYTHON names a Python that has one"
)


@pytest.mark.slow
@pytest.mark.timeout(500)
@REAL
def test_a_real_deepspeed_and_zerort_go_on_alike(tmp_path: Path) -> None:
    cases = [f"{stage}-{dtype}" for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
    run_deepspeed(str(tmp_path), *cases)
    for name in cases:
        imported(tmp_path / name, tmp_path / name / "ours")
        stage, dtype = name.split("-")
        found = ranks.run(2, go_on, str(tmp_path / name / "ours"), 3 - int(stage), dtype)[0]
        compare(found, tmp_path / name, dtype)


@pytest.mark.slow
@pytest.mark.timeout(500)
@REAL
def test_a_universal_checkpoint_of_a_real_deepspeed_is_that_which_it_was_made_of(
    tmp_path: Path,
) -> None:
    for name in ("1-bf16", "2-fp32", "3-fp32-sub", "3-bf16"):
        case = RECORDED / "0.19.8" / name / "global_step3"
        folders = ["--input_folder", case, "--output_folder", tmp_path / name / "global_step3"]
        subprocess.run(
            [
                *(str(a_deepspeed()), "-m", "deepspeed.checkpoint.ds_to_universal"),
                *("--inject_missing_state", *map(str, folders)),
            ],
            check=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""},
            timeout=200,
        )
        made = import_checkpoint(tmp_path / name, None, tmp_path / name / "made").path
        same_contents(made, imported(case.parent, tmp_path / name / "direct"))


@pytest.mark.slow
@pytest.mark.timeout(500)
@REAL
def test_a_real_deepspeed_goes_on_from_an_export_to_its_universal_form(tmp_path: Path) -> None:
    case = RECORDED / "0.19.8" / "2-fp32"
    imported(case, tmp_path / "ours")
    export_checkpoint(
        tmp_path / "ours", None, tmp_path / "u", "deepspeed-universal", ExportOptions(ranks=2)
    )
    run_deepspeed(str(tmp_path), f"from={tmp_path / 'u'}", "1-fp32", "2-fp32", "3-fp32")
    for name, tolerance in (("1-fp32", 2e-6), ("2-fp32", 2e-6), ("3-fp32", 2e-3)):
        # At stage 3 it takes the first group's weight decay for both groups.
        found, expected = recorded(tmp_path / name, "after"), recorded(case, "after")
        for key in IN_ORDER:
            assert torch.allclose(found[key], expected[key], rtol=0, atol=tolerance), (name, key)
