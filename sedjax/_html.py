"""Numbers, lists, tables and pictures, as the report's page writes them."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sedjax import _drawing
from sedjax._types import Phase
from sedjax._words import counted

_LONGEST = 50_000  # characters of an attribute
_FEW = 5  # columns of a table that a telephone has room for
_FIGURE_SIZES = ((8.4, 3.7), (4.1, 4.1))  # inches, for wide and for narrow screens


def escape(text: Any) -> str:
  """Text as HTML."""
  return html.escape(str(text), quote=True)


def number(value: float, digits: int = 3) -> str:
  """A number as a reader would write it."""
  if not math.isfinite(value):
    return "–"
  if float(value).is_integer() and abs(value) < 1e9:
    return f"{int(value):,}"
  text = f"{value:.{digits}g}"
  if 1 <= abs(value) < 1e9 and "e" in text:
    return f"{value:,.0f}"
  return text if abs(value) >= 1e-3 else f"{value:.1e}"


def percent(part: float, whole: float = 1) -> str:
  """Never "0\u00a0%" or "100 %" of what is neither."""
  if whole <= 0:
    return "–"
  share = 100 * part / whole
  if 0 < share < 1:
    return "under 1\u00a0%"
  return "over 99\u00a0%" if 99 < share < 100 else f"{share:.0f}\u00a0%"


def steps_text(count: int) -> str:
  """A number of steps, in words."""
  return counted(count, "step")


def row_steps_text(row_steps: tuple[int, int]) -> str:
  """The fewest and the most steps in a row, in words."""
  low, high = row_steps
  return steps_text(high) if low == high else f"{low:,} to {steps_text(high)}"


def listed(items: Sequence[str], most: int = 8) -> str:
  """The first items with commas and "and", and how many more there are."""
  items = [*items[:most], f"{len(items) - most} more"] if len(items) > most else list(items)
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def all_seeds(seeds: int) -> str:
  """Of two or more seeds, "both" or "all"."""
  return "both seeds" if seeds == 2 else f"all {seeds} seeds"


def between(steps: Sequence[int]) -> str:
  """From the least to the greatest step, in words."""
  low, high = min(steps), max(steps)
  return f"at step {low:,}" if low == high else f"between steps {low:,} and {high:,}"


PHASE_WORDS = {
  Phase.WARMUP: "the window fills",
  Phase.NO_EDGE: "no edge",
  Phase.RISE: "a rise",
  Phase.PLATEAU: "a plateau",
  Phase.COLLAPSE: "a collapse",
}
PHASE_NAMES = {phase: name for phase, (_, _, name) in _drawing.PHASES.items()}


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
  """A table in a box of its own; cells are HTML. The first `left` columns hold words, others numbers.

  On a narrow screen a few columns are made to fit, and many scroll beneath the first one.
  """
  head = "".join(f'<th scope="col"{"" if i < left else " class=n"}>{title}</th>' for i, title in enumerate(heads))
  body = "".join(
    "<tr>"
    + "".join(
      f'<th scope="row">{cell}</th>' if i == 0 else f"<td{'' if i < left else ' class=n'}>{cell}</td>"
      for i, cell in enumerate(row)
    )
    + "</tr>\n"
    for row in rows
  )
  label = escape(caption)
  kind, box = ("few", "box") if len(heads) <= _FEW else ("many", "box wide")
  return (
    f'<div class="{box}"><p class="caption">{label}</p><div class="scroll" tabindex="0" role="region" '
    f'aria-label="{label}"><table class="{kind}" aria-label="{label}"><thead><tr>{head}</tr></thead>\n'
    f"<tbody>{body}</tbody></table></div></div>"
  )


def figure(draw: Callable[[Any], Any], alt: str, caption: str) -> str:
  """Two pictures, for wide and for narrow screens, in the page itself."""
  from matplotlib.figure import Figure

  matplotlib = _drawing.load_matplotlib()
  uris = []
  for size in _FIGURE_SIZES:
    with matplotlib.rc_context({"font.size": 9.5, "axes.linewidth": 0.7, "savefig.dpi": 170}):
      figure = Figure(size, layout="constrained")
      draw(figure.subplots())
      file = io.BytesIO()
      with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # one for each letter of each picture
        figure.savefig(file, format="png", metadata={"Software": None})
    uris.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
  wide, narrow = _FIGURE_SIZES
  return (
    f'<figure><picture><source media="(max-width: 560px)" srcset="{uris[1]}" width="{int(narrow[0] * 170)}" '
    f'height="{int(narrow[1] * 170)}"><img src="{uris[0]}" width="{int(wide[0] * 170)}" height="{int(wide[1] * 170)}" '
    f'alt="{escape(alt)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
  )


def folded(value: Any) -> str:
  """An attribute's text, as HTML: folded away where it is long, such as a list of all parameters."""
  text = ", ".join(map(str, value.tolist())) if isinstance(value, np.ndarray) and value.ndim else str(value)
  if len(text) <= 300:
    return escape(text)
  shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
  return f"<details><summary>{len(text):,} characters: {escape(text[:60])} …</summary>{escape(shown)}</details>"
