"""`client_state` of values that JSON lacks, and of objects: read back once before it is kept, and
nothing unpickled unless both sides say so.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import ranks
from saved import Unsynced, config_of, engine_of, manifest_of
from zerort.checkpoint import get_client_state, get_fp32_state_dict, problems
from zerort.checkpoint.encoding import encode
from zerort.errors import CheckpointError

RAN: list[str] = []


@dataclass
class Progress:
    """What a training loop keeps of itself."""

    epoch: int = 3
    seen: dict[str, Any] = field(default_factory=lambda: {"best": torch.arange(3.0)})


class Spy:
    """An object whose reading leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return leave_a_trace, ()


def leave_a_trace() -> None:
    RAN.append("ran")


@pytest.fixture
def engine() -> Any:
    engine = engine_of(config_of(1))
    engine._checkpoints.disk = Unsynced()
    yield engine
    engine.destroy()


SAFE: dict[str, Any] = {
    "a set": {1, 2},
    "bytes": b"\0\xff",
    "keys": {1.5: "a", None: "b", (1, 2): "c", True: "d"},
    "complex": 1 + 2j,
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "deep": [{"x": ({"y": {3}},)}],
}


def test_what_weights_only_reads_back_is_kept_in_an_entry_of_its_own(
    engine: Any, tmp_path: Path
) -> None:
    sparse = torch.eye(3).to_sparse()
    engine.save_checkpoint(tmp_path, "t", client_state={**SAFE, "plain": [1], "sparse": sparse})
    _, found = engine.load_checkpoint(tmp_path)
    assert torch.equal(found.pop("sparse").to_dense(), torch.eye(3))
    assert found == {**SAFE, "plain": [1]} and type(found["a set"]) is set
    kept = manifest_of(tmp_path / "t")["client_state"]
    assert kept["plain"] == [1] and list(kept["bytes"]) == ["$torch"]
    assert kept["deep"][0]["x"]["$tuple"][0]["y"].keys() == {"$torch"}
    # Every other reader has nothing to do with it.
    assert problems(tmp_path, "t") == [] and get_fp32_state_dict(tmp_path, "t")


def test_a_view_among_other_values_does_not_bring_all_that_it_is_a_view_of(
    engine: Any, tmp_path: Path
) -> None:
    large = torch.zeros(1 << 20)
    engine.save_checkpoint(tmp_path, "t", client_state={"parts": {(0, 1): large[:4]}})
    assert (tmp_path / "t" / "rank_0.safetensors").stat().st_size < 1 << 20
    assert engine.load_checkpoint(tmp_path)[1]["parts"][0, 1].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"loops": [0, {"callback": Progress()}]}, r"\['loops'\]\[1\]\['callback'\] is a .*Progr"),
        ({"a": {(1, 2): {"b": Progress()}}}, r"\['a'\]\[\(1, 2\)\]\['b'\] is a .*Progress.*global"),
        ({"a": {Path("x")}}, r"an element of client_state\['a'\] is a pathlib"),
        ({"a": {1.5: [print]}}, r"\['a'\]\[1\.5\]\[0\] is a builtins\.builtin_function"),
    ],
)
def test_an_object_is_an_error_with_its_path_and_the_way_out(
    value: dict[str, Any], message: str, engine: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message + r".*allow_pickle=True to save_checkpoint"):
        engine.save_checkpoint(tmp_path, "t", client_state=value)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_cannot_be_pickled_is_an_error_with_its_path_too(
    engine: Any, tmp_path: Path
) -> None:
    value = {"a": {1.5: {"b": lambda: None}}}
    with pytest.raises(CheckpointError, match=r"client_state\['a'\]\[1\.5\]\['b'\].*: convert it"):
        engine.save_checkpoint(tmp_path, "t", client_state=value, allow_pickle=True)
    assert list(tmp_path.iterdir()) == []


def test_objects_need_allow_pickle_at_save_and_at_load(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(
        tmp_path, "t", client_state={"a": [Progress()], "b": {1}}, allow_pickle=True
    )
    kept = manifest_of(tmp_path / "t")["client_state"]
    assert list(kept["a"][0]) == ["$pickle"] and list(kept["b"]) == ["$torch"]
    for more in ({}, {"load_module_only": True}, {"fallback": True}):
        with pytest.raises(CheckpointError, match=r"client_state\['a'\]\[0\].*allow_pickle=True"):
            engine.load_checkpoint(tmp_path, **more)
    assert get_client_state(tmp_path, allow_pickle=True)["a"][0].epoch == 3
    _, found = engine.load_checkpoint(tmp_path, allow_pickle=True)
    assert found["a"][0].epoch == 3 and found["a"][0].seen["best"].tolist() == [0, 1, 2]
    assert problems(tmp_path, "t") == [] and get_fp32_state_dict(tmp_path, "t")


def test_nothing_runs_without_allow_pickle(engine: Any, tmp_path: Path) -> None:
    RAN.clear()
    engine.save_checkpoint(tmp_path, "t", client_state={"a": Spy()}, allow_pickle=True)
    assert RAN  # it was read back
    RAN.clear()
    with pytest.raises(CheckpointError, match="allow_pickle"):
        engine.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        get_client_state(tmp_path)
    assert RAN == []
    # An attacker calls it what may be read, or puts it where no other tag is known.
    name = manifest_of(tmp_path / "t")["client_state"]["a"]["$pickle"]
    forge(tmp_path / "t", lambda m: m["client_state"].update(a={"$torch": name}))
    with pytest.raises(CheckpointError, match=r"client_state\['a'\] does not read back: .*Unsupp"):
        engine.load_checkpoint(tmp_path, "t")
    for tag in ("$torch", "$pickle"):
        forge(
            tmp_path / "t",
            lambda m, tag=tag: m.update(
                client_state={}, extra_state={}, features={"x": {tag: name}}
            ),
        )
        with pytest.raises(CheckpointError, match="does not read"):
            engine.load_checkpoint(tmp_path, "t", allow_pickle=True)
    assert RAN == []


def forge(folder: Path, change: Any) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    body = json.dumps(manifest).encode()
    head = {"format": 2, "xxh3_128": xxhash.xxh3_128_hexdigest(body)}
    text = json.dumps(head)[:-1].encode() + b', "manifest":\n' + body + b"\n}\n"
    (folder / "manifest.json").write_bytes(text)


def test_an_object_that_does_not_read_back_is_no_damage_and_changes_nothing(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.save_checkpoint(tmp_path, "older")
    engine.save_checkpoint(tmp_path, "t", client_state={"a": Progress()}, allow_pickle=True)
    monkeypatch.delattr(f"{__name__}.Progress")
    before = engine.module.exit.weight.detach().clone()
    with torch.no_grad():
        engine.module.exit.weight.add_(1)
    with pytest.raises(CheckpointError, match=r"client_state\['a'\] does not read back: Attri"):
        engine.load_checkpoint(tmp_path, allow_pickle=True, fallback=True)
    assert torch.equal(engine.module.exit.weight, before + 1)


def differ(rank: int, world: int, folder: str) -> list[Any]:
    engine = engine_of(config_of(1))
    engine.save_checkpoint(folder, client_state={"mine": {rank}})
    found = engine.load_checkpoint(folder)[1]
    told = []
    for state in ({"a": Progress()}, {}):  # rank 0's alone is kept, and it is all ranks' error
        try:
            engine.save_checkpoint(folder, "bad", client_state=state if rank == 0 else {})
            told.append("saved")
        except CheckpointError as error:
            told.append(str(error))
    for call in (engine.save_checkpoint, engine.load_checkpoint, engine.save_16bit_model):
        try:
            call("" if rank == 1 else folder)
            told.append("no error")
        except CheckpointError as error:
            told.append(str(error))
    return [found, told]


def test_rank_0s_is_kept_and_its_failure_is_everyones(tmp_path: Path) -> None:
    one, other = ranks.run(2, differ, str(tmp_path))
    assert one == other and one[0] == {"mine": {0}}
    bad, good, *empty = one[1]
    assert "Progress" in bad and good == "saved"
    for message in empty:
        assert "rank 1" in message and "is empty: name a folder, or '.'" in message


def test_only_client_state_has_these_forms() -> None:
    with pytest.raises(CheckpointError, match=r"builtins\.set"):
        encode({1}, "scheduler", {})
    assert pickle.loads(pickle.dumps(Progress())).epoch == 3  # what is refused above can be pickled
