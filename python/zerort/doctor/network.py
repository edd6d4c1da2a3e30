"""Interfaces, the address that gloo and NCCL will choose, ports, and what the environment makes
ranks do.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from zerort.doctor.finding import Finding, Machine, note, ok, problem

__all__ = ["environment", "gloo", "interfaces", "nccl_interfaces", "ports", "time_outs"]

_USUAL_PORT = 29500
_GET_ADDRESS = 0x8915  # SIOCGIFADDR, netdevice(7)

Addresses = Mapping[str, Sequence[str]]


def addresses(machine: Machine) -> dict[str, list[str]]:
    """Of each interface of this host, those of IPv4 first."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in found:
            address = _v4(probe, name)
            found[name] = [] if address is None else [address]
    for line in (machine.text("proc/net/if_inet6") or "").splitlines():
        digits, *_, name = line.split()
        longer = ipaddress.IPv6Address(int(digits, 16))
        if name in found and not longer.is_link_local:
            found[name].append(str(longer))
    return found


def _v4(probe: socket.socket, name: str) -> str | None:
    try:
        import fcntl  # noqa: PLC0415 (there is none on Windows)

        request = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24])
    except (ImportError, OSError):  # none, or another system
        return None


def interfaces(machine: Machine) -> Iterator[Finding]:
    """Which there are, with their addresses."""
    yield listed(addresses(machine))


def listed(found: Addresses) -> Finding:
    """All of them in a line."""
    rows = [f"{name} {', '.join(held)}" for name, held in found.items() if held]
    if not rows:
        return problem(
            "interfaces", "none has an address", "bring the loopback up: ip link set lo up"
        )
    outside = [a for held in found.values() for a in held if not _is_loopback(a)]
    if not outside:
        return note("interfaces", f"{'; '.join(rows)}: this host reaches no other")
    return ok("interfaces", "; ".join(rows))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def gloo(machine: Machine) -> Iterator[Finding]:
    """Where its ranks will listen: GLOO_SOCKET_IFNAME, else what the host's name resolves to."""
    yield gloos(machine, addresses(machine), _resolved(machine.hostname))


def gloos(machine: Machine, found: Addresses, resolved: Sequence[str]) -> Finding:
    """Of interfaces with their addresses, and those that the host's name has."""
    named = machine.environ.get("GLOO_SOCKET_IFNAME")
    there = ", ".join(name for name, held in found.items() if held)
    if named:
        missing = [name for name in named.split(",") if not found.get(name)]
        if missing:
            return problem(
                "gloo",
                f"GLOO_SOCKET_IFNAME={named}: {', '.join(missing)} is no interface with an address",
                f"one of {there}, or unset it",
            )
        chosen = found[named.split(",")[0]][0]
        text = f"{chosen}, by GLOO_SOCKET_IFNAME={named}"
    else:
        own = {address for held in found.values() for address in held}
        chosen = next((a for a in resolved if a in own or _is_loopback(a)), "127.0.0.1")
        text = f"{chosen}, which {machine.hostname} resolves to"
        if chosen not in resolved:
            text = f"127.0.0.1, for the name {machine.hostname} resolves to none of this host's"
    if not _is_loopback(chosen):
        return ok("gloo", text)
    outside = [n for n, held in found.items() if held and not _is_loopback(held[0])]
    remedy = f"GLOO_SOCKET_IFNAME={' or '.join(outside)}"
    if not outside:
        return note("gloo", text, "this host reaches no other")
    if _spans_hosts(machine):
        return problem("gloo", f"{text}: ranks of other hosts cannot reach it", remedy)
    if named or any(_is_loopback(a) for a in resolved):
        return ok("gloo", f"{text}; for several hosts {remedy}")
    return note("gloo", text, f"{remedy}; or name this host in /etc/hosts")


def _resolved(hostname: str) -> list[str]:
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(row[4][0]).split("%")[0] for row in found))


def _spans_hosts(machine: Machine) -> bool:
    world, local = machine.number("WORLD_SIZE"), machine.number("LOCAL_WORLD_SIZE")
    return world is not None and local is not None and world > local


def nccl_interfaces(machine: Machine) -> Iterator[Finding]:
    """What NCCL_SOCKET_IFNAME leaves of the interfaces: prefixes, `^` for all but these, `=` for
    whole names.
    """
    named = machine.environ.get("NCCL_SOCKET_IFNAME")
    if named:
        yield matched(named, addresses(machine))


def matched(named: str, found: Addresses) -> Finding:
    """Those of `found` with an address that are left."""
    excludes, text = named.startswith("^"), named.lstrip("^")
    whole, wanted = text.startswith("="), text.lstrip("=").split(",")
    left = [
        name
        for name, held in found.items()
        if held
        and excludes
        != any(name == want if whole else name.startswith(want) for want in wanted if want)
    ]
    if left:
        return ok("NCCL's sockets", f"{', '.join(left)}, by NCCL_SOCKET_IFNAME={named}")
    return problem(
        "NCCL's sockets",
        f"NCCL_SOCKET_IFNAME={named} leaves no interface with an address",
        f"one of {', '.join(name for name, held in found.items() if held)}, or unset it",
    )


def environment(machine: Machine) -> Iterator[Finding]:
    """What RANK, WORLD_SIZE and MASTER_* make of a process."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: machine.environ[name] for name in names if name in machine.environ}
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start the job with torchrun, or unset RANK to run one process"
    if "RANK" not in given:
        rest = f" ({text}, without effect)" if given else ""
        yield ok("environment", f"no RANK: a process trains alone{rest}")
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR") if not given.get(name)]
    rank, world = machine.number("RANK"), machine.number("WORLD_SIZE")
    if missing:
        yield problem("environment", f"{text}, and {' and '.join(missing)} not set", remedy)
    elif rank is None or world is None or rank >= world:
        yield problem("environment", f"{text}: RANK has to be a number below WORLD_SIZE", remedy)
    elif not _resolved(given["MASTER_ADDR"]):
        yield problem(
            "environment",
            f"MASTER_ADDR={given['MASTER_ADDR']} does not resolve on this host",
            "give the address of the host of rank 0",
        )
    else:
        yield ok("environment", f"rank {rank} of {world}, which meet at {given['MASTER_ADDR']}")


def ports(machine: Machine) -> Iterator[Finding]:
    """Whether one is free to listen at, and the one that rank 0 will take."""
    free = _listens(0)
    if free is None:
        yield problem("ports", "none is free to listen at", "look for what has them: ss -tln")
        return
    port = machine.number("MASTER_PORT") or _USUAL_PORT
    agent = machine.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent:
        yield ok("ports", f"{free} is free; torchrun's agent holds {port}")
    elif _listens(port) is not None:
        yield ok("ports", f"{free} is free, and so is {port}")
    elif machine.environ.get("RANK") == "0":
        yield problem("ports", f"MASTER_PORT={port} is taken", f"MASTER_PORT={free}")
    else:
        yield note(
            "ports",
            f"{port}, torchrun's usual one, is taken",
            f"torchrun --master_port={free}, or --standalone",
        )


def _listens(port: int) -> int | None:
    """The port, where one may listen at it."""
    if port > 0xFFFF:
        return None
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return None
        return int(probe.getsockname()[1])


def time_outs(machine: Machine) -> Iterator[Finding]:
    """What NCCL does with a collective that does not end; the engine's own is in its file."""
    if machine.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        yield problem(
            "time-outs",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING=0: a rank waits for ever for one that is gone",
            "unset it",
        )
        return
    beat = machine.number("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    if beat is not None and beat < 60:
        yield note(
            "time-outs",
            f"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={beat}: a slow step ends the process",
            "unset it, or give more than a step takes",
        )
        return
    yield ok("time-outs", "zerort.timeout of the configuration, 300 s where it has none")
