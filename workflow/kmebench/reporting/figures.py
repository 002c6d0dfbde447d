"""Figures a paper could show. Imports no torch."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from kmebench.files import atomic_path

#: Colour-blind safe (Okabe and Ito).
BLUE, ORANGE = "#0072B2", "#E69F00"


def draw_layers(shares: np.ndarray, title: str, path: Path) -> None:
    """Draw the share of all impact that critical keys and values carry, [L, 2], by layer.

    The file's ending decides the format.
    """
    layers = np.arange(len(shares))
    figure, axes = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    for column, (label, colour) in enumerate((("keys", BLUE), ("values", ORANGE))):
        axes.bar(
            layers + 0.4 * column - 0.2, 100 * shares[:, column], 0.4, label=label, color=colour
        )
    axes.set(xlabel="layer", ylabel="share of impact (%)")
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlim(-0.7, len(shares) - 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=200)
    plt.close(figure)
