"""The same where hosts are several, or copies of the model state: figures are those that four ranks
take and send, of which some between hosts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_forecast import ROOM, SMALL, Printed, config, near

import forecasted
import ranks
from forecasted import Counts
from zerort.cli import main

WORLD = 4
NESTED: dict[str, Any] = {"zerort": {"hierarchy": {"inner": 2}, "transport": "gloo"}}
GLOO: dict[str, Any] = {"zerort": {"transport": "gloo"}}
INT8 = {"zerort": NESTED["zerort"] | {"wire": "int8", "wire_error_feedback": True}}
CASES: dict[str, dict[str, Any]] = {
    "stage 0, hosts": config(0, "fp32") | NESTED,
    "stage 1, copies": config(1, mics_shard_size=2) | GLOO,
    "stage 2, hosts, int8, feedback": config(2) | INT8,
    "stage 3, hosts that keep": config(3, gas=2, zero_hpz_partition_size=2, **ROOM) | GLOO,
    "stage 3, hosts": config(3, gas=2, **ROOM) | NESTED,
}
SLOW = ["stage 3, hosts"]


def count_all(rank: int, world: int, quick: bool) -> dict[str, Counts]:
    return {
        name: forecasted.count(rank, forecasted.make, settings, None)
        for name, settings in CASES.items()
        if (name in SLOW) != quick
    }


@ranks.once(None)
def counted(quick: bool) -> list[dict[str, Counts]]:
    return ranks.run(WORLD, count_all, quick, timeout=100)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_hops_are_counted_one_by_one(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CASES[name]))
    line = ["config", str(path), "--model", "forecasted:make", "--world", str(WORLD)]
    assert main([*line, "--device", "cpu"]) == 0
    say = Printed(capsys.readouterr().out, CASES[name]["zero_optimization"]["stage"])
    gathered = say("on the device", "gathered, at most")
    crossing = say("sent in a step", "of it between hosts")
    crossing += say("sent in a step", "of it between copies")
    for rows in counted(name not in SLOW):
        found = rows[name]
        assert near(found.device, say("on the device", "together") - gathered, SMALL)
        sent = say("sent in a step", "gradients") + say("sent in a step", "parameters")
        assert near(found.sent, sent), (found.sent, sent)
        assert found.crossing and near(found.crossing, crossing), (found.crossing, crossing)
    kept = say("on the device", "kept for its host")
    assert bool(kept) == ("keep" in name)


def test_hosts_that_are_named_are_those_that_reduce(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    line = ["config", str(path), "--numel", "1e9", "--world", "8", "--device", "cpu", "--json"]
    assert main([*line, "--hosts", "2"]) == 0
    one = json.loads(capsys.readouterr().out)["forecasts"][2]
    assert (one["hosts_of_a_copy"], one["ranks_of_a_host"]) == (2, 4)
    between = one["sent_between_hosts_per_step"]
    assert abs(between - 2 * 4e9 / 4 / 2) < 0.01 * between  # (H-1)/H of M/L, each way
    assert main([*line, "--hosts", "3"]) == 2
    assert "the 8 ranks are not equally many on each" in capsys.readouterr().err
