"""Where kernels run: the only room that names a device, a stream or an event."""

from zerort.device.streams import CudaStreams, HostStreams, Streams, record_event, streams_for

__all__ = ["CudaStreams", "HostStreams", "Streams", "record_event", "streams_for"]
