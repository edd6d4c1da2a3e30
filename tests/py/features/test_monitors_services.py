"""Monitors that belong to a service, offline, read back from what their packages keep here. Each
in a process of its own, because the packages start threads and processes that outlive a test.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]

LR, LOSS = "Train/Samples/lr", "Train/Samples/train_loss"

PROGRAM = """
import json, sys
import torch
import zerort

{before}
model = torch.nn.Linear(4, 4)
engine, *_ = zerort.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
    config={{"train_micro_batch_size_per_gpu": 2, "{section}": {settings}}},
)
losses = []
for _ in range(3):
    loss = engine(torch.randn(2, 4)).square().mean()
    losses.append(float(loss.detach()))
    engine.backward(loss)
    engine.step()
engine.monitor.write_events([("Validation/loss", 0.25, engine.global_samples)])
engine.destroy()
{after}
print("LOSSES", json.dumps(losses))
"""


def run(
    folder: Path, section: str, settings: Any, *, before: str = "", after: str = ""
) -> list[float]:
    """Trains in `folder`; returns the losses."""
    program = PROGRAM.format(section=section, settings=settings, before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder / "trackio"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    losses: list[float] = json.loads(line.removeprefix("LOSSES "))
    return losses


def records(path: Path) -> list[bytes]:
    """What a file of W&B holds: a log in LevelDB's format, behind a header of 7 bytes."""
    data, at, found, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # too little for a head
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            found.append(part)
            part = b""
    return found


def history(folder: Path) -> list[dict[str, float]]:
    """The steps that W&B kept."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            )
    return found


def test_wandb_keeps_what_was_written_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    losses = run(tmp_path, "wandb", {"enabled": True, "group": "g"})
    kept = history(tmp_path)
    assert [row["_step"] for row in kept] == [2, 4, 6]
    assert [row[LR] for row in kept] == [0.5] * 3
    assert [row[LOSS] for row in kept] == pytest.approx(losses)
    assert kept[-1]["Validation/loss"] == 0.25


def test_a_run_of_wandb_that_is_open_is_gone_on_with_and_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run(
        tmp_path,
        "wandb",
        {"enabled": True},
        before="import wandb; mine = wandb.init(project='mine')",
        after="assert wandb.run is mine; mine.log({'later': 1.0}, step=8); mine.finish()",
    )
    kept = history(tmp_path)
    assert [row["_step"] for row in kept] == [2, 4, 6, 8] and kept[-1]["later"] == 1.0


def test_comet_keeps_what_was_written_in_an_archive(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    settings = {"enabled": True, "online": False, "samples_log_interval": 4, "project": "p"}
    losses = run(tmp_path, "comet", settings)
    (archive,) = tmp_path.rglob("*.zip")
    with zipfile.ZipFile(archive) as files:
        lines = files.read("messages.json").decode().splitlines()
    payloads = [json.loads(line)["payload"] for line in lines]
    metrics = [each["metric"] for each in payloads if "metric" in each]
    found = [(each["metricName"], each["step"], each["metricValue"]) for each in metrics]
    assert [(step, value) for name, step, value in found if name == LOSS] == [
        (2, pytest.approx(losses[0])),
        (6, pytest.approx(losses[2])),
    ]
    assert ("Validation/loss", 6, 0.25) in found


def test_trackio_keeps_what_was_written_in_its_database(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    losses = run(tmp_path, "trackio", {"enabled": True, "project": "p"})
    reading = (
        "import json, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('p')\n"
        "print('LOGS', json.dumps(SQLiteStorage.get_logs('p', run.name)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", reading],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads(done.stdout.split("LOGS ")[1])
    assert [row["step"] for row in logs if LOSS in row] == [2, 4, 6]
    assert [row[LOSS] for row in logs if LOSS in row] == pytest.approx(losses)
    assert any(row.get("Validation/loss") == 0.25 for row in logs)
