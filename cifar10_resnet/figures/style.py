"""Sets the style of all plots and diagrams, and saves them.

Light and dark pages show them about 900 pixels wide. So each one is on a card, in colours that
colour-blind readers can distinguish. Files have twice the pixels.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

import matplotlib.style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

from cifar10_resnet import storage
from cifar10_resnet.storage import StrPath

WIDTH = 900  # pixels, 100 per inch; so a point is 1.4 pixels
MARGIN = 24
SMALL, NORMAL, LARGE = 8, 9, 12  # points

INK, MUTED, RULE, PAPER = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
# These colours are Okabe and Ito's palette.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, VERMILLION, PURPLE = "#E69F00", "#D55E00", "#CC79A7"
ACCENT = BLUE  # for the main thing that a plot or diagram shows; the rest is grey

STYLE = {
    "font.family": "DejaVu Sans",  # part of Matplotlib: the same on every machine
    "font.size": NORMAL,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.titlesize": NORMAL,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
}

# Without these entries of its metadata, a figure has the same bytes each time.
UNDATED = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}

DASHED = {"lw": 0.9, "ls": (0, (4, 2))}


def tint(colour: str, share: float = 0.2) -> tuple[float, float, float]:
    """Returns a colour mixed with white; `share` is the part of the colour."""
    red, green, blue = (1 - share * (1 - value) for value in to_rgb(colour))
    return red, green, blue


@contextlib.contextmanager
def picture(
    *files: StrPath,
    height: float,
    title: str,
    subtitle: str = "",
    width: float = WIDTH,
) -> Iterator[Figure]:
    """Yields a figure in the project's style, and then saves it to the files.

    `width` and `height` are in pixels. A failure leaves no half-written file.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((width / 100, height / 100), facecolor="none", layout="constrained")
        top = 78 if subtitle else 60
        room = (20 / width, 16 / height, 1 - 40 / width, 1 - (top + 16) / height)
        figure.get_layout_engine().set(rect=room)
        figure.add_artist(_card(width, height, figure))
        figure.text(MARGIN / width, 1 - 38.5 / height, title, size=LARGE, weight="bold")
        figure.text(MARGIN / width, 1 - 60.5 / height, subtitle)
        yield figure
        for file in files:
            storage.new_file(file, encode(figure, ending(file)))
            print(f"drew {file}")


def ending(file: StrPath) -> str:
    """Returns the kind of a file: "png" for `plot.PNG`, and for `.png`."""
    return os.fspath(file).rpartition(".")[2].lower()


def _card(width: float, height: float, figure: Figure) -> FancyBboxPatch:
    return FancyBboxPatch(
        (0.01, 0.01),
        width / 100 - 0.02,
        height / 100 - 0.02,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=PAPER,
        edgecolor=RULE,
        transform=figure.dpi_scale_trans,
        zorder=-1,
    )


def figure_to_png(figure: Figure, dpi: int = 200) -> bytes:
    """Returns a figure as a PNG file. At 200 dots per inch, it has twice its pixels."""
    return encode(figure, "png", dpi)


def encode(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """Returns a figure as a "png", "svg" or "pdf" file. The same figure gives the same bytes.

    A PNG contains the text of the figure as its description.
    """
    metadata, buffer = dict(UNDATED[kind]), io.BytesIO()
    if kind == "png":
        words = (text.get_text() for text in figure.findobj(Text))
        metadata["Description"] = " | ".join(filter(None, words))
    # Matplotlib makes some parts of a figure while it saves, and they need the style too.
    styled = matplotlib.style.context(["default", STYLE, {"svg.hashsalt": "resnet"}])
    with styled, warnings.catch_warnings():
        # The font shows a box in place of a character that it lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def shortened(name: str, longest: int) -> str:
    """Returns a name cut to `longest` characters. Escapes each $, which would start a formula."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return cut.replace("$", r"\$")
