"""The training phase from a stream of gap ratios, without hindsight.

NO_EDGE until the ratio leaves what noise shows; RISE while it keeps climbing; PLATEAU once its growth has slowed, by
more than its own jitter explains, or no new peak has come for a window, and while it stays above 0.85 of the running
peak; COLLAPSE below that. Growth beyond the plateau's peak, or a recovery from the collapse, by the same factor is a
new RISE with a new peak.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedjax._types import Phase

_HOLD = np.float32(0.85)
# A rise has settled once it grows, by so many standard errors, at less than this share of its mean growth. Both were
# chosen on planted phases: a plateau is then seen within a window, and a slow, noisy rise stays one phase.
_SLOWED, _Z = np.float32(0.75), np.float32(1.5)


class PhaseState(NamedTuple):
  """Streaming state; every field is [G]."""

  phase: jax.Array  # int32
  peak: jax.Array  # float32, running peak since the rise began
  peak_age: jax.Array  # int32, rows since that peak
  anchor: jax.Array  # float32: ratio where the rise began; on a plateau the peak at its entry; in a collapse the trough
  slope: jax.Array  # float32, smoothed growth a row
  previous: jax.Array  # float32, the last ratio
  growth: jax.Array  # float32, its growth over the row before
  jitter: jax.Array  # float32, smoothed variance of the growth, from its changes
  age: jax.Array  # int32, rows since the phase began


def init_phase(groups: int) -> PhaseState:
  """Before the first row: WARMUP everywhere."""
  dtypes = {"phase": jnp.int32, "age": jnp.int32, "peak_age": jnp.int32}
  return PhaseState(**{name: jnp.zeros((groups,), dtypes.get(name, jnp.float32)) for name in PhaseState._fields})


def step_phase(
  state: PhaseState, ratio: jax.Array, enter: jax.Array, leave: jax.Array, full: jax.Array, window: int
) -> PhaseState:
  """One row later: `ratio` [G] against the thresholds for entering and leaving an edge; WARMUP where not `full`."""
  settle = max(2, window // 3)
  age = state.age + 1
  growth = jnp.where(state.previous > 0, ratio - state.previous, 0)
  weight = np.float32(2 / (settle + 1))
  slope = state.slope + weight * (growth - state.slope)
  change = growth - state.growth
  jitter = state.jitter + np.float32(2 / (window + 1)) * (change * change / 2 - state.jitter)
  error = jnp.sqrt(jitter * weight / (2 - weight))
  peak_age = jnp.where(ratio >= state.peak, 0, state.peak_age + 1)
  peak = jnp.maximum(state.peak, ratio)
  was = state.phase
  outside = (was == Phase.WARMUP) | (was == Phase.NO_EDGE)
  rising, flat, falling = was == Phase.RISE, was == Phase.PLATEAU, was == Phase.COLLAPSE
  trough = jnp.minimum(state.anchor, ratio)
  mean_growth = jnp.maximum((ratio - state.anchor) / age, np.float32(0.02 / window) * ratio)
  slowed = slope + _Z * error < _SLOWED * mean_growth
  settled = (age >= settle) & (slowed | (peak_age >= window))

  gone = ~outside & (ratio < leave)
  begins = (outside & (ratio > enter)) | (flat & (ratio * _HOLD > state.anchor)) | (falling & (ratio * _HOLD > trough))
  drops = (rising | flat) & (ratio < _HOLD * peak)
  settles = rising & settled
  stays_out = outside & ~begins
  phase = was
  # From the last to the first, which outweighs the others. (`jnp.select` fails for seeds over an explicit mesh axis.)
  for condition, to in (
    (settles, Phase.PLATEAU),
    (drops, Phase.COLLAPSE),
    (begins, Phase.RISE),
    (gone | stays_out, Phase.NO_EDGE),
  ):
    phase = jnp.where(condition, int(to), phase)
  changed = phase != was
  new = PhaseState(
    phase=phase,
    peak=jnp.where(changed & (phase == Phase.RISE), ratio, peak),
    peak_age=jnp.where(changed, 0, peak_age),
    anchor=jnp.where(changed, jnp.where(phase == Phase.PLATEAU, peak, ratio), jnp.where(falling, trough, state.anchor)),
    slope=jnp.where(changed, 0, slope),
    previous=ratio,
    growth=growth,
    jitter=jitter,
    age=jnp.where(changed, 0, age),
  )
  return jax.tree.map(lambda x: jnp.where(full, x, 0), new)
