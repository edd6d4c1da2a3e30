"""What tuning has found, as it is logged, printed and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zerort.tune.fit import Line
from zerort.tune.model import Setting
from zerort.tune.wire import Wire

__all__ = ["Findings", "described"]

_AT_ONCE = 1e12
"""Bytes a second that no memory carries."""


@dataclass(frozen=True)
class Findings:
    """Of one run, seconds of a step."""

    wire: Wire
    steps: int
    """That were observed."""
    present: Setting
    predicted: float
    measured: float
    proposed: Setting
    proposed_predicted: float

    @property
    def changes(self) -> bool:
        """Whether something else is proposed than there is."""
        return self.proposed != self.present

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Findings:
        """The inverse of `document`."""
        wire = dict(document["wire"])
        for kind in ("reduce", "gather"):
            wire[kind] = Line(**wire[kind])
        parts = {
            "wire": Wire(**wire),
            "present": Setting(**document["present"]),
            "proposed": Setting(**document["proposed"]),
        }
        return cls(**{**document, **parts})

    def lines(self) -> Iterator[str]:
        """For a log."""
        yield wire_line(self.wire)
        yield (
            f"present: {described(self.present)}; a step predicted {_ms(self.predicted)}, measured "
            f"{_ms(self.measured)} over {self.steps} steps"
        )
        if self.changes:
            gain = 1 - self.proposed_predicted / self.predicted
            yield (
                f"proposed: {described(self.proposed)}; predicted {_ms(self.proposed_predicted)}, "
                f"{gain:.0%} less"
            )
        else:
            yield "proposed: nothing else; no other setting is predicted to be faster"


def wire_line(wire: Wire) -> str:
    """The figures of a wire."""
    if wire.ranks == 1:
        return "one rank sends nothing"
    parts = (("reduce", wire.reduce), ("gather", wire.gather))
    lines = [f"{name} {_ms(line.alpha)}{_carried(line)}" for name, line in parts]
    return f"{wire.ranks} ranks: {', '.join(lines)}, vote {_ms(wire.vote)}"


def _carried(line: Line) -> str:
    """At which rate; none where memory is shared, and a message says only that it is there."""
    return f" + {line.rate / 1e6:.0f} MB/s" if line.rate < _AT_ONCE else " of any size"


def described(setting: Setting) -> str:
    """In words."""
    window = "all" if setting.window is None else str(setting.window)
    wire = "" if setting.wire is None else f", wire {setting.wire}"
    return f"buckets of {setting.bucket_bytes / 2**20:.2f} MiB, window {window}{wire}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{1 if seconds > 0.01 else 2}f} ms"
