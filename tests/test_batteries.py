"""The integrity batteries: a few points, a tenth as slow tests; `make batteries` runs them all."""

from collections.abc import Iterator
from typing import Any

import canaries
import harms
import hostile_paths
import kills
import planning
import pytest
import resuming
import writers
from subjects import Subjects, quiet, workplace


@pytest.fixture(scope="module")
def subjects() -> Iterator[Subjects]:
    quiet()
    with workplace() as made:
        yield made


def few_and_a_tenth(few: int, full: int) -> pytest.MarkDecorator:
    tenth = pytest.param(max(full // 10, 2), marks=pytest.mark.slow)
    return pytest.mark.parametrize("points", [few, tenth] if few else [tenth])


def without_failures(counts: dict[str, Any]) -> dict[str, Any]:
    print(counts)
    assert counts["failures"] == []
    return counts


@few_and_a_tenth(30, harms.FULL)
def test_harm_to_any_byte_is_seen(points: int, subjects: Subjects) -> None:
    counts = without_failures(harms.battery(subjects, points, seed=points))
    assert counts["detected"] + counts["ends"].get("nothing changed", 0) == points


@few_and_a_tenth(3, hostile_paths.FULL)
def test_a_path_that_leads_outside_is_refused(points: int, subjects: Subjects) -> None:
    counts = without_failures(hostile_paths.battery(subjects, points, seed=points))
    assert counts["refused"] == counts["hostile"] == points
    assert counts["followed by plain Transformers"] >= 3, "nothing would be followed: no proof"


@few_and_a_tenth(0, canaries.FULL)
def test_no_pickle_and_no_code_runs(points: int, subjects: Subjects) -> None:
    counts = without_failures(canaries.battery(subjects, points, seed=points))
    assert counts["alive"] == points
    assert counts["fired"] == 0


@few_and_a_tenth(0, kills.FULL)
def test_a_killed_save_leaves_one_whole_artifact(points: int, subjects: Subjects) -> None:
    without_failures(kills.battery(subjects, points, seed=points))


@few_and_a_tenth(3, writers.FULL)
def test_two_writers_end_with_one_whole_artifact(points: int, subjects: Subjects) -> None:
    without_failures(writers.battery(subjects, points, seed=points))


@few_and_a_tenth(0, resuming.FULL)
def test_resuming_is_running_it_again(points: int, subjects: Subjects) -> None:
    without_failures(resuming.battery(subjects, points, seed=points))


@few_and_a_tenth(0, planning.FULL)
def test_a_killed_search_is_gone_on_with(points: int, subjects: Subjects) -> None:
    without_failures(planning.battery(subjects, points, seed=points))
