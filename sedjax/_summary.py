"""What a record holds, summed up for the report's page.

The record is read once, in blocks of steps: what the tables of all groups and windows need is summed up on the way, and
only the chosen window of the chosen group is kept for the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sedjax import _plot_data, record
from sedjax._html import steps_text
from sedjax._types import VECTOR_FIELDS, Report, Status

if TYPE_CHECKING:
  import xarray as xr

_BLOCK = 2**22  # numbers of one field that are read at a time
NEEDED = ("gap_ratio", "null_ratio", "k_star", "phase", "status")


class Span(NamedTuple):
  """Rows that follow each other in one phase."""

  phase: int
  first: int  # the step of its first row
  last: int  # the step of its last row
  until: int | None  # the first step of the next span; None for the last span
  peak: float  # the greatest gap ratio in it

  @property
  def steps(self) -> int:
    return (self.last if self.until is None else self.until) - self.first


class Sums:
  """Of every [seed, window, group]: what the tables say, summed up block by block."""

  def __init__(self, shape: Sequence[int], longest: int):
    def zeros(*more: int) -> np.ndarray:
      return np.zeros((*shape, *more), np.int64)

    self.rows = 0
    self.full = zeros()  # rows with a full window
    self.above = zeros()  # of these, rows whose ratio exceeds what noise shows
    self.ambiguous = zeros()  # of those above, rows whose k* is ambiguous: within noise k* means nothing
    self.places = zeros(longest + 1)  # those above, by k*
    self.log_ratio = np.zeros(shape)  # sum of log gap ratio
    self.pc1 = np.zeros(shape)  # sum of shares
    self.peak = np.zeros(shape)  # the greatest gap ratio
    self.peak_step = zeros()
    self.bits = zeros(32)  # rows by status bit
    self.last_phase = zeros()
    self.missing = zeros()  # rows in which the gap ratio or the share is NaN or infinite
    self.least_dim = np.full(shape, np.inf)  # the least effective dimension, infinite where there is none

  def add(self, block: Mapping[str, np.ndarray], steps: np.ndarray) -> None:
    """Takes in the rows of some steps: of each field [step, seed, window, group]."""
    gap, k_star, share = block["gap_ratio"], block["k_star"], block.get("pc1_fraction", np.float32(0))
    sound = np.isfinite(gap)
    filled = (k_star > 0) & sound
    edge = filled & (gap > block["null_ratio"])
    self.rows += len(steps)
    self.full += filled.sum(0)
    self.above += edge.sum(0)
    self.missing += (~(sound & np.isfinite(share))).sum(0)
    self.log_ratio += np.log(np.where(filled & (gap > 0), gap, 1), dtype=np.float32).sum(0, dtype=float)
    for k in range(1, min(self.places.shape[-1] - 1, int(k_star.max(initial=0))) + 1):
      self.places[..., k] += (edge & (k_star == k)).sum(0)
    if "edge_ambiguous" in block:
      self.ambiguous += (edge & (block["edge_ambiguous"] > 0)).sum(0)
    self.pc1 += np.where(filled, share, 0).sum(0, dtype=float)
    if "effective_dim" in block:
      dims = block["effective_dim"]
      self.least_dim = np.minimum(self.least_dim, np.where(dims > 0, dims, np.inf).min(0))
    shown = np.where(filled, gap, 0)
    at = shown.argmax(0)[None]
    top = np.take_along_axis(shown, at, 0)[0]
    self.peak_step = np.where(top > self.peak, steps[at[0]], self.peak_step)
    self.peak = np.maximum(self.peak, top)
    status = block["status"].astype(np.int64, copy=False)
    present = int(np.bitwise_or.reduce(status, axis=None))
    for bit in range(32):
      if present >> bit & 1:
        self.bits[..., bit] += (status >> bit & 1).sum(0)
    self.last_phase = block["phase"][-1].astype(int)


class Facts:
  """What the page says and draws of one record."""

  def __init__(self, source: xr.Dataset, name: str, window: int, group: Any) -> None:
    self.name, self.window, self.group = name, window, group
    self.attrs = source.attrs
    self.seeds = [str(seed) for seed in source.seed.values.tolist()]
    self.windows, self.groups = source.window.values.tolist(), [str(label) for label in source.group.values.tolist()]
    self.steps = source.step.values
    self.every = self._attr("every", 1, 2**63)
    self.momentum = self._attr("momentum", 0, 1)
    self.exact = str(self.attrs.get("sketch", "")).lower().startswith("exact")
    # In words: what the text is about, what its pictures of one seed show, how far a window looks back.
    self.whole = "the whole model" if group == record.WHOLE else f"group “{group}”"
    self.of_first = f" of seed {self.seeds[0]}, the first" if len(self.seeds) > 1 else ""
    # Of the tables of windows and groups: the chosen ones.
    self.place = self.windows.index(window), source.group.values.tolist().index(group)
    self.at = (slice(None), *self.place)  # of the sums: those of all seeds
    self.sums, self.chosen, self.first, self.by_group = _read(source, *self.place)

    self.row_steps = self._row_steps()
    self.alike = self.row_steps is None or self.row_steps[0] == self.row_steps[1]
    self.looks_back = steps_text(window * self.row_steps[0]) if self.row_steps and self.alike else f"{window} rows"

    def field(key: str) -> np.ndarray:  # [step, seed]
      return self.chosen[key].values[:, :, 0, 0]

    self.phase, self.gap, self.null = field("phase"), field("gap_ratio"), field("null_ratio")
    self.k_star = field("k_star")
    self.filled = (self.k_star > 0) & np.isfinite(self.gap)
    self.why_no_edge = (
      "The gap ratio is NaN or infinite in every full window" if (self.k_star > 0).any() else "The window is never full"
    )
    shown = np.where(self.filled, self.gap, np.nan)
    self.spans = [spans_of(self.steps, self.phase[:, i], shown[:, i]) for i in range(len(self.seeds))]

  def _attr(self, key: str, low: float, limit: float) -> float | None:
    """An attribute that is one number and in its range, else None."""
    try:
      value = float(np.asarray(self.attrs[key]))
    except (KeyError, TypeError, ValueError):
      return None
    return value if low <= value < limit else None

  def _row_steps(self) -> tuple[int, int] | None:
    """The fewest and the most steps in a row, if most windows hold rows of other lengths than `every`."""
    partial = self.sums.bits[(*self.at, Status.PARTIAL_ROW.bit_length() - 1)].sum()
    if "row_steps" in self.chosen and 2 * partial > self.sums.rows * len(self.seeds):
      found = self.chosen.row_steps.values[self.chosen.row_steps.values > 0]
      return (int(found.min()), int(found.max())) if found.size else None
    return None if self.every is None else (int(self.every), int(self.every))


def _read(source: xr.Dataset, w: int, g: int) -> tuple[Sums, xr.Dataset, xr.Dataset, xr.Dataset]:
  """One pass over the file.

  Returns:
    The sums; the chosen window and group without vectors; the same of the first seed with them; three fields of the
    chosen window in all groups, of the first seed.
  """
  import xarray as xr

  rows, *shape = (source.sizes[dim] for dim in record.DIMS)
  steps = source.step.values
  sums = Sums(shape, int(max(source.window.values)))
  scalars = [name for name in Report._fields if name in source.data_vars and name not in VECTOR_FIELDS]
  vectors = [name for name in VECTOR_FIELDS if name in source.data_vars]
  kept: dict[str, list[np.ndarray]] = {name: [] for name in scalars + vectors}
  over_groups: dict[str, list[np.ndarray]] = {"gap_ratio": [], "null_ratio": [], "phase": []}
  summed = {*NEEDED, "edge_ambiguous", "pc1_fraction", "effective_dim"}
  size = max(1, _BLOCK // max(1, math.prod(shape)))
  for start in range(0, rows, size):
    part = source.isel(step=slice(start, start + size))
    block: dict[str, np.ndarray] = {}
    for name in scalars:
      if name in summed:
        block[name] = part[name].transpose(*record.DIMS).values
        kept[name].append(block[name][:, :, w, g].copy())
      else:
        kept[name].append(part[name].transpose(*record.DIMS)[:, :, w, g].values)
    for name in vectors:  # the first seed's alone: pictures of the spectrum have one seed
      kept[name].append(part[name].transpose(*record.DIMS, "index")[:, :1, w, g].values)
    for name, found in over_groups.items():
      found.append(block[name][:, :1, w].copy())
    sums.add(block, steps[start : start + size])

  def joined(name: str, parts: list[np.ndarray]) -> tuple[Any, np.ndarray, dict[str, Any]]:
    whole = np.concatenate(parts)
    dims = (*record.DIMS, "index") if name in VECTOR_FIELDS else record.DIMS
    return dims, np.expand_dims(whole, (2, 3)), dict(source[name].attrs)

  coords = {"step": source.step, "seed": source.seed, "window": source.window[[w]], "group": source.group[[g]]}
  extra = {
    name: source[name].load() for name in [*_plot_data.series_names(source), *(["event"] if "event" in source else [])]
  }
  chosen = xr.Dataset({name: joined(name, parts) for name, parts in kept.items() if name in scalars}, coords)
  chosen = chosen.assign(extra).assign_attrs(source.attrs)
  first = chosen.isel(seed=[0]).assign({name: joined(name, kept[name]) for name in vectors})
  by_group = xr.Dataset(
    {
      name: (record.DIMS, np.concatenate(parts)[:, :, None], dict(source[name].attrs))
      for name, parts in over_groups.items()
    },
    {**coords, "seed": source.seed[:1], "group": source.group},
  )
  return sums, chosen, first, by_group


def spans_of(steps: np.ndarray, phases: np.ndarray, gaps: np.ndarray) -> list[Span]:
  """The phases that followed each other."""
  starts = np.flatnonzero(np.diff(phases, prepend=-1))
  ends = [*(starts[1:] - 1), len(phases) - 1]
  peaks = np.fmax.reduceat(gaps, starts)
  return [
    Span(int(phases[a]), int(steps[a]), int(steps[b]), int(steps[b + 1]) if b + 1 < len(steps) else None, float(peak))
    for a, b, peak in zip(starts, ends, peaks, strict=True)
  ]
