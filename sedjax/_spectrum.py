"""A report from the Gram matrix of a window."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedjax import _gram, _null
from sedjax._order import later_than
from sedjax._phase import PhaseState, step_phase
from sedjax._types import Report, Status

# float32 inner products do not resolve smaller singular values than this share of the largest.
FLOOR = np.float32(1 / 300)
LOW_DIM = 2000
# A runner-up whose ratio is less than that below the winner's, or within so many standard errors of the sketch, makes
# the edge ambiguous; rounding alone decides between the former.
_TIE = np.float32(1e-3)
_Z = np.float32(3.0)
# Rows of unequal norms have unequal singular values by themselves, and noise seldom exceeds their ratios by more than
# so many standard errors of a ratio; nor by so many standard deviations of the norms' logarithms, where these are
# nearly equal, and singular values keep apart as in the simulation. For leaving an edge, less by a factor. Chosen on
# noise of all kinds of norms (`benchmarks/noise.py`), which exceeds that no more often than the simulation's
# thresholds.
_ERRORS, _DEVIATIONS, _STAYS = np.float32(5.0), np.float32(4.0), np.float32(0.64)


class WindowState(NamedTuple):
  """What one window size remembers between rows."""

  phase: PhaseState
  direction: jax.Array  # float32[G, W_max + 1]: the leading direction as a combination of the slots' scaled rows


class Rows(NamedTuple):
  """The small facts about the rows in the ring, by slot; n = W_max + 1."""

  gram: jax.Array  # float32[parts, G, n, n] of the rows divided by their scales
  scale: jax.Array  # float32[G, n], powers of two; 0 where there is no row
  dims: jax.Array  # float32[G, n], effective dimensions, of the sketch's error
  noise_dims: jax.Array  # float32[G, n], of noise that is spread as the rows are, see `_rows`
  steps: jax.Array  # int32[n], optimizer steps in each row; negative where rounding may exceed 1 % of it


def ratios_of(singular_values: jax.Array) -> jax.Array:
  """float32[..., W - 1]: consecutive ratios, divisors no smaller than the floor, 0 where one begins below it."""
  floor = singular_values[..., :1] * FLOOR
  above, below = singular_values[..., :-1], singular_values[..., 1:]
  return jnp.where((above >= floor) & (above > 0), above / jnp.maximum(jnp.maximum(below, floor), 2e-38), 0)


def find_edge(ratios: jax.Array, k_max: int, dims: jax.Array, exact: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """k* (1-based), the ratio there, and whether another place comes within the sketch's error.

  Through d numbers a singular value has a relative variance of 1/(2d), so the logarithms of two ratios differ with
  variance 2/d, or 3/d where they share a singular value.
  """
  candidates = ratios[..., :k_max]
  best = jnp.argmax(candidates, -1).astype(jnp.int32)
  top = jnp.max(candidates, -1)
  place = jnp.arange(k_max, dtype=jnp.int32)
  distance = jnp.abs(place - best[..., None])
  margin = jnp.log(jnp.maximum(top[..., None], 1e-30)) - jnp.log(jnp.maximum(candidates, 1e-30))
  variance = jnp.where(distance == 1, 3.0, 2.0).astype(jnp.float32) / jnp.maximum(dims[..., None], 1)
  tolerance = jnp.maximum(_TIE, 0 if exact else _Z * jnp.sqrt(variance))
  ambiguous = jnp.any((distance > 0) & (margin < tolerance), -1)
  return best + 1, top, ambiguous


# Its tables stay out of the operands of a `cond` (see `_gram`).
@functools.partial(jax.jit, static_argnums=range(3))
def _noise_thresholds(window: int, momentum: float, every: int, dims: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32[G, W - 1]: the ratios at which an edge is entered and left, at effective dimensions [G]."""
  grid, means, deviations = _null.noise_ratios(window, momentum, every)
  logs = np.concatenate([means + _null.ENTER * deviations, means + _null.LEAVE * deviations], 1)
  # Linear between the grid's points: how much of each of its steps lies below.
  below = jnp.clip((jnp.log2(jnp.maximum(dims, 1))[:, None] - grid[:-1]) / np.diff(grid), 0, 1)
  steps = np.diff(logs, axis=0).astype(np.float32)
  ratios = jnp.exp(logs[0].astype(np.float32) + jnp.matmul(below, steps, precision=jax.lax.Precision.HIGHEST))
  return ratios[:, : window - 1], ratios[:, window - 1 :]


@functools.partial(jax.jit, static_argnums=(1, 2))  # as above
def _own_ratios(energy: jax.Array, momentum: float, every: int) -> jax.Array:
  """float32[G, W - 1]: ratios of noise in rows of these sums of squares [G, W], seen through endless dimensions."""
  if not momentum:  # such rows are orthogonal
    return ratios_of(jnp.sqrt(jnp.sort(energy, -1)[:, ::-1]))
  covariance = _null.row_covariance(energy.shape[-1], momentum, every)
  norms = jnp.sqrt(energy)
  gram = norms[:, :, None] * norms[:, None, :] * np.asarray(covariance / covariance[0, 0], np.float32)
  return ratios_of(_gram.descending_spectrum(gram[None])[0])


def _thresholds(energy: jax.Array, dims: jax.Array, momentum: float, every: int) -> tuple[jax.Array, jax.Array]:
  """As `_noise_thresholds`, for rows of these sums of squares [G, W]."""
  logs = jnp.log(jnp.maximum(energy, 1e-30)) / 2
  deviation = jnp.std(logs, -1, ddof=1)
  margin = jnp.minimum(_ERRORS * jax.lax.rsqrt(jnp.maximum(dims, 1)), _DEVIATIONS * deviation)[:, None]
  own = _own_ratios(energy, momentum, every)
  enter, leave = _noise_thresholds(energy.shape[-1], momentum, every, dims)
  return jnp.maximum(enter, own * jnp.exp(margin)), jnp.maximum(leave, own * jnp.exp(_STAYS * margin))


def _selected(x: jax.Array, index: jax.Array, axis: int = -1) -> jax.Array:
  """As `_gathered`, for TPUs, where a gather of ten numbers moves 300 kB."""
  x = jnp.moveaxis(x, axis, -1)
  here = index[:, None] == jnp.arange(x.shape[-1], dtype=jnp.int32)
  return jnp.moveaxis(jnp.where(here, x[..., None, :], 0).sum(-1, dtype=x.dtype), -1, axis)


def _gathered(x: jax.Array, index: jax.Array, axis: int = -1) -> jax.Array:
  """The entries of x with these indices along one axis, which has them all."""
  return jnp.take(x, index, axis, mode="clip")


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
  """The entries of x with these indices along the last axis, which has them all, in the platform's form."""
  return jax.lax.platform_dependent(x, index, tpu=_selected, default=_gathered)


def _of_slots(rows: Rows, slots: jax.Array) -> Rows:
  """The facts about some slots, in this order."""

  def of(take: Callable[..., jax.Array]) -> Callable[[Rows, jax.Array], Rows]:
    return lambda rows, slots: Rows(
      take(take(rows.gram, slots, -2), slots),
      take(rows.scale, slots),
      take(rows.dims, slots),
      take(rows.noise_dims, slots),
      take(rows.steps, slots),
    )

  return jax.lax.platform_dependent(rows, slots, tpu=of(_selected), default=of(_gathered))


def _follow(
  rows: Rows, before: jax.Array, weights: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The leading direction by slot [G, n], its inner products with the scaled rows [G, n], and 1 - |cos| with `before`.

  `weights` [G, W] are those of the newest row to the oldest.
  """
  window = weights.shape[-1]
  age = (order[0] - jnp.arange(order.shape[0], dtype=jnp.int32)) % order.shape[0]  # by slot
  direction = jnp.where(age < window, _taken(weights, jnp.minimum(age, window - 1)), 0)
  projections = jnp.einsum("gij,gj->gi", rows.gram[0], direction, precision=jax.lax.Precision.HIGHEST)
  sign = jnp.where((projections * before).sum(-1) < 0, -1, 1).astype(jnp.float32)
  # As half of a squared distance, which keeps its digits when the directions nearly agree.
  change = direction - sign[:, None] * before
  turning = jnp.einsum("gi,gij,gj->g", change, rows.gram[0], change, precision=jax.lax.Precision.HIGHEST) / 2
  return direction, projections, turning


@functools.partial(jax.jit, static_argnames=("window", "k_max", "momentum", "every", "exact"), inline=True)
def report_window(
  rows: Rows,
  state: WindowState,
  order: jax.Array,
  count: jax.Array,
  filled: jax.Array,
  *,
  window: int,
  k_max: int,
  momentum: float,
  every: int,
  exact: bool,
) -> tuple[Report, WindowState]:
  """The report of the newest `window` rows of every group, and the state for the next row.

  Args:
    rows: the ring's small facts.
    state: of this window size.
    order: int32[n], slots from the newest row to the oldest.
    count: int32[], rows pushed since the tracker began, this one included.
    filled: int32[], rows that the ring holds, this one included.
    window, k_max, momentum, every, exact: static configuration.

  Returns:
    A Report with leading axis [G] whose skipped counters are 0 (the caller knows them), and the new state.
  """
  newest = _of_slots(rows, order[:window])
  largest = jnp.max(newest.scale, -1)
  unit = jnp.where(largest > 0, largest, 1)
  shrink = newest.scale / unit[:, None]
  gram = newest.gram * (shrink[:, :, None] * shrink[:, None, :])
  relative, leading = _gram.descending_spectrum(gram)
  energy = jnp.diagonal(gram[0], axis1=-2, axis2=-1)
  total = energy.sum(-1)
  some = total > 0

  def share(x: jax.Array) -> jax.Array:
    return jnp.where(some, x / jnp.where(some, total, 1), 0)

  sigma = relative * unit[:, None]
  full = filled >= window
  ratios = ratios_of(sigma)

  def mean(dims: jax.Array) -> jax.Array:
    inverse = share((energy / jnp.maximum(dims, 1)).sum(-1))
    return jnp.where(some, 1 / jnp.where(inverse > 0, inverse, 1), 0)

  dims = mean(newest.dims)
  k_star, top, ambiguous = find_edge(ratios, k_max, dims, exact)
  # A row of zeros, as of a group that is frozen, is no motion; ratios among the others would be those of fewer rows.
  moved = jnp.all(newest.scale > 0, -1)
  usable = full & moved
  # One eigenproblem after the other (see `_push`).
  enter, leave = _thresholds(later_than(energy, relative), mean(newest.noise_dims), momentum, every)

  def at_edge(table: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, k_star[:, None] - 1, -1)[:, 0]

  null_ratio = at_edge(enter)
  phase = step_phase(state.phase, top, null_ratio, at_edge(leave), usable, window)

  sigma_1 = jnp.where(some, relative[:, 0], 1)
  weights = jnp.where(some[:, None], leading * shrink / sigma_1[:, None], 0)  # of the scaled rows
  direction, projections, turning = _follow(rows, state.direction, weights, order)
  norm = jnp.sqrt(jnp.maximum(newest.gram[0][:, 0, 0], 0))
  here = jnp.arange(order.shape[0], dtype=jnp.int32) == order[0]
  alignment = jnp.abs(jnp.where(here, projections, 0).sum(-1)) / jnp.where(norm > 0, norm, 1)

  spread = jnp.cumsum(relative**2, -1)
  k95 = jnp.sum(spread < np.float32(0.95) * spread[:, -1:], -1).astype(jnp.int32) + 1
  present = jnp.arange(window, dtype=jnp.int32) < filled
  partial = jnp.any(present & (jnp.abs(newest.steps) != every))
  bits = (
    jnp.where(usable, 0, int(Status.WINDOW_FILLING))
    + jnp.where(usable & (sigma[:, -1] < sigma[:, 0] * FLOOR), int(Status.BELOW_FLOOR), 0)
    + jnp.where(some & (dims < LOW_DIM) & (not exact), int(Status.LOW_EFFECTIVE_DIM), 0)
    + jnp.where(partial, int(Status.PARTIAL_ROW), 0)
    + jnp.where(jnp.any(present & (newest.steps < 0)), int(Status.CANCELLATION), 0)
  )
  groups = sigma.shape[0]

  def everywhere(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (groups,)).astype(jnp.int32)

  report = Report(
    singular_values=sigma,
    ratios=ratios,
    k_star=jnp.where(usable, k_star, 0).astype(jnp.int32),
    gap_ratio=jnp.where(usable, top, 0),
    null_ratio=jnp.where(usable, null_ratio, 0),
    edge_ambiguous=usable & ambiguous,
    pc1_fraction=share(relative[:, 0] ** 2),
    k95=jnp.where(some, k95, 0).astype(jnp.int32),
    drift_speed=jnp.sqrt(jnp.maximum(gram[0].sum((-2, -1)), 0)) / jnp.clip(filled, 1, window) * unit,
    alignment=jnp.clip(alignment, 0, 1),
    turning=jnp.where((filled > window) & some & jnp.any(state.direction != 0, -1), jnp.clip(turning, 0, 1), 0),
    last_update_norm=norm * newest.scale[:, 0],
    effective_dim=dims,
    phase=phase.phase,
    count=everywhere(count),
    row_steps=everywhere(jnp.abs(newest.steps[0])),
    skipped_nonfinite=everywhere(jnp.int32(0)),
    skipped_zero=everywhere(jnp.int32(0)),
    status=bits.astype(jnp.int32),
  )
  return report, WindowState(phase, direction)
