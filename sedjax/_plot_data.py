"""What a picture shows: chosen from a record, read, and thinned to the pixels that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax._dataset import DIMS, FIELDS, WHOLE

if TYPE_CHECKING:
  import xarray as xr


def expect_record(record: Any) -> None:
  """Refuses what is no record."""
  if not hasattr(record, "data_vars"):
    raise ValueError(
      f"sedjax.plot: expected a record, got a {type(record).__name__}; open one with sedjax.record.open_record(path)."
    )


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


def places(record: xr.Dataset, seed: Any) -> list[int]:
  """Where a seed is on the seed axis; None for all."""
  return list(range(record.sizes["seed"])) if seed is None else [_place(record, "seed", seed)]


def _place(record: xr.Dataset, dim: str, label: Any) -> int:
  labels = record[dim].values.tolist()
  if label not in labels:
    raise ValueError(f"sedjax.plot: the record has no {dim} {label!r}; it has {labels}.")
  return labels.index(label)


def fields(record: xr.Dataset) -> xr.Dataset:
  """The record's fields on all of its dimensions, also on those along which one entry was selected.

  Raises:
    ValueError: it has no rows.
  """
  expect_record(record)
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


def choose(record: xr.Dataset, seed: Any, window: int | None, group: Any, one_seed: bool = False) -> xr.Dataset:
  """One window of one group, of one seed or all; nothing is read yet."""
  record = fields(record)
  seeds = [0] if one_seed and seed is None else places(record, seed)
  at = int(np.argmax(record.window.values)) if window is None else _place(record, "window", window)
  # A group that was selected before is the one that is meant.
  place = 0 if group == WHOLE and record.sizes["group"] == 1 else _place(record, "group", group)
  return record.isel(seed=seeds, window=[at], group=[place])


def read(chosen: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and a field as [step, seed] or [step, seed, index]."""
  if name not in chosen:
    raise ValueError(f"sedjax.plot: the record has no field {name!r}.")
  values = chosen[name].transpose("step", "seed", "window", "group", ...).values[:, :, 0, 0]
  kept = values if values.dtype.kind in "iu" else values.astype(float)
  return chosen.step.values, kept


def margin(chosen: xr.Dataset) -> np.ndarray:
  """[step, seed]: the gap ratio divided by the null's; NaN while the window fills."""
  gaps, nulls = (read(chosen, name)[1] for name in ("gap_ratio", "null_ratio"))
  usable = (gaps > 0) & (nulls > 0)
  return np.divide(gaps, nulls, out=np.full_like(gaps, np.nan), where=usable)


def median(columns: np.ndarray) -> np.ndarray:
  """Over seeds, without NaN; NaN where there is nothing else."""
  some = np.isfinite(columns).any(1)
  found = np.full(len(columns), np.nan)
  if some.any():
    found[some] = np.nanmedian(columns[some], axis=1)
  return found


def pixels(ax: Any) -> int:
  """How many pixels wide axes are, at least 100."""
  return max(100, int(ax.get_window_extent().width))


def bins(steps: np.ndarray, count: int) -> np.ndarray:
  """First index of each bin that holds a row, of `count` bins of equal width in steps."""
  if len(steps) <= count:
    return np.arange(len(steps))
  span = max(1, int(steps[-1]) - int(steps[0]))
  which = np.minimum((steps - steps[0]) * count // span, count - 1)
  return np.flatnonzero(np.diff(which, prepend=-1))


def middles(steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """The step in the middle of each bin."""
  ends = np.append(starts[1:], len(steps)) - 1
  return (steps[starts] + steps[ends]) / 2


def edges(steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
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
  starts = bins(steps, pixels)
  least, most = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
  return np.repeat(middles(steps, starts), 2), np.stack([least, most], 1).reshape(-1)
