"""Shared code of the figures: the style, the colours, and writing complete files.

matplotlib is imported when the first figure is drawn. No display and no global state is used.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fs_jax._utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


# Okabe and Ito's palette, which people with any common colour blindness can distinguish (without yellow: too pale).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG = "#00724F", "#C24A00"  # its green and vermilion, darkened for text
GREY = "#555555"
DASHED = (0, (3.5, 1.6))  # dashes
_STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


_DPI = 160


@contextlib.contextmanager
def new_figure(**arguments: Any) -> Iterator["Figure"]:
    """A figure in the project's style, made without pyplot: it needs no display and needn't be closed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(layout="constrained", **arguments)


def colour_of(index: int, count: int) -> Any:
    if count <= len(PALETTE):
        return PALETTE[index]
    import matplotlib

    return matplotlib.colormaps["viridis"](0.95 * index / (count - 1))


def legend_columns(names: Mapping[str, Any], inches: float) -> int:
    """How many entries of a legend fit side by side."""
    return max(1, min(len(names), int(inches / (0.55 + 0.075 * max(map(len, names))))))


def figure_path(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix.lower() not in _METADATA:
        raise ValueError(f"path: expected a name that ends in .png or .svg; got {str(path)!r}.")
    return path


def save(figure: "Figure", path: pathlib.Path) -> None:
    """Write a complete PNG or SVG, or nothing if that fails; the same figure gives the same bytes."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower()
    with replacing(path) as file, matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(file, format=kind[1:], dpi=_DPI, metadata=_METADATA[kind])


_METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None}}
"""Metadata that would differ in each file, by kind of file; None removes it."""
