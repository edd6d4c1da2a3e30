"""What features hear, in which order, and what becomes of a step when one of them raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import ranks
from catching import caught
from models import Terms
from terms import engine_over_terms, step_with, weights
from training import at_stage
from zerort import features
from zerort.errors import StepError
from zerort.step.events import Crossing, Events, Feature

pytestmark = pytest.mark.timeout(120)


class Heard(Feature):
    """Notes everything; raises in `breaks`."""

    name = "heard"

    def __init__(self, breaks: str = "") -> None:
        self.notes: list[Any] = []
        self.breaks = breaks
        self.kept = {"count": 0}

    def _note(self, event: str, *what: Any) -> None:
        self.notes.append((event, *what) if what else event)
        if self.breaks == event:
            raise ValueError(f"broken {event}")

    def keywords(self) -> dict[str, Any]:
        self._note("keywords")
        return {}

    @contextmanager
    def _within(self) -> Iterator[None]:
        self._note("forward begins")
        try:
            yield
        finally:
            self._note("forward ends")

    def forward(self) -> Any:
        return self._within()

    def backward(self, loss: Tensor, steps: int) -> bool:
        self._note("backward", loss.item(), steps)
        return False

    def before_vote(self, *, failed: bool) -> None:
        self._note("before_vote", failed) if failed else self._note("before_vote")

    def published(self) -> None:
        self.kept = {"count": self.kept["count"] + 1}
        self._note("published")

    def crossed(self, crossing: Crossing) -> None:
        self._note("crossed", crossing) if not self.breaks else self._note("crossed")

    def readings(self) -> list[tuple[str, float]]:
        return [("count", float(self.kept["count"]))]

    def ended(self) -> None:
        self._note("ended")

    def dropped(self) -> None:
        self._note("dropped")

    def restored(self) -> None:
        self._note("restored")

    def state(self) -> dict[str, Any]:
        return self.kept

    def load(self, state: dict[str, Any]) -> None:
        if "count" not in state:
            raise ValueError("no count")
        self.kept = state

    def close(self) -> None:
        self._note("close")


def hearing(*heard: Feature, **config: Any) -> Any:
    """An engine with these features, and no others."""
    with mock.patch.object(features, "FEATURES", [lambda site, one=one: one for one in heard]):
        model = Terms()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return engine_over_terms(config, model=model, optimizer=optimizer)


def test_events_come_in_the_order_of_a_step_and_each_but_once() -> None:
    heard = Heard()
    engine = hearing(heard, gradient_accumulation_steps=2)
    micro = ["keywords", "forward begins", "forward ends"]
    for value in (1.0, 3.0):
        engine.backward(engine(value, value))
        engine.step()
    loss = [note[1] for note in heard.notes if note[0] == "backward"]
    assert heard.notes == [
        *micro,
        ("backward", loss[0], 2),
        "ended",
        *micro,
        ("backward", loss[1], 2),
        "before_vote",
        "published",
        ("crossed", Crossing(1, engine.global_samples, True)),
        "ended",
    ]
    assert list(engine._events.readings()) == [("count", 1.0)]


def test_a_skipped_step_publishes_nothing_and_a_drop_is_heard() -> None:
    heard = Heard()
    engine = hearing(heard)
    step_with(engine, float("inf"), 1.0)
    assert "published" not in heard.notes
    assert ("crossed", Crossing(1, engine.global_samples, False)) in heard.notes
    engine.zero_grad()
    assert heard.notes[-1] == "dropped"
    engine.destroy()
    assert heard.notes[-1] == "close"


def test_an_event_that_is_not_overridden_is_not_called() -> None:
    class Quiet(Feature):
        name = "quiet"

    events = Events([Quiet()])
    assert all(hears == () for hears in events._hear.values())
    given: dict[str, Any] = {}
    assert events.keywords(given) is given
    assert events.forward() is Events().forward()
    assert events.find(Quiet) is events.features[0] and events.find(Heard) is None


def test_one_that_raises_takes_nothing_from_the_others() -> None:
    first, second = Heard("crossed"), Heard()
    engine = hearing(first, second)
    with pytest.raises(StepError, match=r"step 1 was applied on all ranks.*broken crossed"):
        step_with(engine, 1.0, 2.0)
    assert any(note[0] == "crossed" for note in second.notes)
    first.breaks = ""
    step_with(engine, 1.0, 2.0)


class Interrupted(Heard):
    """Ctrl-C comes in one of its events."""

    def _note(self, event: str, *what: Any) -> None:
        super()._note(event, *what)
        if event == self.breaks.removesuffix("?"):
            raise KeyboardInterrupt


CALLS: dict[str, Any] = {
    "before_vote": lambda events: events.before_vote(None),
    "published": Events.published,
    "crossed": lambda events: events.crossed(Crossing(1, 1, True)),
    "dropped": Events.dropped,
    "close": Events.close,
}


@pytest.mark.parametrize("event", CALLS)
def test_an_interrupt_goes_through_once_all_have_heard(event: str) -> None:
    broken, last = Heard(event), Heard()
    with pytest.raises(KeyboardInterrupt):
        CALLS[event](Events([broken, Interrupted(f"{event}?"), last]))
    assert event in str(last.notes)


def _break(rank: int, world: int, event: str) -> Any:
    heard = Heard(event if rank == 1 else "")
    engine = hearing(heard, **at_stage(2))
    before = weights(engine)
    error = caught(lambda: step_with(engine, 1.0, 2.0))
    after = weights(engine)
    heard.breaks = ""
    again = caught(lambda: step_with(engine, 1.0, 2.0))
    return error, before == after, again, heard.notes.count("published")


@pytest.mark.parametrize("event", ["backward", "before_vote"])
def test_a_feature_that_fails_before_the_vote_stops_the_step_on_all_ranks(event: str) -> None:
    class_here = "ValueError" if event == "backward" else "StepError"
    innocent, culprit = ranks.run(2, _break, event)
    assert innocent[1] and culprit[1]
    assert f"rank 1: ValueError: broken {event}" in str(innocent[0])
    assert type(culprit[0]).__name__ == class_here and f"broken {event}" in str(culprit[0])
    if event == "before_vote":
        assert innocent[2] is None and culprit[2] is None
        assert innocent[3] == culprit[3] == 1


def test_one_that_fails_behind_the_update_lets_no_further_step_through() -> None:
    innocent, culprit = ranks.run(2, _break, "published")
    assert not innocent[1] and not culprit[1]
    assert innocent[0] is None and "step 1 was applied on all ranks" in str(culprit[0])
    for ours in (innocent, culprit):
        assert "load a checkpoint before going on" in str(ours[2])


def test_what_a_feature_keeps_is_in_the_checkpoint(tmp_path: Path, caplog: Any) -> None:
    heard = Heard()
    engine = hearing(heard)
    step_with(engine, 1.0, 2.0)
    engine.save_checkpoint(tmp_path)
    step_with(engine, 1.0, 2.0)
    engine.load_checkpoint(tmp_path)
    assert heard.kept == {"count": 1} and heard.notes[-1] == "restored"
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert heard.kept == {"count": 1}
    without = hearing()
    without.load_checkpoint(tmp_path)
    assert "the state of heard is not taken: it is off" in without.last_load.not_restored
    without.save_checkpoint(tmp_path / "none")
    engine.load_checkpoint(tmp_path / "none")
    assert "heard starts anew: it was off when this was saved" in engine.last_load.not_restored
    assert heard.kept == {"count": 0}


def test_a_state_that_a_feature_refuses_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    wrong = Heard()
    wrong.kept = {"other": 1}  # type: ignore[dict-item]
    hearing(wrong).save_checkpoint(tmp_path)
    heard = Heard()
    engine = hearing(heard)
    step_with(engine, 1.0, 2.0)
    before = weights(engine)
    with pytest.raises(Exception, match="a feature raised ValueError: no count"):
        engine.load_checkpoint(tmp_path)
    assert heard.kept == {"count": 1} and weights(engine) == before and engine.global_steps == 1


def test_one_that_raises_when_it_closes_leaves_no_hook_and_the_trace_is_written(
    tmp_path: Path,
) -> None:
    engine = hearing(Heard("close"), zerort={"trace": {"path": str(tmp_path / "trace.json")}})
    step_with(engine, 1.0, 2.0)
    with pytest.raises(ValueError, match="broken close"):
        engine.destroy()
    assert engine._transaction.closed and list(tmp_path.iterdir())


def test_features_that_are_open_are_closed_when_a_later_one_raises() -> None:
    heard = Heard()

    def refuses(site: Any) -> Feature:
        raise ValueError("no")

    with (
        mock.patch.object(features, "FEATURES", [lambda site: heard, refuses]),
        pytest.raises(ValueError, match="no"),
    ):
        engine_over_terms({})
    assert heard.notes == ["close"]
