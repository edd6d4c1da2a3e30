"""Where kernels of the reduction run: the only file with streams and events.

On CPU everything happens in the order of the program. On CUDA gradients are packed on the stream
that made them, sums run on one of their own, and no method makes the host wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

__all__ = ["Streams", "record_event", "streams_for"]


class Streams(Protocol):
    """Where kernels of the reduction run."""

    def produced(self) -> None:
        """A gradient was written on the current stream."""

    def before_pack(self, *, shared: bool) -> None:
        """The current stream may now read every gradient that was `produced`, and write into memory
        that sums read.
        """

    def after_pack(self) -> None:
        """Gradients that were packed are about to be freed, to whoever allocates next."""

    def side(self) -> AbstractContextManager[object]:
        """Within, work goes to the stream of sums."""

    def begin(self) -> None:
        """The stream of sums may overwrite the accumulators once the current stream is done with
        them.
        """

    def join(self) -> None:
        """The current stream may now read the accumulators."""


class HostStreams:
    """CPU: everything happens in the order of the program."""

    def produced(self) -> None:
        """In order already."""

    def before_pack(self, *, shared: bool) -> None:
        """In order already."""

    def after_pack(self) -> None:
        """In order already."""

    def side(self) -> AbstractContextManager[object]:
        """The thread itself."""
        return nullcontext()

    def begin(self) -> None:
        """In order already."""

    def join(self) -> None:
        """In order already."""


class CudaStreams:
    """CUDA: gradients are packed on the stream that made the last of them, sums run beside the
    backward.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._producers: dict[int, torch.cuda.Stream] = {}

    def produced(self) -> None:
        """Notes the stream; a backward usually has one, compiled graphs may have more."""
        stream = torch.cuda.current_stream(self._device)
        self._producers[stream.cuda_stream] = stream

    def before_pack(self, *, shared: bool) -> None:
        """The current stream waits for the others, the host for none."""
        current = torch.cuda.current_stream(self._device)
        if shared:
            current.wait_stream(self._side)
        for stream in self._producers.values():
            if stream != current:
                current.wait_stream(stream)

    def after_pack(self) -> None:
        """Memory goes back to the stream that allocated it, which could write into it before it has
        been read.
        """
        current = torch.cuda.current_stream(self._device)
        for stream in self._producers.values():
            if stream != current:
                stream.wait_stream(current)

    def side(self) -> AbstractContextManager[object]:
        """The stream of sums."""
        return torch.cuda.stream(self._side)

    def begin(self) -> None:
        """Orders the next sums after the last optimizer step, and forgets the last pass's
        producers.
        """
        self._producers.clear()
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Orders the optimizer after the sums."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)


def record_event() -> Any:
    """A moment on the current stream, for the trace: a `torch.cuda.Event` with timing."""
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def streams_for(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
