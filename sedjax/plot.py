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

from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax import _drawing, _plot_data
from sedjax._dataset import WHOLE
from sedjax._spectrum import LOW_DIM
from sedjax._types import Phase

if TYPE_CHECKING:
  import xarray as xr

__all__ = ["against_null", "fidelity", "gap_ratio", "groups", "ratios", "series", "singular_values"]

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
  ax = _drawing.axes(ax)
  chosen = _plot_data.choose(record, seed, window, group, one_seed=True)
  steps, values = _plot_data.read(chosen, "singular_values")
  values = np.where(values[:, 0] > 0, values[:, 0], np.nan)  # rows not yet there are 0
  size = max(1, min(int(chosen.window[0]), values.shape[1]))
  _drawing.shade(ax, steps, _plot_data.read(chosen, "phase")[1], only=(Phase.WARMUP,))
  cividis = _drawing.load_matplotlib().colormaps["cividis"]
  named = {1, 2, 3, size}
  for k in range(size, 0, -1):
    color = cividis(0.9 * (k - 1) / max(1, size - 1))
    style = _STYLES[0] if k > 3 or k == size else _STYLES[k - 1]
    _drawing.line(ax, steps, values[:, k - 1], color=color, ls=style, lw=1.4 if k <= 3 else 0.9,
          label=f"σ$_{{{k}}}$" if k in named else None)  # fmt: skip
  if np.isfinite(values).any():
    ax.set_yscale("log")
    _drawing.log_ticks(ax.yaxis, *ax.get_ylim())
  return _drawing.finish(ax, record, "singular_values", reverse=True)


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

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,))
    >>> sedjax.plot.ratios(record).get_ylabel()
    'place k in the spectrum'
  """
  ax = _drawing.axes(ax)
  chosen = _plot_data.choose(record, seed, window, group, one_seed=True)
  steps, values = _plot_data.read(chosen, "ratios")
  phases = _plot_data.read(chosen, "phase")[1][:, 0]
  size = max(1, min(int(chosen.window[0]) - 1, values.shape[2] if values.ndim == 3 else 1))
  values = np.where((phases != Phase.WARMUP)[:, None] & (values[:, 0, :size] > 0), values[:, 0, :size], np.nan)
  _drawing.heat(ax, steps, values, np.arange(size + 1) + 0.5, _drawing.label(record, "ratios"))
  k_star = _plot_data.read(chosen, "k_star")[1][:, 0]
  unsure = _plot_data.read(chosen, "edge_ambiguous")[1][:, 0] > 0
  # Every place that k* takes within some pixels is marked once.
  starts = _plot_data.bins(steps, max(20, _plot_data.pixels(ax) // 6))
  at = _plot_data.middles(steps, starts)
  which = np.repeat(np.arange(len(starts)), np.diff([*starts, len(steps)]))
  for marks, marker, face, label in (
    (k_star * unsure, "o", "white", "k*, ambiguous"),
    (k_star * ~unsure, "s", "#E69F00", "k*"),
  ):
    pairs = np.unique(np.stack([which, marks])[:, marks > 0], axis=1).astype(int)
    if pairs.size:
      ax.plot(at[pairs[0]], pairs[1], marker, ms=3.6, mfc=face, mec="black", mew=0.6, ls="", label=label)
  ax.yaxis.set_major_locator(_drawing.load_matplotlib().ticker.MaxNLocator(integer=True, nbins=8))
  _drawing.finish(ax, record, None)
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

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,))
    >>> sedjax.plot.gap_ratio(record).get_ylabel()
    'gap ratio at k*'
  """
  ax = _drawing.axes(ax)
  chosen = _plot_data.choose(record, seed, window, group)
  steps, phases = _plot_data.read(chosen, "phase")
  _drawing.shade(ax, steps, phases)
  filled = phases != Phase.WARMUP
  gaps, nulls = (np.where(filled, _plot_data.read(chosen, name)[1], np.nan) for name in ("gap_ratio", "null_ratio"))
  top = _drawing.band(ax, steps, gaps, "gap ratio")
  _drawing.line(
    ax, steps, _plot_data.median(nulls), color="black", lw=1, ls=(0, (1, 1.5)), label="noise seldom exceeds"
  )
  _drawing.ratio_axis(ax, top, np.nanmax(nulls, initial=1), low=0.97 * np.min(gaps[gaps > 0], initial=1))
  return _drawing.finish(ax, record, "gap_ratio")


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

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,))
    >>> sedjax.plot.against_null(record).get_xlabel()
    'optimizer step'
  """
  ax = _drawing.axes(ax)
  chosen = _plot_data.choose(record, seed, window, group)
  steps, phases = _plot_data.read(chosen, "phase")
  _drawing.shade(ax, steps, phases, only=(Phase.WARMUP,))
  margins = _plot_data.margin(chosen)
  top = _drawing.band(ax, steps, margins, "gap ratio / noise")
  ax.axhline(1, color="black", lw=1, ls=(0, (1, 1.5)), label="as much as noise")
  high = ax.get_ylim()[1]
  low = 0.95 * np.min(margins[margins > 0], initial=0.95)
  ax.axhspan(low / 10, 1, fc="#EEEEEE", ec=_drawing.HATCH, hatch="..", lw=0, zorder=0, label="within noise")
  _drawing.ratio_axis(ax, max(top, high), low=low)
  _drawing.finish(ax, record, None)
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

  Cost: reads two fields of one seed and window: 8 bytes a row and group.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3, groups=lambda path: path)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,), groups=("all", "w"))
    >>> sedjax.plot.groups(record).get_ylabel()
    'group'
  """
  ax = _drawing.axes(ax)
  fields = _plot_data.fields(record)
  names = [str(name) for name in fields.group.values]
  margins = []
  for name in fields.group.values:
    chosen = _plot_data.choose(fields, seed, window, name, one_seed=True)
    margins.append(_plot_data.margin(chosen)[:, 0])
  _drawing.heat(ax, fields.step.values, np.stack(margins, 1), np.arange(len(names) + 1) - 0.5,
        "gap ratio / ratio that noise seldom exceeds")  # fmt: skip
  ax.set_yticks(
    range(len(names)),
    [_drawing.short(name, min(28, max(12, _plot_data.pixels(ax) // 20))) for name in _drawing.apart(names)],
    fontsize="small" if len(names) > 12 else None,
  )
  ax.invert_yaxis()
  _drawing.finish(ax, record, None)
  ax.set_ylabel("group")
  return ax


def fidelity(
  record: xr.Dataset, *, ax: Any = None, seed: Any = None, window: int | None = None, group: str = WHOLE
) -> Any:
  """Draws the sketch's effective dimension d over time and, on the right, a ratio's standard error √(1/d) from it.

  A singular value seen through d numbers has a relative variance of 1/(2d), a ratio of two the sum of both; more where
  singular values are near each other. Rows of an exact sketch have no such error.

  Args:
    record, ax, seed, window, group: see the module; all seeds (median and range) unless one is given.

  Returns:
    The axes of the effective dimension.

  Raises:
    ValueError, ImportError: as `singular_values`.

  Cost: reads two fields of one window: 8 bytes a row and seed.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=3)
    >>> reports = jax.tree.map(lambda x: x[None], sedjax.get_reports(tx.init({"w": jnp.ones(3)})))
    >>> record = sedjax.record.to_dataset(reports, steps=[0], windows=(3,))
    >>> sedjax.plot.fidelity(record).get_yscale()
    'log'
  """
  ax = _drawing.axes(ax)
  chosen = _plot_data.choose(record, seed, window, group)
  steps, values = _plot_data.read(chosen, "effective_dim")
  values = np.where(values > 0, values, np.nan)
  _drawing.shade(ax, steps, _plot_data.read(chosen, "phase")[1], only=(Phase.WARMUP,))
  _drawing.band(ax, steps, values, "effective dimension")
  ax.set_yscale("log")
  some = values[np.isfinite(values)]
  low, high = (float(some.min()), float(some.max())) if some.size else (LOW_DIM, LOW_DIM)
  ax.set_ylim(min(low, LOW_DIM) / 1.6, max(high, LOW_DIM) * 1.6)
  ax.axhspan(
    1e-6, LOW_DIM, fc="#EEEEEE", ec=_drawing.HATCH, hatch="..", lw=0, zorder=0, label=f"low: under {LOW_DIM:,}"
  )
  other = ax.secondary_yaxis("right", functions=(_drawing.error_of, _drawing.error_of_inverse))
  other.set_ylabel("standard error of a ratio (%)")
  low, high = ax.get_ylim()
  _drawing.log_ticks(ax.yaxis, low, high)
  _drawing.log_ticks(other.yaxis, float(_drawing.error_of(high)), float(_drawing.error_of(low)))
  return _drawing.finish(ax, record, "effective_dim")


def series(record: xr.Dataset, name: str, *, ax: Any = None, seed: Any = None) -> Any:
  """Draws one of the user's own series over its own steps, and the events as numbered lines.

  Args:
    record, ax: see the module.
    name: of the series, as `Recorder.log` was given it.
    seed: draw this one only; None for all.

  Returns:
    The axes.

  Raises:
    ValueError: the record has no such series or seed, or no values of it.
    ImportError: matplotlib is missing.

  Cost: reads that series.

  Example:
    >>> import jax.numpy as jnp, sedjax, sedjax.plot, sedjax.record, tempfile
    >>> state, path = sedjax.track_spectral_edge(3).init({"w": jnp.ones(3)}), tempfile.mkdtemp() + "/run.nc"
    >>> with sedjax.record.Recorder(path) as recorder:
    ...   recorder.append(0, state)
    ...   recorder.log(0, validation_loss=4.2)
    >>> with sedjax.record.open_record(path) as record:
    ...   sedjax.plot.series(record, "validation_loss").get_ylabel()
    'validation loss'
  """
  _plot_data.expect_record(record)
  ax = _drawing.axes(ax)
  if name not in _plot_data.series_names(record):
    raise ValueError(f"sedjax.plot: the record has no series {name!r}; it has {_plot_data.series_names(record)}.")
  values = record[name]
  if not values.size:
    raise ValueError(f"sedjax.plot: the series {name!r} has no values to draw.")
  if "seed" in values.dims:
    values = values.isel(seed=_plot_data.places(record, seed))
  columns = np.asarray(values.values, float).reshape(values.shape[0], -1)
  # An axis of greater numbers would have an infinite length.
  columns = np.where(np.isfinite(columns), np.clip(columns, -_GREATEST, _GREATEST), columns)
  steps = record[f"{name}_step"].values
  of_seeds = "seed" in values.dims and values.seed.ndim
  labels = [_drawing.short(f"seed {label}") for label in values.seed.values] if of_seeds else [None]
  if columns.shape[1] > 1 + len(_COLORS):
    _drawing.band(ax, steps, columns, _drawing.short(name.replace("_", " ")))
  else:
    for i, (column, label) in enumerate(zip(columns.T, labels, strict=True)):
      look = {"color": _COLORS[i % len(_COLORS)], "ls": _STYLES[i % len(_STYLES)], "lw": 1.3}
      _drawing.line(ax, steps, column, **look, label=label, marker="o" if len(steps) <= 40 else None, ms=3)
  return _drawing.finish(ax, record, name)
