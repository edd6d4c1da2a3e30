"""The engine's checkpoints: what `save_checkpoint` and `load_checkpoint` do, behind the engine's
thin methods.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from zerort.checkpoint.background import Background, hurry
from zerort.checkpoint.consolidated import consolidated, weights_of
from zerort.checkpoint.copies import bytes_of
from zerort.checkpoint.files import Disk
from zerort.checkpoint.load import Load
from zerort.checkpoint.match import LoadOptions
from zerort.checkpoint.prune import Pruned, Run
from zerort.checkpoint.record import LoadRecord
from zerort.checkpoint.save import Save, SaveOptions, agreed_tag
from zerort.checkpoint.snapshot import KeepOptions, Snapshot, collect, planned
from zerort.checkpoint.state import EngineState, aliases
from zerort.checkpoint.tags import folder_of
from zerort.checkpoint.weights import save_weights
from zerort.errors import CheckpointError
from zerort.mesh import Consensus, Control, Patience
from zerort.trace import TraceSink
from zerort.wire import WireState

__all__ = ["Checkpoints", "SavePolicy"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class SavePolicy:
    """What the configuration decides about every save and load."""

    tag_validation: Literal["WARN", "IGNORE", "FAIL"]
    timeout: float
    """Seconds that a rank may write or read nothing."""
    asynchronous: bool = False
    """Saves are written beside training unless a call says otherwise."""
    patience: timedelta = timedelta(minutes=5)
    """With peers, in the votes of a save beside training."""


class Checkpoints:
    """Saves and loads one engine, and remembers which tag it came from, so that no pruning deletes
    that one.
    """

    def __init__(self, state: EngineState, policy: SavePolicy, sink: TraceSink) -> None:
        self.state = state
        self.disk = Disk()
        comm = state.comm
        self.background = Background(comm.control, comm.device, policy.patience, sink)
        if policy.asynchronous and state.copies.world == 1:
            self.background.open()
        self._prepares = policy.asynchronous and state.copies.world == 1
        """Whether memory for copies is still to be got."""
        self._sink = sink
        self.bytes_read = 0
        """By this rank in the last load."""
        self.last_load: LoadRecord | None = None
        self.of_wire: tuple[WireState | None, float] = None, 1.0
        """What encoders of gradients had kept in the last load, and by how much gradients are
        larger now.
        """
        self._policy = policy
        self._agreement = Consensus(state.comm.control, CheckpointError, alike=True)
        self._loaded: dict[Path, str] = {}
        self._run = Run()
        self._report = _Report()

    def save(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None,
        client_state: dict[str, Any],
        options: SaveOptions,
        *,
        exclude_frozen: bool,
        asynchronous: bool = False,
    ) -> bool:
        """All ranks. See `Engine.save_checkpoint`."""
        self.settle("save_checkpoint()")
        copies = self.state.copies
        self.state.take_writes()

        def save() -> None:
            self._save(
                save_dir,
                tag,
                client_state,
                options,
                exclude_frozen=exclude_frozen,
                asynchronous=asynchronous and copies.world == 1,
            )

        with self._sink.range("save"):
            self._save_once("save a checkpoint", save)
        return True

    def _save_once(self, what: str, save: Callable[[], None]) -> None:
        """The first copy of the model state saves, and the others wait for it."""
        if self.state.copies.world == 1:
            save()
        else:
            self._of_copies(what).first("cannot save", save)

    def _of_copies(self, what: str) -> Consensus:
        """Of the ranks that hold one shard."""
        patience = Patience(what, self._policy.timeout, "zerort.checkpoint.timeout")
        control = self.state.copies.control
        return Consensus(control, CheckpointError, alike=True, patience=patience)

    def _save(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None,
        client_state: dict[str, Any],
        options: SaveOptions,
        *,
        exclude_frozen: bool,
        asynchronous: bool,
    ) -> None:
        comm = self.state.comm
        found = self._agreement.gather(
            "cannot save", lambda: (folder_of(save_dir, "save_dir"), asynchronous)
        )
        folder, asynchronous = found[comm.rank][0], found[0][1]  # rank 0 says how
        wanted = tag if tag is not None else f"global_step{self.state.counters.global_steps}"
        name = agreed_tag(comm, wanted, self._policy.tag_validation)
        loaded = frozenset(
            loaded for where, loaded in self._loaded.items() if where == folder.resolve()
        )
        what = f"checkpoint {folder / name}"

        def snap() -> Snapshot:
            self._refuse_half_changed()
            kept = KeepOptions(exclude_frozen, options.allow_pickle)
            return collect(self.state, client_state, kept)

        snapshot = self._agreement.agree(f"{what} was not saved", snap)
        options = replace(options, keep=loaded, run=self._run, timeout=self._policy.timeout)
        disk, report = self.disk, self._report

        def write(
            control: Control, snapshot: Snapshot, rest: Callable[[], None] | None = None
        ) -> None:
            saving = Save(control, disk, folder, name, options)
            saving.run(snapshot, rest)
            report(folder, options.keep_last, saving.pruned)

        if not asynchronous or not self.background.begin(what, snapshot, write):
            hurry()
            write(comm.control, snapshot)

    def settle(self, call: str) -> None:
        """All ranks, before `call`. See `Background.settle`."""
        self.background.settle(call)

    def stepped(self, unsaved: tuple[int, ...]) -> None:
        """A micro-batch is over; ranks `unsaved` have said in its vote that a save has failed.
        Raises `CheckpointError` if there are any.
        """
        if self._prepares and self.state.counters.global_steps:
            self._prepares = False
            with suppress(CheckpointError):  # what cannot be saved is said by the save
                self.background.prepare(bytes_of(planned(self.state).tensors))
        if unsaved:
            self.background.refuse(unsaved)

    def close(self) -> str | None:
        """Waits for what is being written. Returns why it failed, unless that has been raised."""
        return self.background.close()

    def _refuse_half_changed(self) -> None:
        """Saved, such a state would replace good checkpoints."""
        reason = self.state.half_changed()
        if reason is not None:
            raise CheckpointError(reason)

    def load(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None,
        options: LoadOptions,
        custom: Callable[..., Any] | None,
        *,
        fallback: bool,
    ) -> tuple[str | None, Any]:
        """All ranks. See `Engine.load_checkpoint`."""
        self.settle("load_checkpoint()")
        if self.state.copies.world == 1:
            return self._load(load_dir, tag, options, custom, fallback=fallback)
        return self._of_copies("load a checkpoint").agree(
            "cannot load", lambda: self._load(load_dir, tag, options, custom, fallback=fallback)
        )

    def _load(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None,
        options: LoadOptions,
        custom: Callable[..., Any] | None,
        *,
        fallback: bool,
    ) -> tuple[str | None, Any]:
        folder = self._agreement.agree("cannot load", lambda: folder_of(load_dir, "load_dir"))
        self.state.take_writes()  # what the checkpoint lacks keeps its value
        loading = Load(self.state, self.disk, folder, options, custom, self._policy.timeout)
        loaded = loading.run(tag, fallback=fallback)
        self.bytes_read = loading.bytes_read
        if loaded is None:
            if self.state.comm.rank == 0:
                _log.warning(
                    "%s holds no file `latest`: nothing was loaded; give a tag to load one", folder
                )
            return None, {}
        name, client_state = loaded
        self._loaded[folder.resolve()] = name
        assert loading.manifest is not None, "what was loaded had a manifest"
        self._run = self._run.behind(loading.manifest)
        staged = loading.staged
        assert staged is not None, "what was loaded was staged"
        self.of_wire = staged.wire, self.state.loss_scale.scale / staged.scale
        self.last_load = loading.record
        if loading.record is not None and self.state.comm.rank == 0:
            loading.record.log()
        return str(folder / name), client_state

    def save_weights(
        self, save_dir: str | os.PathLike[str], name: str, *, exclude_frozen: bool
    ) -> bool:
        """All ranks; rank 0 writes. See `Engine.save_16bit_model`."""

        def save() -> None:
            self._save_weights(save_dir, name, exclude_frozen=exclude_frozen)

        self._save_once("save weights", save)
        return True

    def _save_weights(
        self, save_dir: str | os.PathLike[str], name: str, *, exclude_frozen: bool
    ) -> None:
        folder = self._agreement.agree("cannot save", lambda: folder_of(save_dir, "save_dir"))
        patience = Patience(
            f"save {folder / name}", self._policy.timeout, "zerort.checkpoint.timeout"
        )
        self._agreement.agree(f"{folder / name} was not saved", self._refuse_half_changed)
        module = self.state.module
        gathered = self.consolidated(exclude_frozen=exclude_frozen) if self._is_sharded else None

        def save() -> None:
            weights = gathered
            if weights is None:
                found = weights_of(module, exclude_frozen=exclude_frozen)
                weights = {name: tensor.detach() for name, tensor in found.items()}
            save_weights(weights, aliases(module), folder, name, self.disk)

        replace(self._agreement, patience=patience).first(f"{folder / name} was not saved", save)

    def consolidated(self, *, exclude_frozen: bool) -> dict[str, Tensor]:
        """All ranks; rank 0 gets the weights. See `consolidated`."""
        return consolidated(self.state, exclude_frozen=exclude_frozen)

    @property
    def _is_sharded(self) -> bool:
        return any(bucket.spec.sharded for bucket in self.state.flat.buckets)


class _Report:
    """What became of old checkpoints, in the log."""

    def __init__(self) -> None:
        self._spared = False
        """Whether it has been said that other runs' checkpoints stay."""

    def __call__(self, folder: Path, keep_last: int | None, pruned: Pruned) -> None:
        if pruned.gone:
            # one a save is the ordinary business of it
            _log.log(
                logging.DEBUG if len(pruned.gone) == 1 else logging.INFO,
                "keep_last=%s: deleted %d of this run's checkpoints from %s: %s",
                keep_last,
                len(pruned.gone),
                folder,
                ", ".join(pruned.gone[:8]),
            )
        if pruned.of_other_runs and not self._spared:
            self._spared = True
            _log.warning(
                "keep_last=%s leaves the checkpoints alone that other runs saved into %s: %s",
                keep_last,
                folder,
                ", ".join(pruned.of_other_runs[:8]),
            )
