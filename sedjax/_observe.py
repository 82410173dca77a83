"""What one step does to the state, for both sources of rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sedjax._config import Config
from sedjax._layout import Layout
from sedjax._push import choose, push, write
from sedjax._rows import LARGEST, largest, make_row, read_parameters
from sedjax._state import Parts, TrackerState, pack_counters, unpack, without_rows

# Both kinds of `observe` unpack the state again in each branch, so that steps between rows unpack only what they need.
# They are functions of arrays under jit, since a `cond` outside of it is compiled at every call.


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def observe_updates(
  config: Config, layout: Layout, leaves: tuple[Any, ...], packed: TrackerState, step: Any
) -> TrackerState:
  """The state after one more update, which is added to the row under the cursor; None for leaves not tracked."""
  layout = layout._replace(leaves=leaves)
  state = unpack(packed)
  row = make_row(config, layout, state.rows)
  size = largest(config, layout, row)
  finite, zero = size < LARGEST, size == 0
  first = state.elapsed == 0
  if config.every > 1 or step is not None:
    current = jax.tree.map(lambda ring: jnp.where(first, 0, ring[state.cursor]), state.rows)
    row = jax.tree.map(jnp.add, current, row)
    finite = largest(config, layout, row) < LARGEST
    row = jax.tree.map(lambda new, old: jnp.where(finite, new, old), row, current)
    used = jnp.where(first, 0, state.facts.steps[state.cursor]) + finite.astype(jnp.int32) - zero.astype(jnp.int32)
    pushed_row = row
  else:
    finite_row = jax.tree.map(lambda new: jnp.where(finite, new, 0), row)
    # A sketch is pushed as it is, so that its largest number is sought once; what is not finite is not chosen below.
    pushed_row, row = finite_row if config.exact else row, finite_row
    used = finite.astype(jnp.int32)
  elapsed = state.elapsed + (~zero).astype(jnp.int32)
  due = (elapsed >= config.every) & ~zero if step is None else (jnp.asarray(step) + 1) % config.every == 0
  complete = due & (elapsed > 0) & (used > 0)  # a row whose steps were all left out starts afresh
  here = jnp.arange(config.slots, dtype=jnp.int32) == state.cursor
  counted = state._replace(
    facts=state.facts._replace(steps=jnp.where(here, used, state.facts.steps)),
    elapsed=jnp.where(due, 0, elapsed),
    nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
    zero=state.zero + zero.astype(jnp.int32),
  )
  waiting = without_rows(packed)._replace(counters=pack_counters(counted))

  def complete_row(waiting: TrackerState) -> TrackerState:
    pushed = push(config, layout, unpack(waiting._replace(rows=state.rows)), pushed_row, used)
    return choose(complete, pushed, waiting)

  new = (
    complete_row(waiting)
    if config.every == 1 and step is None
    else jax.lax.cond(due, complete_row, lambda x: x, waiting)
  )
  return new._replace(rows=write(state.rows, state.cursor, row, new))


def _largest_base(config: Config, layout: Layout, base: Any) -> jax.Array:
  return largest(config, layout, jax.tree.map(lambda x: x[0], base) if config.exact else base)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def observe_params(
  config: Config, layout: Layout, leaves: tuple[Any, ...], packed: TrackerState, step: Any
) -> TrackerState:
  """The state after one more step, before which the parameters were these; None for leaves not tracked."""
  layout = layout._replace(leaves=leaves)
  outside = unpack(packed)
  rows, cursor, elapsed = packed.rows, outside.cursor, outside.elapsed
  # `elapsed` is 0 until there is a base, then the number of steps since it was read.
  due = elapsed % config.every == 0 if step is None else jnp.asarray(step) % config.every == 0

  def longer(state: Parts) -> jax.Array:
    return state.elapsed + (state.elapsed > 0).astype(jnp.int32)

  def later(packed: TrackerState) -> tuple[TrackerState, Any]:
    state = unpack(packed)
    waiting = packed._replace(counters=pack_counters(state._replace(elapsed=longer(state))))
    return waiting, jax.tree.map(lambda ring: jnp.zeros_like(ring[0]), rows)

  def read(packed: TrackerState) -> tuple[TrackerState, Any]:
    state = unpack(packed._replace(rows=rows))
    base, row, lossy = read_parameters(config, layout, state.rows, state.base)
    started = state.elapsed > 0
    size = largest(config, layout, row)
    finite = (_largest_base(config, layout, base) < LARGEST) & (~started | (size < LARGEST))
    zero = started & finite & (size == 0)
    accept = started & finite & ~zero
    keep = ~finite | zero
    counted = state._replace(
      nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
      zero=state.zero + zero.astype(jnp.int32),
      elapsed=jnp.where(keep, longer(state), 1),
      base=(),
    )
    row = jax.tree.map(lambda x: jnp.where(accept, x, 0), row)
    pushed = push(config, layout, counted, row, state.elapsed, lossy)
    waiting = packed._replace(counters=pack_counters(counted), base=())
    new = choose(accept, pushed, waiting)
    return new._replace(base=choose(keep, state.base, base)), row

  packed = without_rows(packed)
  new, row = read(packed) if config.every == 1 and step is None else jax.lax.cond(due, read, later, packed)
  return new._replace(rows=write(rows, cursor, row, new))
