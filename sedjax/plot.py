"""Pictures of a record: functions that take axes and return axes (extra `plot`).

All read an `xarray.Dataset` as `sedjax.record` makes it, in memory or lazily from a file. Rows are drawn at the step at
which their window ends. Rows whose window is still filling are hatched in grey, never left out. A record of more rows
than the axes have pixels is thinned to the least and the greatest value in each pixel, so no peak is lost. Colours
differ in lightness, and line styles, markers and hatching say the same again.

Arguments that all share:
  record: the record, or a part of it that was selected by xarray; of a dimension where one entry was selected, that one
    is drawn.
  ax: matplotlib axes to draw on; None makes a new figure.
  seed, window, group: labels as in the record. Default: the largest window of the whole model; of the seeds, the first,
    or all where the docstring says so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax._dataset import DIMS, FIELDS, WHOLE
from sedjax._spectrum import LOW_DIM
from sedjax._types import Phase

if TYPE_CHECKING:
  import xarray as xr

__all__ = ["against_null", "fidelity", "gap_ratio", "groups", "ratios", "series", "singular_values"]

# Face, hatching and name of each phase. The faces also differ in grey.
PHASES = {
  Phase.WARMUP: ("#E4E4E4", "xx", "window filling"),
  Phase.NO_EDGE: ("#FFFFFF", "", "no edge"),
  Phase.RISE: ("#FBE6A2", "//", "rise"),
  Phase.PLATEAU: ("#B5D6EC", "", "plateau"),
  Phase.COLLAPSE: ("#C2A6BF", "\\\\", "collapse"),
}
_DIFFER = ("#F3F3F3", "..", "seeds differ")
_HATCH = "#00000030"
# Okabe and Ito's colours, darkest first.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREATEST = 1e300
_STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))


def singular_values(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws σ_1 … σ_W over time, on a logarithmic axis, dark (the largest) to light.

  Args:
    record, ax, seed, window, group: see the module; one seed.

  Returns:
    The axes.

  Raises:
    ValueError: the record has no such seed, window, group or field, or no rows.
    ImportError: matplotlib is missing.

  Cost: reads one window's singular values and phases: 4·W + 4 bytes a row.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,))
    >>> sedjax.plot.singular_values(record).get_xlabel()
    'optimizer step'
  """
  ax = _axes(ax)
  chosen = _choose(record, seed, window, group, one_seed=True)
  steps, values = _read(chosen, "singular_values")
  values = np.where(values[:, 0] > 0, values[:, 0], np.nan)  # rows not yet there are 0
  size = max(1, min(int(chosen.window[0]), values.shape[1]))
  _shade(ax, steps, _read(chosen, "phase")[1], only=(Phase.WARMUP,))
  cividis = load_matplotlib().colormaps["cividis"]
  named = {1, 2, 3, size}
  for k in range(size, 0, -1):
    color = cividis(0.9 * (k - 1) / max(1, size - 1))
    style = _STYLES[0] if k > 3 or k == size else _STYLES[k - 1]
    _line(ax, steps, values[:, k - 1], color=color, ls=style, lw=1.4 if k <= 3 else 0.9,
          label=f"σ$_{{{k}}}$" if k in named else None)  # fmt: skip
  if np.isfinite(values).any():
    ax.set_yscale("log")
    _log_ticks(ax.yaxis, *ax.get_ylim())
  return _finish(ax, record, "singular_values", reverse=True)


def ratios(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws all ratios σ_k/σ_(k+1) over time as a heat map, with k* on it: filled where clear, hollow where ambiguous.

  Args:
    record, ax, seed, window, group: see the module; one seed.

  Returns:
    The axes; a colour bar is made beside them.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads one window's ratios, k*, phases and ambiguity: 4·W + 9 bytes a row.
  """
  ax = _axes(ax)
  chosen = _choose(record, seed, window, group, one_seed=True)
  steps, values = _read(chosen, "ratios")
  phases = _read(chosen, "phase")[1][:, 0]
  size = max(1, min(int(chosen.window[0]) - 1, values.shape[2] if values.ndim == 3 else 1))
  values = np.where((phases != Phase.WARMUP)[:, None] & (values[:, 0, :size] > 0), values[:, 0, :size], np.nan)
  _heat(ax, steps, values, np.arange(size + 1) + 0.5, _label(record, "ratios"))
  k_star = _read(chosen, "k_star")[1][:, 0]
  unsure = _read(chosen, "edge_ambiguous")[1][:, 0] > 0
  # Every place that k* takes within some pixels is marked once.
  starts = _bins(steps, max(20, _pixels(ax) // 6))
  at = _middles(steps, starts)
  which = np.repeat(np.arange(len(starts)), np.diff([*starts, len(steps)]))
  for marks, marker, face, label in (
    (k_star * unsure, "o", "white", "k*, ambiguous"),
    (k_star * ~unsure, "s", "#E69F00", "k*"),
  ):
    pairs = np.unique(np.stack([which, marks])[:, marks > 0], axis=1).astype(int)
    if pairs.size:
      ax.plot(at[pairs[0]], pairs[1], marker, ms=3.6, mfc=face, mec="black", mew=0.6, ls="", label=label)
  ax.yaxis.set_major_locator(load_matplotlib().ticker.MaxNLocator(integer=True, nbins=8))
  _finish(ax, record, None)
  ax.set_ylabel("place k in the spectrum")
  return ax


def gap_ratio(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws the ratio at k* over time, what noise shows, and the phases as shades.

  Args:
    record, ax, seed, window, group: see the module; all seeds unless one is given. Of several seeds the median is a
      line and the range a band, and a phase is shaded where more than half of the seeds are in it.

  Returns:
    The axes.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads three fields of one window: 12 bytes a row and seed.
  """
  ax = _axes(ax)
  chosen = _choose(record, seed, window, group)
  steps, phases = _read(chosen, "phase")
  _shade(ax, steps, phases)
  filled = phases != Phase.WARMUP
  gaps, nulls = (np.where(filled, _read(chosen, name)[1], np.nan) for name in ("gap_ratio", "null_ratio"))
  top = _band(ax, steps, gaps, "gap ratio")
  _line(ax, steps, _median(nulls), color="black", lw=1, ls=(0, (1, 1.5)), label="noise seldom exceeds")
  _ratio_axis(ax, top, np.nanmax(nulls, initial=1), low=min(0.97, 0.98 * np.nanmin(gaps, initial=1)))
  return _finish(ax, record, "gap_ratio")


def against_null(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws the live ratio at k* divided by what noise seldom exceeds there: above 1 it is no noise.

  Args:
    record, ax, seed, window, group: see the module; all seeds (median and range) unless one is given.

  Returns:
    The axes.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads three fields of one window: 12 bytes a row and seed.
  """
  ax = _axes(ax)
  chosen = _choose(record, seed, window, group)
  steps, phases = _read(chosen, "phase")
  _shade(ax, steps, phases, only=(Phase.WARMUP,))
  top = _band(ax, steps, _margin(chosen), "gap ratio / noise")
  ax.axhline(1, color="black", lw=1, ls=(0, (1, 1.5)), label="as much as noise")
  low, high = ax.get_ylim()
  low = min(low, 0.9)
  ax.axhspan(low / 10, 1, fc="#EEEEEE", ec=_HATCH, hatch="..", lw=0, zorder=0, label="within noise")
  _ratio_axis(ax, max(top, high), low=low)
  _finish(ax, record, None)
  ax.set_ylabel("gap ratio / ratio that noise\nseldom exceeds")
  return ax


def groups(record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None) -> Any:
  """Draws groups × time: how far each group's ratio at its k* exceeds what noise shows; white is within noise.

  Args:
    record, ax, seed, window: see the module; one seed, all groups.

  Returns:
    The axes; a colour bar is made beside them. Long names of groups are cut in the middle, and what all of their paths
    begin and end with is left out.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads three fields of one seed and window: 12 bytes a row and group.
  """
  ax = _axes(ax)
  fields = _fields(record)
  names = [str(name) for name in fields.group.values]
  margins = []
  for name in fields.group.values:
    chosen = _choose(fields, seed, window, name, one_seed=True)
    margins.append(_margin(chosen)[:, 0])
  _heat(ax, fields.step.values, np.stack(margins, 1), np.arange(len(names) + 1) - 0.5,
        "gap ratio / ratio that noise seldom exceeds")  # fmt: skip
  ax.set_yticks(
    range(len(names)),
    [_short(name, min(28, max(12, _pixels(ax) // 20))) for name in _apart(names)],
    fontsize="small" if len(names) > 12 else None,
  )
  ax.invert_yaxis()
  _finish(ax, record, None)
  ax.set_ylabel("group")
  return ax


def fidelity(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws the sketch's effective dimension d over time and, on the right, a ratio's standard error √(1/d) from it.

  A singular value seen through d numbers has a relative variance of 1/(2d), a ratio of two the sum of both. Rows of an
  exact sketch have no such error.

  Args:
    record, ax, seed, window, group: see the module; all seeds (median and range) unless one is given.

  Returns:
    The axes of the effective dimension.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads two fields of one window: 8 bytes a row and seed.
  """
  ax = _axes(ax)
  chosen = _choose(record, seed, window, group)
  steps, values = _read(chosen, "effective_dim")
  values = np.where(values > 0, values, np.nan)
  _shade(ax, steps, _read(chosen, "phase")[1], only=(Phase.WARMUP,))
  _band(ax, steps, values, "effective dimension")
  ax.set_yscale("log")
  some = values[np.isfinite(values)]
  low, high = (float(some.min()), float(some.max())) if some.size else (LOW_DIM, LOW_DIM)
  ax.set_ylim(min(low, LOW_DIM) / 1.6, max(high, LOW_DIM) * 1.6)
  ax.axhspan(1e-6, LOW_DIM, fc="#EEEEEE", ec=_HATCH, hatch="..", lw=0, zorder=0, label=f"low: under {LOW_DIM:,}")
  other = ax.secondary_yaxis("right", functions=(_error_of, _error_of_inverse))
  other.set_ylabel("standard error of a ratio (%)")
  low, high = ax.get_ylim()
  _log_ticks(ax.yaxis, low, high)
  _log_ticks(other.yaxis, float(_error_of(high)), float(_error_of(low)))
  return _finish(ax, record, "effective_dim")


def series(record: xr.Dataset, name: str, *, ax: Any = None, seed: Any = None) -> Any:
  """Draws one of the user's own series over its own steps, and the events as numbered lines.

  Args:
    record, ax: see the module.
    name: one of `series_names(record)`.
    seed: draw this one only; None for all.

  Returns:
    The axes.

  Raises:
    ValueError: the record has no such series or seed.
    ImportError: matplotlib is missing.

  Cost: reads that series.
  """
  ax = _axes(ax)
  if name not in series_names(record):
    raise ValueError(f"sedjax.plot: the record has no series {name!r}; it has {series_names(record)}.")
  values = record[name]
  if "seed" in values.dims:
    values = values.isel(seed=_places(record, seed))
  columns = np.asarray(values.values, float).reshape(values.shape[0], -1)
  # An axis of greater numbers would have an infinite length.
  columns = np.where(np.isfinite(columns), np.clip(columns, -_GREATEST, _GREATEST), columns)
  steps = record[f"{name}_step"].values
  of_seeds = "seed" in values.dims and values.seed.ndim
  labels = [_short(f"seed {label}") for label in values.seed.values] if of_seeds else [None]
  if columns.shape[1] > 1 + len(_COLORS):
    _band(ax, steps, columns, _short(name.replace("_", " ")))
  else:
    for i, (column, label) in enumerate(zip(columns.T, labels, strict=True)):
      _line(ax, steps, column, color=_COLORS[i % len(_COLORS)], ls=_STYLES[i % len(_STYLES)], lw=1.3, label=label,
            marker="o" if len(steps) <= 40 else None, ms=3)  # fmt: skip
  return _finish(ax, record, name)


def series_names(record: xr.Dataset) -> list[str]:
  """Names of the user's own series of numbers in a record: variables `name` on a dimension `name_step`.

  Example:
    >>> import xarray as xr
    >>> series_names(xr.Dataset({"loss": ("loss_step", [1.0])}, {"loss_step": [10]}))
    ['loss']
  """
  return [
    str(name)
    for name, variable in record.data_vars.items()
    if variable.dims[:1] == (f"{name}_step",) and set(variable.dims[1:]) <= {"seed"} and variable.dtype.kind in "fiub"
  ]


def events_of(record: xr.Dataset) -> list[tuple[int, str]]:
  """The events of a record, as (step, what happened), in the order of their steps.

  Example:
    >>> import xarray as xr
    >>> events_of(xr.Dataset({"event": ("event_step", ["new data"])}, {"event_step": [10]}))
    [(10, 'new data')]
  """
  if "event" not in record:
    return []
  happened = zip(record.event_step.values, record.event.values, strict=True)
  return sorted((int(step), str(what)) for step, what in happened)


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


def _axes(ax: Any) -> Any:
  load_matplotlib()
  if ax is not None:
    return ax
  import matplotlib.pyplot as plt

  return plt.subplots(layout="constrained", figsize=(8, 3.6))[1]


def _places(record: xr.Dataset, seed: Any) -> list[int]:
  """Where a seed is on the seed axis; None for all."""
  return list(range(record.sizes["seed"])) if seed is None else [_place(record, "seed", seed)]


def _place(record: xr.Dataset, dim: str, label: Any) -> int:
  labels = record[dim].values.tolist()
  if label not in labels:
    raise ValueError(f"sedjax.plot: the record has no {dim} {label!r}; it has {labels}.")
  return labels.index(label)


def _fields(record: xr.Dataset) -> xr.Dataset:
  """The record's fields on all of its dimensions, also on those along which one entry was selected.

  Raises:
    ValueError: it has no rows.
  """
  found = record[[name for name in FIELDS if name in record.variables]]
  for dim in DIMS:
    if dim in found.dims:
      continue
    if dim not in found.coords:  # selected with `drop=True`
      found = found.assign_coords({dim: {"group": WHOLE, "window": found.sizes.get("index", 1)}.get(dim, 0)})
    found = found.expand_dims(dim)
  if not found.sizes["step"]:
    raise ValueError("sedjax.plot: the record has no rows to draw; select at least one step.")
  return found


def _choose(record: xr.Dataset, seed: Any, window: int | None, group: Any, one_seed: bool = False) -> xr.Dataset:
  """One window of one group, of one seed or all; nothing is read yet."""
  record = _fields(record)
  seeds = [0] if one_seed and seed is None else _places(record, seed)
  at = int(np.argmax(record.window.values)) if window is None else _place(record, "window", window)
  # A group that was selected before is the one that is meant.
  place = 0 if group == WHOLE and record.sizes["group"] == 1 else _place(record, "group", group)
  return record.isel(seed=seeds, window=[at], group=[place])


def _read(chosen: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and a field as [step, seed] or [step, seed, index]."""
  if name not in chosen:
    raise ValueError(f"sedjax.plot: the record has no field {name!r}.")
  values = chosen[name].transpose("step", "seed", "window", "group", ...).values[:, :, 0, 0]
  kept = values if values.dtype.kind in "iu" else values.astype(float)
  return chosen.step.values, kept


def _margin(chosen: xr.Dataset) -> np.ndarray:
  """[step, seed]: the gap ratio divided by the null's; NaN while the window fills."""
  gaps, nulls = (_read(chosen, name)[1] for name in ("gap_ratio", "null_ratio"))
  usable = (gaps > 0) & (nulls > 0)
  return np.divide(gaps, nulls, out=np.full_like(gaps, np.nan), where=usable)


def _median(columns: np.ndarray) -> np.ndarray:
  """Over seeds, without NaN; NaN where there is nothing else."""
  some = np.isfinite(columns).any(1)
  found = np.full(len(columns), np.nan)
  if some.any():
    found[some] = np.nanmedian(columns[some], axis=1)
  return found


def _pixels(ax: Any) -> int:
  return max(100, int(ax.get_window_extent().width))


def _bins(steps: np.ndarray, count: int) -> np.ndarray:
  """First index of each bin that holds a row, of `count` bins of equal width in steps."""
  if len(steps) <= count:
    return np.arange(len(steps))
  span = max(1, int(steps[-1]) - int(steps[0]))
  which = np.minimum((steps - steps[0]) * count // span, count - 1)
  return np.flatnonzero(np.diff(which, prepend=-1))


def _middles(steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
  ends = np.append(starts[1:], len(steps)) - 1
  return (steps[starts] + steps[ends]) / 2


def _edges(steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """Where bins meet: half-way between the last row of one and the first of the next."""
  inner = (steps[starts[1:]] + steps[starts[1:] - 1]) / 2
  first, last = float(steps[0]), float(steps[-1])
  half = (last - first) / max(1, len(steps) - 1) / 2 or 0.5
  return np.concatenate([[first - half], inner, [last + half]])


def thin(steps: np.ndarray, values: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
  """Least and greatest of `values` in each of `pixels` bins of equal width, as two points; NaN where a bin has no more.

  Args:
    steps: int[T], ascending.
    values: float[T].
    pixels: int, bins.

  Returns:
    Steps and values to draw; the same as given where there are no more than two rows a bin.

  Example:
    >>> thin(np.arange(8), np.array([0, 0, 9, 0, 1, 1, 1, -5.0]), 2)[1].tolist()
    [0.0, 9.0, -5.0, 1.0]
  """
  if len(steps) <= 2 * pixels:
    return steps, values
  starts = _bins(steps, pixels)
  least, most = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
  return np.repeat(_middles(steps, starts), 2), np.stack([least, most], 1).reshape(-1)


def _line(ax: Any, steps: np.ndarray, values: np.ndarray, **kwargs: Any) -> None:
  x, y = thin(steps, values, _pixels(ax))
  alone = np.isfinite(y) & ~np.isfinite(np.append(y[1:], np.nan)) & ~np.isfinite(np.insert(y[:-1], 0, np.nan))
  ax.plot(x, y, **kwargs)
  if alone.any():  # a row between rows without a value would not be seen as a line
    ax.plot(x[alone], y[alone], "o", ms=3, color=kwargs.get("color"))


def _band(ax: Any, steps: np.ndarray, columns: np.ndarray, label: str) -> float:
  """The median of seeds as a line, their range as a band; returns the greatest value."""
  seeds = columns.shape[1]
  if seeds > 1:
    starts = _bins(steps, _pixels(ax))
    least = np.fmin.reduceat(np.fmin.reduce(columns, 1), starts)
    most = np.fmax.reduceat(np.fmax.reduce(columns, 1), starts)
    ax.fill_between(_middles(steps, starts), least, most, fc="#0072B2", ec="#0072B2", alpha=0.35, lw=0.8,
                    label=f"range of {seeds} seeds")  # fmt: skip
    label = f"{label}, median"
  _line(ax, steps, _median(columns), color="black", lw=1.3, label=label)
  finite = columns[np.isfinite(columns)]
  return float(finite.max()) if finite.size else 1.0


def _shade(ax: Any, steps: np.ndarray, phases: np.ndarray, only: tuple[Phase, ...] = tuple(Phase)) -> None:
  """Shades what more than half of the seeds are in, [step, seed], for the phases in `only`; a pixel has one shade."""
  counts = np.stack([(phases == phase).sum(1) for phase in Phase], 1)
  common = np.where(2 * counts.max(1) > phases.shape[1], counts.argmax(1), -1)
  starts = _bins(steps, _pixels(ax))
  if len(starts) < len(steps):
    shades = np.stack([np.add.reduceat(common == code, starts) for code in (-1, *Phase)], 1)
    common = shades.argmax(1) - 1
  edges = _edges(steps, starts)
  for code in (-1, *Phase) if only == tuple(Phase) else only:
    inside = np.flatnonzero(common == code)
    if not inside.size:
      continue
    face, hatch, label = PHASES[Phase(code)] if code >= 0 else _DIFFER
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    spans = [(edges[run[0]], edges[run[-1] + 1] - edges[run[0]]) for run in runs]
    ax.broken_barh(
      spans, (0, 1), transform=ax.get_xaxis_transform(), fc=face, ec=_HATCH, hatch=hatch, lw=0, zorder=0, label=label
    )


def _heat(ax: Any, steps: np.ndarray, values: np.ndarray, sides: np.ndarray, label: str) -> None:
  """A heat map of values [step, row], logarithmic from 1 on; white below 1, hatched where there is none."""
  colors, patches = load_matplotlib().colors, load_matplotlib().patches
  starts = _bins(steps, _pixels(ax))
  values = np.fmax.reduceat(values, starts, axis=0)
  edges = _edges(steps, starts)
  face, hatch, _ = PHASES[Phase.WARMUP]
  ax.add_patch(
    patches.Rectangle(
      (edges[0], sides[0]), edges[-1] - edges[0], sides[-1] - sides[0], fc=face, ec=_HATCH, hatch=hatch, lw=0, zorder=0
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
    ax.fill_between([], [], fc=face, ec=_HATCH, hatch=hatch, lw=0, label="no value, or window filling")


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


def _log_ticks(axis: Any, low: float, high: float) -> None:
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


def _ratio_axis(ax: Any, *tops: float, low: float = 0.97) -> None:
  top = 1.08 * max(1.05, *tops)
  ax.set_yscale("log")
  ax.set_ylim(low, top)
  _ratio_ticks(ax.yaxis, low, top)


def _error_of(dim: Any) -> np.ndarray:
  """Standard error of a ratio in %, at effective dimension `dim`."""
  return 100 / np.sqrt(np.maximum(dim, 1e-9))


def _error_of_inverse(error: Any) -> np.ndarray:
  return (100 / np.maximum(error, 1e-9)) ** 2


def _label(record: xr.Dataset, name: str, width: int = 30) -> str:
  """What an axis says: the variable's long name and unit, from its attributes or else from what the field has."""
  known = FIELDS.get(name, (name.replace("_", " "), ""))
  attrs = record[name].attrs if name in record.variables else {}
  text, unit = str(attrs.get("long_name", known[0])), str(attrs.get("units", known[1]))
  return textwrap.fill(_plain(f"{text} ({unit})" if unit not in ("", "1", "steps") else text), width)


def _plain(text: str) -> str:
  """Text for matplotlib, where a dollar sign would begin a formula and control characters have no glyphs."""
  return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()).replace("$", r"\$")


def _apart(names: list[str]) -> list[str]:
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


def _short(name: str, length: int = 28) -> str:
  return _plain(name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}")


def _mark_events(ax: Any, record: xr.Dataset, pixels: int) -> list[tuple[int, int, str]]:
  """Draws events as numbered lines, but none so close to another that it would hide what is drawn.

  Returns:
    The number, step and text of each event within the axes.
  """
  low, high = ax.get_xlim()
  happened = [(number, *event) for number, event in enumerate(events_of(record), 1) if low <= event[0] <= high]
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


def _finish(ax: Any, record: xr.Dataset, name: str | None, reverse: bool = False) -> Any:
  """Labels, limits, events and the legend, which lies above the axes where it hides nothing."""
  matplotlib, pixels = load_matplotlib(), _pixels(ax)
  ax.set_xlabel(_label(record, "step", 60) if "step" in record.variables else "step")
  if name:
    ax.set_ylabel(_label(record, name))
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
    labels.append(f"{number}: {_short(what, 32)}")
  if labels:
    # As many columns as have room; a legend wider than the axes would narrow them.
    font = matplotlib.rcParams["font.size"] * 0.83 * ax.figure.dpi / 72
    columns = int(max(1, min(4, pixels // (font * (0.5 * max(map(len, labels)) + 4)))))
    ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize="small", frameon=False,
              borderaxespad=0.2, handlelength=1.8, columnspacing=1.2, labelspacing=0.3)  # fmt: skip
  return ax
