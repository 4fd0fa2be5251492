"""Work on all processors: in order, errors at their place, nothing left behind."""

from __future__ import annotations

import threading
import time

import pytest

from lora_probe.files import threads
from lora_probe.files.threads import on_all_processors, processors


def test_results_are_in_order() -> None:
    def slower_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * number

    assert list(on_all_processors(slower_first, range(20))) == [number * number for number in range(20)]


def test_an_error_is_raised_at_its_place_and_the_rest_is_dropped() -> None:
    # Engines of other tests keep threads of their own.
    before = set(threading.enumerate())
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        time.sleep(0.01)
        return number

    results = on_all_processors(work, range(1000))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 1000
    assert set(threading.enumerate()) <= before


def test_a_process_beside_others_takes_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_shared", False)
    threads.leave_to_others()
    assert processors() == 1
    names = set(on_all_processors(lambda _: threading.current_thread().name, range(5)))
    assert names == {threading.current_thread().name}
