"""Colours and markers of editors."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.markers import MarkerStyle

from kmebench.editors.cards import registered
from kmebench.planning.appearance import FAMILIES, styles

#: Colour vision without one kind of cone, on linear RGB (Machado et al. 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]  # of sRGB


def linear(colour):
    encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB, white point D65."""
    t = np.array(XYZ) @ rgb / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a, b):
    """WCAG 2 contrast of two colours."""
    bright, dark = sorted((float(XYZ[1] @ linear(colour)) for colour in (a, b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_no_two_editors_look_the_same():
    found = styles(registered())
    assert len(found) >= 14
    assert len(set(found.values())) == len(found)
    assert {MarkerStyle(style.marker).is_filled() for style in found.values()} == {True}


def test_every_built_in_family_has_a_colour():
    assert {card.family for card in registered().values()} <= set(FAMILIES)


@pytest.mark.parametrize("vision", VISION)
def test_families_differ_for_every_kind_of_colour_vision(vision):
    seen = [lab(np.clip(VISION[vision] @ linear(c), 0, 1)) for c in FAMILIES.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


@pytest.mark.parametrize("paper", ["#FFFFFF", "#121212"])
def test_colours_show_on_white_and_on_black_paper(paper):
    assert min(contrast(colour, paper) for colour in FAMILIES.values()) >= 3  # WCAG 1.4.11


def test_an_editor_looks_the_same_whatever_else_is_shown():
    cards = registered()
    alone = styles({"pac": cards["pac"]})
    assert styles(cards)["pac"] == alone["pac"]


def test_a_further_row_of_an_editor_has_its_colour_and_another_marker():
    cards = registered()
    found = styles(cards | {"full-c-epochs": cards["full-c"]})
    assert found["full-c-epochs"].colour == found["full-c"].colour
    assert found["full-c-epochs"] not in styles(cards).values()


def test_families_of_packages_get_colours_of_their_own():
    cards = registered()
    mine = {f"mine-{k}": dataclasses.replace(cards["pac"], family=f"f{k}") for k in range(2)}
    found = styles(mine)
    assert (
        len({style.colour for style in found.values()} | set(FAMILIES.values()))
        == len(FAMILIES) + 2
    )
