"""`tensorboard`: an event file in output_path/job_name, flushed at each boundary."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.monitors import MonitorFolder
from zerort.features.monitors.member import Event, folder_of, required

__all__ = ["TensorBoard"]


class TensorBoard:
    """A file of its own for each run; TensorBoard shows those of a folder as one."""

    def __init__(self, settings: MonitorFolder) -> None:
        folder = folder_of(settings, "tensorboard")
        module = required("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder))

    @staticmethod
    def check(settings: MonitorFolder) -> None:
        """Raises `ConfigError` without the package or the folder."""
        required("torch.utils.tensorboard", "tensorboard", "tensorboard")
        folder_of(settings, "tensorboard")

    def write(self, events: Sequence[Event]) -> None:
        """A scalar each."""
        for name, value, step in events:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
