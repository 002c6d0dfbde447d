"""Where names of marks go."""

import itertools

import numpy as np
import pytest

from kmebench.reporting.labels import place, spread, together

FRAME = (0.0, 0.0, 240.0, 180.0)


def boxes(centres, sizes):
    return np.hstack([centres - sizes / 2, centres + sizes / 2])


def meet(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_names_lie_on_no_mark_and_no_other_name_and_stay_in_the_frame():
    marks = np.random.default_rng(1).normal((180, 130), 24, (12, 2)).clip(5, (235, 175))
    radii, sizes = np.full(12, 4.0), np.tile([30.0, 8.0], (12, 1))
    names = boxes(place(marks, radii, sizes, FRAME), sizes)
    assert not any(meet(a, b) for a, b in itertools.combinations(names, 2))
    discs = boxes(marks, np.full((12, 2), 6.0))  # but for a point of their edge
    assert not any(meet(a, b) for a, b in itertools.product(names, discs))
    assert (names[:, :2] >= FRAME[:2]).all()
    assert (names[:, 2:] <= FRAME[2:]).all()


def test_a_lone_name_stands_right_beside_its_mark():
    (centre,) = place(np.array([[100.0, 90.0]]), np.array([3.0]), np.array([[30.0, 8.0]]), FRAME)
    assert np.abs(centre - (100, 90)).max() <= 3 + 2 + 15


def test_marks_on_one_another_share_a_name():
    assert together(np.array([[0.0, 0.0], [9.0, 9.0], [0.5, 0.5]])) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([0.0, 50.0, 100.0], [0.0, 50.0, 100.0]),  # far apart: nothing moves
        ([50.0, 50.0], [45.0, 55.0]),  # both share the way
        ([100.0, 98.0], [100.0, 90.0]),  # no further than the frame
        ([20.0, 0.0, 0.0], [20.0, 0.0, 10.0]),
    ],
)
def test_places_are_spread_as_little_as_need_be(places, wanted):
    assert spread(np.array(places), 10, 0, 100).tolist() == pytest.approx(wanted)
