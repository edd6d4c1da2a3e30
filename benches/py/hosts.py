"""Hosts on one machine: network namespaces with an address each, behind links of a given rate.

```text
 host 0 ── eth0 ──┐
 host 1 ── eth0 ──┤ switch, a bridge in a namespace of its own
 host 2 ── eth0 ──┘
```

Each link carries its rate in either direction (`tc tbf` at both ends). What it guarantees: nothing
of this process's own network is touched, and all that was made is taken down with the context, also
on Ctrl-C and SIGTERM; what a killed run has left is removed by the next. It needs root and
iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Host", "hosts", "why_not"]

_PREFIX = "zerort-bench-"
_NETWORK = "10.213.7"


class Host:
    """One namespace; `address` is its own in the hosts' network."""

    interface = "eth0"

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """Runs a command there, in a session of its own; its input is a pipe that ends with this
        process.
        """
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def why_not() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if not Path("/proc/self/ns/net").exists():
        return "network namespaces are Linux's"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with hosts(1, 1_000_000_000):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def hosts(count: int, bits: int) -> Iterator[list[Host]]:
    """`count` hosts, each behind a link of `bits` a second. Raises `CalledProcessError`."""
    _remove_left()
    base = f"{_PREFIX}{os.getpid()}"
    names = [f"{base}-{index}" for index in range(count)]
    switch = f"{base}-switch"
    with _interruptible():
        try:
            _make_switch(switch)
            for index, name in enumerate(names):
                _make_host(name, switch, index, bits)
            yield [Host(name, _address(index)) for index, name in enumerate(names)]
        finally:
            for name in (*names, switch):
                _ip("netns", "del", name, check=False)


def _make_switch(switch: str) -> None:
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge", "up")


def _make_host(name: str, switch: str, index: int, bits: int) -> None:
    port = f"port{index}"
    _ip("netns", "add", name)
    _ip(
        *("link", "add", Host.interface, "netns", name),
        *("type", "veth", "peer", "name", port, "netns", switch),
    )
    _ip("-n", name, "addr", "add", f"{_address(index)}/24", "dev", Host.interface)
    _ip("-n", switch, "link", "set", port, "master", "bridge")
    for where, device in ((name, "lo"), (name, Host.interface), (switch, port)):
        _ip("-n", where, "link", "set", device, "up")
    # A millisecond is what a link gives away for nothing after a pause. A larger piece than that
    # would be cut into packets of 1.5 KB, each of them work for a core: at 1 Gbit two cores were
    # busy with nothing else, and the link carried less than half of its rate both ways at once.
    burst = max(16 << 10, bits // 8_000)
    piece = str(min(65536, burst * 7 // 8))
    for where, device in ((name, Host.interface), (switch, port)):
        _ip("-n", where, "link", "set", device, "gso_max_size", piece, "gro_max_size", piece)
        shape = ("tbf", "rate", f"{bits}bit", "burst", str(burst), "latency", "50ms")
        _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", *shape)


def _address(index: int) -> str:
    return f"{_NETWORK}.{index + 1}"


def _remove_left() -> None:
    """Namespaces of runs that were killed."""
    listed = _ip("netns", "list", check=False).split()
    for name in (word for word in listed if word.startswith(_PREFIX)):
        owner = name.removeprefix(_PREFIX).split("-")[0]
        if owner != str(os.getpid()) and not Path(f"/proc/{owner}").exists():
            _ip("netns", "del", name, check=False)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within, SIGTERM leaves by an exception, as Ctrl-C does."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = None
    with suppress(ValueError):  # not the main thread, which alone hears signals
        before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _ip(*words: str, check: bool = True) -> str:
    return _run("ip", *words, check=check)


def _run(*words: str, check: bool = True) -> str:
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout
