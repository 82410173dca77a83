"""Takes a row into the window: its Gram column, and the reports that follow from it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedjax._config import Config
from sedjax._layout import Layout
from sedjax._order import later_than
from sedjax._reports import with_counters
from sedjax._rows import gram_column, sketch_column
from sedjax._spectrum import Rows, report_window
from sedjax._state import Parts, TrackerState, pack, pack_counters, pack_report, unpack, without_rows

_INT_MAX = np.iinfo(np.int32).max


def push(config: Config, layout: Layout, state: Parts, row: Any, steps: Any, lossy: Any = False) -> TrackerState:
  """The state, but for its rows, with `row`, of `steps` steps, in the window, and its reports.

  `lossy`: whether rounding may exceed 1 % of the row.
  """
  column = gram_column(config, layout, state.rows, row, state.cursor, state.facts.scale)
  return _enter(config, state, column, steps, lossy)


def _enter(
  config: Config, state: Parts, gram_column: tuple[Any, Any, Any], steps: Any, lossy: Any = False
) -> TrackerState:
  """As `push`, of a row's Gram column, scales and dimensions."""
  slot = state.cursor
  facts = state.facts
  column, scale, dims = gram_column
  # Selected, not written: what writes into an array is a kernel of its own.
  here = jnp.arange(config.slots, dtype=jnp.int32) == slot
  gram = jnp.where(here[:, None], column[..., None, :], jnp.where(here, column[..., None], facts.gram))
  facts = Rows(
    gram,
    jnp.where(here, scale[:, None], facts.scale),
    jnp.where(here, dims[0, :, None], facts.dims),
    jnp.where(here, dims[1, :, None], facts.noise_dims),
    jnp.where(here, jnp.where(lossy, -steps, steps), facts.steps),
  )
  count = jnp.minimum(state.pushed, _INT_MAX - 1) + 1
  filled = jnp.minimum(state.filled + 1, config.slots)
  order = (slot - jnp.arange(config.slots, dtype=jnp.int32)) % config.slots
  windows, reports, seen = [], [], facts
  for window, window_state in zip(config.windows, state.windows, strict=True):
    report, window_state = report_window(
      seen,
      window_state,
      order,
      count,
      filled,
      window=window,
      k_max=min(config.k_max or window // 2, window - 1),
      momentum=float(config.momentum),
      every=config.every,
      exact=config.exact,
    )
    reports.append(report)
    windows.append(window_state)
    # One eigenproblem after the other: jaxlib's solver of several at once (under vmap, or of groups) occupies a thread
    # of XLA's pool on CPU while it waits for others, and as many calls as there are threads would wait forever.
    seen = seen._replace(gram=later_than(seen.gram, report.null_ratio))
  history = tuple(
    jax.tree.map(
      lambda ring, new: ring.at[state.pushed % config.history].set(new),
      ring,
      pack_report(with_counters(state, report)),
    )
    for ring, report in zip(state.history, reports, strict=bool(state.history))
  )
  parts = state._replace(
    rows=(),
    facts=facts,
    cursor=(slot + 1) % config.slots,
    pushed=count,
    filled=filled,
    windows=tuple(windows),
    history=history,
  )
  return pack(parts, reports)


def write(rows: Any, slot: jax.Array, row: Any, after: TrackerState) -> Any:
  """Writes a row into the ring, after the Gram column has read the ring, so that XLA need not copy it."""
  row = jax.tree.map(lambda x: later_than(x, after.facts), row)
  return jax.tree.map(lambda ring, new: jax.lax.dynamic_update_index_in_dim(ring, new, slot, 0), rows, row)


def choose(condition: jax.Array, new: Any, old: Any) -> Any:
  """The new tree where the condition holds, else the old one."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def push_row(config: Config, state: TrackerState, row: Any, most: Any, steps: Any, lossy: Any = False) -> TrackerState:
  """Takes in a row that was sketched elsewhere, for example leaf by leaf from a file.

  Args:
    config: what to measure, with a random sketch.
    state: from `init` or the last call.
    row: float32[labels, dim], finite.
    most: float32[G], the most effective dimensions that rows of so many parameters have (see `most_dims`).
    steps: int32[], optimizer steps in the row.
    lossy: bool[], whether rounding may exceed 1 % of the row.

  Returns:
    The new state. A row of zeros is left out and counted.
  """
  parts = unpack(state)
  zero = jnp.max(jnp.abs(row)) == 0
  column, scale, dims = sketch_column(parts.rows, row, parts.cursor, parts.facts.scale)
  pushed = _enter(config, parts, (column, scale, jnp.minimum(dims, most)), jnp.asarray(steps, jnp.int32), lossy)
  waiting = without_rows(state)._replace(counters=pack_counters(parts._replace(zero=parts.zero + 1)))
  new = choose(zero, waiting, pushed)
  return new._replace(rows=write(parts.rows, parts.cursor, row, new))


def push_gram(config: Config, state: TrackerState, gram: Any, dims: Any, steps: Any) -> TrackerState:
  """Takes in a row of an exact tracker by its inner products, which were computed elsewhere.

  Args:
    config: what to measure, with `sketch.exact()`.
    state: from `init`, for a tree whose leaves hold no numbers, or from the last call.
    gram: float64[G, n] in NumPy, inner products of the row with itself and with the rows before it, newest first; 0
      beyond the first row.
    dims: float64[G] in NumPy, dimensions of the row.
    steps: int, optimizer steps in the row.

  Returns:
    The new state. A row of zeros is left out and counted.
  """
  parts = unpack(state)
  if not np.any(gram[0, 0] > 0):
    return state._replace(counters=pack_counters(parts._replace(zero=parts.zero + 1)))
  cursor, scales = int(parts.cursor), np.array(parts.facts.scale, np.float64)
  norms = np.sqrt(gram[:, 0])
  _, exponents = np.frexp(norms)  # scaled rows are shorter than 1
  scales[:, cursor] = np.where((norms > 0) & (exponents > -126), np.ldexp(1.0, np.minimum(exponents, 127)), 0)
  order = (cursor - np.arange(config.slots)) % config.slots
  product = scales[:, cursor, None] * scales[:, order]
  column = np.zeros_like(gram)
  column[:, order] = np.where(product > 0, gram / np.where(product > 0, product, 1), 0)
  high = column.astype(np.float32)
  pair = np.stack([high, (column - high).astype(np.float32)])
  scale, dims = scales[:, cursor].astype(np.float32), np.stack([dims, dims]).astype(np.float32)
  return _enter_pair(config, state, pair, scale, dims, np.int32(steps))


@functools.partial(jax.jit, static_argnums=0)
def _enter_pair(config: Config, state: TrackerState, pair: Any, scale: Any, dims: Any, steps: Any) -> TrackerState:
  return _enter(config, unpack(state), (pair, scale, dims), steps)._replace(rows=state.rows)
