"""What all pictures are made of: axes, lines, bands, phases, ticks and words."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax import _plot_data
from sedjax._dataset import FIELDS, WHOLE
from sedjax._types import Phase

if TYPE_CHECKING:
  import xarray as xr

# Face, hatching and name of each phase. The faces also differ in grey.
PHASES = {
  Phase.WARMUP: ("#E4E4E4", "xx", "window filling"),
  Phase.NO_EDGE: ("#FFFFFF", "", "no edge"),
  Phase.RISE: ("#FBE6A2", "//", "rise"),
  Phase.PLATEAU: ("#B5D6EC", "", "plateau"),
  Phase.COLLAPSE: ("#C2A6BF", "\\\\", "collapse"),
}
_DIFFER = ("#F3F3F3", "..", "seeds differ")
HATCH = "#00000030"


def load_matplotlib() -> Any:
  """The module matplotlib, with what is used of it.

  Raises:
    ImportError: it is missing; the message names the extra.
  """
  try:
    import matplotlib
    import matplotlib.collections
    import matplotlib.colors
    import matplotlib.lines
    import matplotlib.patches
    import matplotlib.ticker
  except ImportError as error:
    raise ImportError("sedjax.plot needs matplotlib: pip install 'sedjax[plot]'.") from error
  return matplotlib


def axes(ax: Any) -> Any:
  """The axes that were given, or those of a new figure."""
  load_matplotlib()
  if ax is not None:
    return ax
  import matplotlib.pyplot as plt

  return plt.subplots(layout="constrained", figsize=(8, 3.6))[1]


def line(ax: Any, steps: np.ndarray, values: np.ndarray, **kwargs: Any) -> None:
  """Draws values [n] over steps, thinned to the pixels that there are; NaN parts the line."""
  x, y = _plot_data.thin(steps, values, _plot_data.pixels(ax))
  alone = np.isfinite(y) & ~np.isfinite(np.append(y[1:], np.nan)) & ~np.isfinite(np.insert(y[:-1], 0, np.nan))
  ax.plot(x, y, **kwargs)
  if alone.any():  # a row between rows without a value would not be seen as a line
    ax.plot(x[alone], y[alone], "o", ms=3, color=kwargs.get("color"))


def band(ax: Any, steps: np.ndarray, columns: np.ndarray, label: str) -> float:
  """The median of seeds as a line, their range as a band; returns the greatest value."""
  seeds = columns.shape[1]
  if seeds > 1:
    starts = _plot_data.bins(steps, _plot_data.pixels(ax))
    least = np.fmin.reduceat(np.fmin.reduce(columns, 1), starts)
    most = np.fmax.reduceat(np.fmax.reduce(columns, 1), starts)
    ax.fill_between(_plot_data.middles(steps, starts), least, most, fc="#0072B2", ec="#0072B2", alpha=0.35, lw=0.8,
                    label=f"range of {seeds} seeds")  # fmt: skip
    label = f"{label}, median"
  line(ax, steps, _plot_data.median(columns), color="black", lw=1.3, label=label)
  finite = columns[np.isfinite(columns)]
  return float(finite.max()) if finite.size else 1.0


def shade(ax: Any, steps: np.ndarray, phases: np.ndarray, only: tuple[Phase, ...] = tuple(Phase)) -> None:
  """Shades what more than half of the seeds are in, [step, seed], for the phases in `only`; a pixel has one shade."""
  counts = np.stack([(phases == phase).sum(1) for phase in Phase], 1)
  common = np.where(2 * counts.max(1) > phases.shape[1], counts.argmax(1), -1)
  starts = _plot_data.bins(steps, _plot_data.pixels(ax))
  if len(starts) < len(steps):
    shades = np.stack([np.add.reduceat(common == code, starts) for code in (-1, *Phase)], 1)
    common = shades.argmax(1) - 1
  edges = _plot_data.edges(steps, starts)
  for code in (-1, *Phase) if only == tuple(Phase) else only:
    inside = np.flatnonzero(common == code)
    if not inside.size:
      continue
    face, hatch, label = PHASES[Phase(code)] if code >= 0 else _DIFFER
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    spans = [(edges[run[0]], edges[run[-1] + 1] - edges[run[0]]) for run in runs]
    ax.broken_barh(
      spans, (0, 1), transform=ax.get_xaxis_transform(), fc=face, ec=HATCH, hatch=hatch, lw=0, zorder=0, label=label
    )


def heat(ax: Any, steps: np.ndarray, values: np.ndarray, sides: np.ndarray, label: str) -> None:
  """A heat map of values [step, row], logarithmic from 1 on; white below 1, hatched where there is none."""
  colors, patches = load_matplotlib().colors, load_matplotlib().patches
  starts = _plot_data.bins(steps, _plot_data.pixels(ax))
  values = np.fmax.reduceat(values, starts, axis=0)
  edges = _plot_data.edges(steps, starts)
  face, hatch, _ = PHASES[Phase.WARMUP]
  ax.add_patch(
    patches.Rectangle(
      (edges[0], sides[0]), edges[-1] - edges[0], sides[-1] - sides[0], fc=face, ec=HATCH, hatch=hatch, lw=0, zorder=0
    )
  )
  finite = values[np.isfinite(values)]
  top = max(1.05, float(finite.max())) if finite.size else 2.0
  # Light to dark in grey too, and light enough where there is no edge to see marks on it.
  blues = load_matplotlib().colormaps["YlGnBu"](np.linspace(0.1, 1, 256))
  cmap = colors.ListedColormap(blues).with_extremes(under="white")
  shown = np.ma.masked_invalid(values.T)
  mesh = ax.pcolormesh(edges, sides, shown, cmap=cmap, norm=colors.LogNorm(1, top), rasterized=True, zorder=1)
  bar = ax.figure.colorbar(mesh, ax=ax, extend="min" if finite.size and finite.min() < 1 else "neither", pad=0.02)
  bar.set_label(textwrap.fill(label, 30))
  _ratio_ticks(bar.ax.yaxis, 1, top)
  ax.set_xlim(edges[0], edges[-1])
  ax.set_ylim(sides[0], sides[-1])
  if not np.isfinite(values).all():
    ax.fill_between([], [], fc=face, ec=HATCH, hatch=hatch, lw=0, label="no value, or window filling")


_NO_EVENTS = ("singular_values", "effective_dim")
_DASHES = {"color": "black", "lw": 0.8, "ls": (0, (6, 3))}  # of events
_TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 300)


def _ratio_ticks(axis: Any, low: float, top: float) -> None:
  ticker = load_matplotlib().ticker
  ticks = [tick for tick in _TICKS if low <= tick <= top]
  if len(ticks) < 3:
    ticks = [tick for tick in ticker.MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, top) if low <= tick <= top]
  axis.set_major_locator(ticker.FixedLocator(ticks))
  axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.4g}"))
  axis.set_minor_locator(ticker.NullLocator())


def log_ticks(axis: Any, low: float, high: float) -> None:
  """Ticks 1, 2, 5 of each decade (1 alone over many decades, more within one), in plain numbers."""
  ticker = load_matplotlib().ticker
  decades = np.log10(high / low)
  steps = (1,) if decades > 3 else (1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 3, 4, 5, 6, 8)
  powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
  ticks = [tick for tick in np.outer(10.0**powers, steps).reshape(-1) if low <= tick <= high]
  if len(ticks) < 3:
    ticks = [tick for tick in ticker.MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
  axis.set_major_locator(ticker.FixedLocator(ticks[:: -(-len(ticks) // 8)]))
  axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.10g}" if 1e-3 <= x < 1e6 else f"{x:.3g}"))
  axis.set_minor_locator(ticker.NullLocator())


def ratio_axis(ax: Any, *tops: float, low: float = 0.97) -> None:
  """Makes the vertical axis one of ratios, from `low` to somewhat above the largest of `tops`."""
  top = 1.08 * max(1.05, *tops)
  ax.set_yscale("log")
  ax.set_ylim(low, top)
  _ratio_ticks(ax.yaxis, low, top)


def error_of(dim: Any) -> np.ndarray:
  """Standard error of a ratio in %, at effective dimension `dim`."""
  return 100 / np.sqrt(np.maximum(dim, 1e-9))


def error_of_inverse(error: Any) -> np.ndarray:
  """The effective dimension at which a ratio has this standard error in %."""
  return (100 / np.maximum(error, 1e-9)) ** 2


def label(record: xr.Dataset, name: str, width: int = 30) -> str:
  """What an axis says: the variable's long name and unit, from its attributes or else from what the field has."""
  known = FIELDS.get(name, (name.replace("_", " "), ""))
  attrs = record[name].attrs if name in record.variables else {}
  text, unit = str(attrs.get("long_name", known[0])), str(attrs.get("units", known[1]))
  return textwrap.fill(_plain(f"{text} ({unit})" if unit not in ("", "1", "steps") else text), width)


def _plain(text: str) -> str:
  """Text for matplotlib, where a dollar sign would begin a formula and control characters have no glyphs."""
  return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()).replace("$", r"\$")


def apart(names: list[str]) -> list[str]:
  """Long paths without the components that all of them, but for the whole model, begin or end with."""
  paths = [name.split("/") for name in names if name != WHOLE]
  if len(paths) < 2 or max(map(len, names)) <= 12:
    return names
  most = min(map(len, paths)) - 1  # one is left

  def alike(at: Callable[[int], int], most: int) -> int:
    return next((i for i in range(most) if len({path[at(i)] for path in paths}) > 1), most)

  first = alike(lambda i: i, most)
  last = alike(lambda i: -1 - i, most - first)
  shorter = iter("/".join(path[first : len(path) - last]) for path in paths)
  return [name if name == WHOLE else next(shorter) for name in names]


def short(name: str, length: int = 28) -> str:
  """A name of at most so many characters, without its middle if it is longer."""
  return _plain(name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}")


def _mark_events(ax: Any, record: xr.Dataset, pixels: int) -> list[tuple[int, int, str]]:
  """Draws events as numbered lines, but none so close to another that it would hide what is drawn.

  Returns:
    The number, step and text of each event within the axes.
  """
  low, high = ax.get_xlim()
  happened = [
    (number, *event) for number, event in enumerate(_plot_data.events_of(record), 1) if low <= event[0] <= high
  ]
  drawn = numbered = -np.inf
  for number, step, _ in happened:
    at = (step - low) / (high - low) * pixels
    if at - drawn < 4:
      continue
    drawn = at
    ax.axvline(step, zorder=3, **_DASHES)
    if at - numbered < 14:
      continue
    numbered = at
    ax.annotate(str(number), (step, 1), xycoords=("data", "axes fraction"), xytext=(2, -2), va="top", fontsize="small",
                textcoords="offset points", annotation_clip=True,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"})  # fmt: skip
  return happened


def finish(ax: Any, record: xr.Dataset, name: str | None, reverse: bool = False) -> Any:
  """Labels, limits, events and the legend, which lies above the axes where it hides nothing."""
  matplotlib, pixels = load_matplotlib(), _plot_data.pixels(ax)
  ax.set_xlabel(label(record, "step", 60) if "step" in record.variables else "step")
  if name:
    ax.set_ylabel(label(record, name))
  ends = [*record.step.values[[0, -1]]] if record.sizes.get("step") else []
  if f"{name}_step" in record.variables and record.sizes[f"{name}_step"]:
    ends += [*record[f"{name}_step"].values[[0, -1]]]
  if ends:
    margin = (max(ends) - min(ends)) * 0.005 or 1
    ax.set_xlim(min(ends) - margin, max(ends) + margin)
  happened = _mark_events(ax, record, pixels)
  ax.xaxis.set_major_locator(
    matplotlib.ticker.MaxNLocator(max(2, min(6, pixels // 70)), integer=True, steps=[1, 2, 2.5, 5, 10])
  )
  ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.10g}"))
  ax.spines[["top", "right"]].set_visible(False)
  handles, labels = ax.get_legend_handles_labels()
  if reverse:
    handles, labels = handles[::-1], labels[::-1]
  for i, handle in enumerate(handles):
    if isinstance(handle, matplotlib.collections.PolyCollection):  # with a border, so that white is seen
      face, hatch = handle.get_facecolor()[0], handle.get_hatch()
      handles[i] = matplotlib.patches.Patch(fc=face, hatch=hatch, ec="#999999", lw=0.6)
  # All pictures number the events; those of the gap ratio and of the user's series also say what they were.
  for number, _, what in happened[:4] if name and name not in _NO_EVENTS else []:
    handles.append(matplotlib.lines.Line2D([], [], **_DASHES))
    labels.append(f"{number}: {short(what, 32)}")
  if labels:
    # As many columns as have room; a legend wider than the axes would narrow them.
    font = matplotlib.rcParams["font.size"] * 0.83 * ax.figure.dpi / 72
    columns = int(max(1, min(4, pixels // (font * (0.5 * max(map(len, labels)) + 4)))))
    ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize="small", frameon=False,
              borderaxespad=0.2, handlelength=1.8, columnspacing=1.2, labelspacing=0.3)  # fmt: skip
  return ax
