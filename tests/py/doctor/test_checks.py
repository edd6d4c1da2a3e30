"""Each check of `zerort doctor` says ok, note and problem where it should, of a made-up machine."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from zerort.doctor import limits, network, software
from zerort.doctor.devices import devices
from zerort.doctor.finding import Finding, Level, Machine, looked_into, note, ok, problem
from zerort.doctor.job import merged

OK, NOTE, PROBLEM = Level
GIB = 1 << 30
HOST = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.7"], "docker0": []}


def machine(root: Path = Path("/nowhere"), files: Any = (), **given: Any) -> Machine:
    for path, text in dict(files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Machine(**{"environ": {}, "root": root, "hostname": "here", **given})


def levels(found: Iterable[Finding]) -> list[Level]:
    """All that is not ok says what to do, or nothing can be done."""
    rows = list(found)
    assert all(row.text and (row.remedy or row.level is not PROBLEM) for row in rows)
    return [row.level for row in rows]


# The system


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [(8 * GIB, 7 * GIB, OK), (64 << 20, 64 << 20, NOTE), (8 * GIB, 1 << 20, PROBLEM)],
)
def test_shared_memory(total: int, free: int, level: Level, tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert levels(limits.shared_memory(machine(tmp_path, space=lambda _: (total, free)))) == [level]


def test_no_shared_memory_is_a_note(tmp_path: Path) -> None:
    assert levels(limits.shared_memory(machine(tmp_path))) == [NOTE]


@pytest.mark.parametrize(
    ("files", "locked", "found"),
    [
        ((-1, -1), (-1, -1), [OK, OK]),
        ((20000, 20000), (1 << 30, -1), [OK, OK]),
        ((1024, 4096), (65536, -1), [NOTE, NOTE]),
        ((64, 64), (0, 0), [PROBLEM, NOTE]),
        (None, None, []),
    ],
)
def test_limits_of_a_process(files: Any, locked: Any, found: list[Level]) -> None:
    given = {"RLIMIT_NOFILE": files, "RLIMIT_MEMLOCK": locked}
    assert levels(limits.limits(machine(limits=lambda name: given[name]))) == found


def test_the_remedy_of_a_limit_is_within_the_hard_one() -> None:
    given = {"RLIMIT_NOFILE": (1024, 2048), "RLIMIT_MEMLOCK": None}
    (found,) = limits.limits(machine(limits=lambda name: given[name]))
    assert found.remedy == "ulimit -n 2048"
    given["RLIMIT_NOFILE"] = (1024, 1024)
    (found,) = limits.limits(machine(limits=lambda name: given[name]))
    assert "limits.conf" in found.remedy


def meminfo(total: int, free: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {total >> 10} kB\nMemAvailable: {free >> 10} kB\n"}


def test_memory_of_a_host(tmp_path: Path) -> None:
    assert levels(limits.memory(machine(tmp_path))) == [NOTE]
    assert levels(limits.memory(machine(tmp_path, meminfo(64 * GIB, 60 * GIB)))) == [OK]
    assert levels(limits.memory(machine(tmp_path, meminfo(64 * GIB, 2 * GIB)))) == [PROBLEM]


@pytest.mark.parametrize("folder", ["sys/fs/cgroup", "sys/fs/cgroup/pods/mine"])
def test_memory_of_a_container(folder: str, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": f"0::{folder.removeprefix('sys/fs/cgroup') or '/'}\n",
        f"{folder}/memory.max": str(8 * GIB),
        f"{folder}/memory.current": str(GIB),
        f"{folder}/memory.events": "oom 3\noom_kill 0\n",
        **meminfo(64 * GIB, 60 * GIB),
    }
    (found,) = limits.memory(machine(tmp_path, files))
    assert found.level is OK and found.text.startswith("7.0 GiB of 8.0 GiB, the limit of this")
    files[f"{folder}/memory.current"] = str(8 * GIB - (100 << 20))
    files[f"{folder}/memory.events"] = "oom 3\noom_kill 2\n"
    assert levels(limits.memory(machine(tmp_path, files))) == [PROBLEM, NOTE]
    files[f"{folder}/memory.max"] = "max"
    assert levels(limits.memory(machine(tmp_path, files))) == [OK, NOTE]


def test_the_limit_of_an_older_container(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB), **meminfo(64 * GIB, GIB // 99)}
    (found,) = limits.memory(machine(tmp_path, files))
    assert found.level is PROBLEM and "1.0 GiB" in found.text


def test_cpus_of_a_container_and_threads_of_its_ranks(tmp_path: Path) -> None:
    assert levels(limits.crowded(machine(tmp_path), 16, 16)) == [OK]
    quota = {"sys/fs/cgroup/cpu.max": "400000 100000"}
    (found,) = limits.crowded(machine(tmp_path, quota), 16, 16)
    assert (found.level, found.remedy) == (NOTE, "OMP_NUM_THREADS=4")
    ranks = machine(environ={"LOCAL_WORLD_SIZE": "8"})
    (found,) = limits.crowded(ranks, 16, 16)
    assert (found.level, found.remedy) == (NOTE, "OMP_NUM_THREADS=2")
    assert levels(limits.crowded(ranks, 16, 2)) == [OK]


# The network


def test_interfaces_and_their_addresses() -> None:
    assert network.listed(HOST).level is OK and "eth0 192.0.2.7" in network.listed(HOST).text
    assert network.listed({"lo": ["127.0.0.1"]}).level is NOTE
    assert network.listed({"lo": []}).level is PROBLEM
    real = network.addresses(machine(Path("/")))
    assert "127.0.0.1" in real.get("lo", []) or "lo" not in real


@pytest.mark.parametrize(
    ("environ", "resolved", "level", "said"),
    [
        ({}, ["192.0.2.7"], OK, "192.0.2.7, which here resolves to"),
        ({}, ["127.0.1.1"], OK, "GLOO_SOCKET_IFNAME=eth0"),
        ({}, ["198.51.100.1"], NOTE, "resolves to none of this host's"),
        ({}, [], NOTE, "resolves to none of this host's"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["127.0.1.1"], PROBLEM, "cannot reach it"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["192.0.2.7"], OK, "192.0.2.7"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, [], OK, "192.0.2.7, by GLOO_SOCKET_IFNAME=eth0"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ["192.0.2.7"], PROBLEM, "ib0 is no interface"),
        ({"GLOO_SOCKET_IFNAME": "docker0"}, [], PROBLEM, "docker0 is no interface with an address"),
    ],
)
def test_where_gloo_will_listen(
    environ: dict[str, str], resolved: list[str], level: Level, said: str
) -> None:
    found = network.gloos(machine(environ=environ), HOST, resolved)
    assert found.level is level and said in found.text
    assert (found.level is OK) == (not found.remedy)


@pytest.mark.parametrize(
    ("named", "left"),
    [
        ("eth", "eth0"),
        ("=eth0", "eth0"),
        ("=eth", None),
        ("^lo,docker", "eth0"),
        ("ib", None),
        ("docker", None),
    ],
)
def test_what_nccls_variable_leaves(named: str, left: str | None) -> None:
    found = network.matched(named, HOST)
    assert found.level is (PROBLEM if left is None else OK)
    assert left is None or found.text.startswith(f"{left}, by")


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, OK),
        ({"MASTER_ADDR": "somewhere"}, OK),
        ({"RANK": "0"}, PROBLEM),
        ({"RANK": "0", "WORLD_SIZE": "2"}, PROBLEM),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, PROBLEM),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, PROBLEM),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"}, PROBLEM),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, OK),
    ],
)
def test_what_the_environment_makes_of_a_process(environ: dict[str, str], level: Level) -> None:
    assert levels(network.environment(machine(environ=environ))) == [level]


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        free = network.ports(machine(environ={"MASTER_PORT": port}))
        assert levels(free) == [NOTE]
        rank0 = {"MASTER_PORT": port, "RANK": "0"}
        assert levels(network.ports(machine(environ=rank0))) == [PROBLEM]
        agents = {**rank0, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert levels(network.ports(machine(environ=agents))) == [OK]
    assert levels(network.ports(machine(environ={"MASTER_PORT": port}))) == [OK]


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("OTHER", "1", OK),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "600", OK),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "5", NOTE),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", PROBLEM),
    ],
)
def test_time_outs(name: str, value: str, level: Level) -> None:
    assert levels(network.time_outs(machine(environ={name: value}))) == [level]


# Software and devices


@pytest.mark.parametrize(
    ("loaded", "level"),
    [(None, OK), ((2, 27, 5), OK), ((2, 27, 3), NOTE), ((2, 30, 1), NOTE), ((2, 18, 5), PROBLEM)],
)
def test_the_nccl_that_is_loaded(loaded: Any, level: Level) -> None:
    assert levels(software.compared((2, 27, 5), loaded)) == [level]


def test_a_number_of_nccls_is_read() -> None:
    assert software.parts(22904) == (2, 29, 4) and software.parts(2804) == (2, 8, 4)


class Cuda:
    """Devices that are not there."""

    def __init__(self, count: int, free: float = 0.9, peers: bool = True) -> None:
        self.count, self.free, self.peers = count, free, peers

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return int(80 * GIB * self.free), 80 * GIB

    def get_device_name(self, index: int) -> str:
        return "X100"

    def can_device_access_peer(self, a: int, b: int) -> bool:
        return self.peers or (a, b) == (0, 1)


def test_devices_and_peer_access() -> None:
    assert levels(devices(machine(), Cuda(1))) == [OK]
    assert levels(devices(machine(), Cuda(2))) == [OK, OK, OK]
    *_, apart = devices(machine(), Cuda(2, peers=False))
    assert apart.level is NOTE and "1-0" in apart.text and "0-1" not in apart.text
    assert levels(devices(machine(), Cuda(1, free=0.2))) == [NOTE]
    shared = machine(environ={"LOCAL_WORLD_SIZE": "2"})
    assert levels(devices(shared, Cuda(1))) == [OK, NOTE]


def test_no_device(tmp_path: Path) -> None:
    assert levels(devices(machine(tmp_path), Cuda(0))) == [OK]
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    assert levels(devices(machine(tmp_path), Cuda(0))) == [PROBLEM]
    hidden = machine(tmp_path, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert levels(devices(hidden, Cuda(0))) == [NOTE]


@pytest.mark.parametrize(
    ("there", "level"),
    [({}, OK), ({"is_gloo_available": False}, PROBLEM), ({"is_available": False}, PROBLEM)],
)
def test_back_ends(there: dict[str, bool], level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in there.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda answer=answer: answer)
    assert levels(software.back_ends(machine())) == [level]


# Findings together


def test_a_check_that_raises_is_a_line_and_the_others_go_on() -> None:
    def broken(at: Machine) -> Iterable[Finding]:
        yield ok("broken", "half of it")
        raise OSError(5, "the disk\nis gone")

    found = list(looked_into({"broken": broken, "fine": lambda at: [ok("fine", "x")]}, machine()))
    assert [(one.check, one.level) for one in found] == [("broken", NOTE), ("fine", OK)]
    assert "OSError: [Errno 5] the disk is gone" in found[0].text


def test_rank_0_says_what_is_wrong_elsewhere_and_once() -> None:
    by_rank = [
        [ok("a", "mine"), note("b", "1 MiB", "more"), problem("c", "here", "mend")],
        [ok("a", "theirs"), note("b", "2 MiB", "more")],
        [ok("a", "theirs"), note("b", "3 MiB", "more"), problem("d", "there", "mend")],
    ]
    assert [(one.check, one.text) for one in merged(by_rank)] == [
        ("a", "mine"),
        ("b", "1 MiB"),
        ("c", "rank 0: here"),
        ("d", "rank 2: there"),
    ]
