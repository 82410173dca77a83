"""The report, its phases and its status bits: the one vocabulary that every other file uses."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer


class Phase(enum.IntEnum):
  """Where the gap ratio of a window stands, told row by row, without hindsight.

  An edge begins where the ratio exceeds `Report.null_ratio`, and ends where it falls below a lower threshold, which
  noise exceeds now and then, so that a ratio about as large as noise's does not begin and end an edge at every row.

  Attributes:
    WARMUP: the window is not full, or the group did not move in some of its rows.
    NO_EDGE: the ratio has not exceeded what noise shows, or has fallen back into it.
    RISE: it has exceeded that, and grows.
    PLATEAU: it grows no longer, and is at least 0.85 of its peak.
    COLLAPSE: it fell below 0.85 of its peak, and is not yet within noise.
  """

  WARMUP = 0
  NO_EDGE = 1
  RISE = 2
  PLATEAU = 3
  COLLAPSE = 4


class Status(enum.IntFlag):
  """What a reader of a report should know, as bits; `explain` puts each into words.

  Attributes:
    WINDOW_FILLING: there are fewer rows than the window holds, or the group did not move in some of them.
    BELOW_FLOOR: some singular values are below the largest / 300, what float32 resolves.
    LOW_EFFECTIVE_DIM: the sketch's effective dimension is under 2000.
    PARTIAL_ROW: a row of the window holds another number of steps than `every`.
    NONFINITE_SKIPPED: steps with NaN or infinite updates were left out.
    ZERO_SKIPPED: steps with exactly zero updates were left out.
    CANCELLATION: the window has a row, a difference of parameters, of which rounding may exceed 1 %.
    UNTRACKED: some leaves hold no floats, or `groups` gave None for them.
    UNKNOWN_GROUP: there is no such group; all else in the report is void.
    MAP_CHANGED: the state came with rows of another sketch or tree; from then on all its reports say so.
  """

  WINDOW_FILLING = 1
  BELOW_FLOOR = 2
  LOW_EFFECTIVE_DIM = 4
  PARTIAL_ROW = 8
  NONFINITE_SKIPPED = 16
  ZERO_SKIPPED = 32
  CANCELLATION = 64
  UNTRACKED = 128
  UNKNOWN_GROUP = 256
  MAP_CHANGED = 512


_WORDS = {
  Status.WINDOW_FILLING: "The window is still filling, or this group did not move in some of its rows: k_star is 0 and "
  "the spectrum is that of the rows so far.",
  Status.BELOW_FLOOR: "Some singular values are below the float32 floor (largest / 300); a ratio that ends there is a "
  "lower bound, and ratios that begin there are left out.",
  Status.LOW_EFFECTIVE_DIM: "The sketch's effective dimension is under 2000: few buckets carry the energy (hot "
  "columns, or a model of few parameters), so ratios are uncertain; sedjax.sketch.exact() has no such error.",
  Status.PARTIAL_ROW: "A row of the window holds another number of steps than `every`: steps were left out or merged.",
  Status.NONFINITE_SKIPPED: "Steps with NaN or infinite updates were left out.",
  Status.ZERO_SKIPPED: "Steps with exactly zero updates were skipped, as under gradient accumulation; if the tracker "
  "sits inside optax.MultiSteps it runs on each micro-step.",
  Status.CANCELLATION: "A difference of parameters is so small that its rounding error may exceed 1 %.",
  Status.UNTRACKED: "Some leaves are not tracked: they hold no floats, or `groups` returned None for them.",
  Status.UNKNOWN_GROUP: "The requested group does not exist, so every number here is void.",
  Status.MAP_CHANGED: "The state came with rows of another sketch, or of another tree, than this tracker's, and "
  "windows that hold both kinds compare what cannot be compared: call init for a new state.",
}


class Report(NamedTuple):
  """What one window says about one group of parameters.

  All fields may carry leading axes (seeds, history). Lengths are in the parameters' own unit. While the window fills,
  `k_star`, `gap_ratio`, `null_ratio` and `turning` are 0, and all else is that of the rows so far; before the first row
  everything is 0 but the counts of skipped steps and `status`, which has WINDOW_FILLING. A window in which a group has
  rows of zeros, as when it is frozen, is not full for that group.

  Attributes:
    singular_values: float32[W], descending, of the window's rows; 0 for rows not yet there.
    ratios: float32[W - 1], singular_values[k - 1] / singular_values[k]; the divisor is at least the float32 floor
      (largest / 300), and a ratio that begins below that floor is 0.
    k_star: int32, 1-based place of the largest ratio up to k_max; 0 while the window fills.
    gap_ratio: float32, the ratio at k_star, or 0.
    null_ratio: float32, what noise of the same momentum, in rows of the same norms, exceeds at k_star less than once in
      10⁵ rows where effective dimensions are many times the window, or 0.
    edge_ambiguous: bool, another place's ratio is within 0.1 % or three standard errors of the sketch of the winner.
    pc1_fraction: float32 in [0, 1], share of the largest singular value in the sum of squares.
    k95: int32, the fewest singular values that hold 95 % of the sum of squares.
    drift_speed: float32, norm of the mean row.
    alignment: float32 in [0, 1], |cos| of the newest row and the leading direction.
    turning: float32 in [0, 1], 1 - |cos| between the leading directions of this window and of the one a row before.
    last_update_norm: float32, norm of the newest row.
    effective_dim: float32, what takes the sketch dimension's place in error estimates, at most about the number of
      parameters; 0 where there is no row.
    phase: int32, a `Phase`.
    count: int32, rows pushed since the tracker began.
    row_steps: int32, optimizer steps in the newest row.
    skipped_nonfinite: int32, steps left out since the tracker began, those after the newest row included.
    skipped_zero: int32, steps of exactly zero update since the tracker began, likewise.
    status: int32, a `Status` bit field.
  """

  singular_values: jax.Array
  ratios: jax.Array
  k_star: jax.Array
  gap_ratio: jax.Array
  null_ratio: jax.Array
  edge_ambiguous: jax.Array
  pc1_fraction: jax.Array
  k95: jax.Array
  drift_speed: jax.Array
  alignment: jax.Array
  turning: jax.Array
  last_update_norm: jax.Array
  effective_dim: jax.Array
  phase: jax.Array
  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  row_steps: jax.Array
  skipped_nonfinite: jax.Array
  skipped_zero: jax.Array
  status: jax.Array


# Fields with an axis of singular values or ratios behind the group axis.
VECTOR_FIELDS = ("singular_values", "ratios")


def explain(status: Any) -> str:
  """Puts a status bit field into words.

  Args:
    status: an int, a concrete scalar array, or a `Report` of scalars.

  Returns:
    One sentence a line for each bit set, or a line that says that there is nothing to note.

  Raises:
    ValueError: the status has more than one element (index the seed first), or is no status.

  Example:
    >>> import sedjax
    >>> print(sedjax.explain(0))
    Nothing to note.
  """
  status = status.status if isinstance(status, Report) else status
  if not isinstance(status, int | float | np.generic | np.ndarray | jax.Array) or isinstance(status, Tracer):
    raise ValueError(
      f"sedjax.explain: expected a concrete status or Report, got a {type(status).__name__}; give it what "
      "sedjax.get_report returns, outside of jit."
    )
  values = np.asarray(status)
  if values.size != 1:
    raise ValueError(f"sedjax.explain: expected one status, got an array of shape {values.shape}; index it first.")
  if values.dtype.kind not in "iu" or not 0 <= values.item() < 2 * max(Status):
    raise ValueError(f"sedjax.explain: expected a status, an int in 0…{2 * max(Status) - 1}, got {values.item()!r}.")
  bits = Status(int(values.reshape(())))
  return "\n".join(words for bit, words in _WORDS.items() if bit & bits) or "Nothing to note."
