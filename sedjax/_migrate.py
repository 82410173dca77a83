"""Carrying an optimizer state over to an optimizer with other trackers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sedjax._state import Parts, TrackerState, map_id_of, of_one_seed, pack, unpack, unpack_reports, window_sizes
from sedjax._transform import SpectralEdgeState


def _is_tracker(node: Any) -> bool:
  return isinstance(node, SpectralEdgeState)


def _name(path: tuple[Any, ...]) -> str:
  """The field names and dict keys on the way to a leaf: positions in a chain change, these do not."""
  named = (getattr(key, "name", getattr(key, "key", None)) for key in path)
  return "/".join(name if isinstance(name, str) else repr(name) for name in named if name is not None)


def migrate(old_state: Any, new_state: Any) -> Any:
  """Carries an optimizer state over to an optimizer that differs in its trackers only.

  One function attaches, detaches and resizes: everything but the trackers is taken from `old_state` as it is; a tracker
  of the same name in both keeps its newest rows, with reports and phases for the window sizes that both have (a new
  size has its first `turning` one row later than its other numbers); a tracker that is only in `new_state` starts
  empty, and says WINDOW_FILLING until it is full. Where `every` changed, rows of both lengths share the window for a
  while, and the status says PARTIAL_ROW; with `every=1` the steps since the last row are lost. A tracker that moved to
  another place in the chain keeps its rows, too: where it watches something else now, gradients and no longer updates,
  say, give it another name.

  Args:
    old_state: any optax state, for instance restored from a checkpoint.
    new_state: `tx.init(params)` of the optimizer to go on with.

  Returns:
    A state of `new_state`'s structure, shapes and dtypes.

  Raises:
    ValueError: the optimizers differ in more than their trackers; a tracker kept its name but changed its sketch,
      tree, groups or source, so that old and new rows cannot share a window; or the states are traced.

  Cost: one copy of the trackers; the other arrays are not copied.

  Example:
    >>> import jax.numpy as jnp, optax, sedjax
    >>> params = {"w": jnp.ones(3)}
    >>> old = optax.adam(1e-3).init(params)
    >>> tx = optax.chain(optax.adam(1e-3), sedjax.track_spectral_edge(window=3))
    >>> state = sedjax.migrate(old, tx.init(params))
    >>> int(sedjax.get_report(state).count)
    0
  """
  for which, state in (("old", old_state), ("new", new_state)):
    if isinstance(state, optax.GradientTransformation):
      raise ValueError(f"sedjax.migrate: the {which} state is an optimizer; give its state, such as tx.init(params).")
  trackers: dict[str, TrackerState] = {}
  others: list[tuple[str, Any]] = []  # of the old state, with their names
  for path, leaf in jax.tree_util.tree_leaves_with_path(old_state, is_leaf=_is_tracker):
    if isinstance(leaf, SpectralEdgeState):
      twice = trackers.keys() & leaf.trackers.keys()
      if twice:
        raise ValueError(f"sedjax.migrate: two trackers of the old state have one name, {min(twice)!r}.")
      trackers |= leaf.trackers
    else:
      others.append((_name(path), leaf))
  leaves = jax.tree_util.tree_leaves_with_path(new_state, is_leaf=_is_tracker)
  _check_names([name for name, _ in others], [_name(path) for path, leaf in leaves if not _is_tracker(leaf)])
  rest = iter(others)

  def take(leaf: Any) -> Any:
    if isinstance(leaf, SpectralEdgeState):
      carried = {
        name: _carry(name, trackers[name], tracker) if name in trackers else tracker
        for name, tracker in leaf.trackers.items()
      }
      return SpectralEdgeState(carried)
    name, old = next(rest)
    dtype = jnp.result_type(leaf)
    if isinstance(old, int | float):  # some loaders restore scalars so
      old = jnp.asarray(old, dtype)
    if np.shape(old) != np.shape(leaf) or old.dtype != dtype:
      raise ValueError(
        f"sedjax.migrate: {name!r} is {old.dtype}{list(np.shape(old))} in the old state and "
        f"{dtype}{list(np.shape(leaf))} in the new one; both must be for the same parameters."
      )
    return old

  return jax.tree.map(take, new_state, is_leaf=_is_tracker)


def _check_names(old: list[str], new: list[str]) -> None:
  """Refuses states whose arrays outside of trackers have other names, or the same ones in another order."""
  lacking, left = Counter(new) - Counter(old), Counter(old) - Counter(new)
  if lacking:
    raise ValueError(
      f"sedjax.migrate: the old state has no array for {next(iter(lacking))!r}; both states must come from optimizers "
      "that differ in their trackers only, restored with the old optimizer's own state as the target."
    )
  if left:
    raise ValueError(
      f"sedjax.migrate: the new state has no place for {next(iter(left))!r}; both states must come from optimizers "
      "that differ in their trackers only."
    )
  moved = next((name for name, other in zip(old, new, strict=True) if name != other), None)
  if moved is not None:
    raise ValueError(
      f"sedjax.migrate: {moved!r} comes at another place among the arrays of the new state; both states must come from "
      "optimizers that differ in their trackers only, with all else in the same order."
    )


def _carry(name: str, old: TrackerState, new: TrackerState) -> TrackerState:
  if any(isinstance(state.counters, Tracer) for state in (old, new)):
    raise ValueError("sedjax.migrate: the states are traced, so they cannot be compared; call it outside jit and vmap.")
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((old, new))):
    raise ValueError("sedjax.migrate: a state is abstract, so there is nothing to carry; give two states of arrays.")
  lead = old.counters.ndim - 1
  seeds = [state.counters.shape[:-1] for state in (old, new)]
  if seeds[0] != seeds[1]:
    raise ValueError(
      f"sedjax.migrate: the old state of tracker {name!r} has vmapped axes {seeds[0]}, the new one {seeds[1]}; make "
      "both states for the same seeds."
    )
  one, other = (
    [of_one_seed(x, ndim).tolist() for x, ndim in ((map_id_of(state), 1), (state.labels, 2))] for state in (old, new)
  )
  same_rows = jax.tree.structure((old.rows, old.base)) == jax.tree.structure((new.rows, new.base))
  if one != other or not same_rows:
    raise ValueError(
      f"sedjax.migrate: tracker {name!r} changed its sketch, tree, groups or source, so its rows cannot be carried "
      "over; give the new tracker another name to start it empty, or build it as the old one was."
    )
  carry = _carry_one
  for _ in range(lead):
    carry = jax.vmap(carry)
  return carry(old, new)


def _carry_one(old: TrackerState, new: TrackerState) -> TrackerState:
  """The newest rows of `old` in the ring of `new`, oldest in slot 0; the row that is being summed comes next."""
  old_sizes, new_sizes = window_sizes(old), window_sizes(new)
  parts = _carry_parts(unpack(old), unpack(new), old_sizes, new_sizes)
  found = dict(zip(old_sizes, unpack_reports(old), strict=True))
  reports = [
    found[size] if size in found else report._replace(count=jnp.full_like(report.count, parts.pushed))
    for size, report in zip(new_sizes, unpack_reports(new), strict=True)
  ]
  return pack(parts, reports)


def _carry_parts(old: Parts, new: Parts, old_sizes: tuple[int, ...], new_sizes: tuple[int, ...]) -> Parts:
  old_slots, slots = old.facts.steps.shape[-1], new.facts.steps.shape[-1]
  kept = jnp.minimum(old.filled, min(old_slots, slots) - 1)
  index = jnp.arange(slots, dtype=jnp.int32)
  present = index < kept
  # Where each new slot's content stood in the old ring; the slot after the kept rows is the one being summed.
  source = jnp.where(index <= kept, (old.cursor - kept + index) % old_slots, 0)

  def along(x: jax.Array, axis: int, mask: jax.Array) -> jax.Array:
    shape = [1] * x.ndim
    shape[axis] = slots
    return jnp.where(mask.reshape(shape), jnp.take(x, source, axis), 0).astype(x.dtype)

  facts = old.facts
  facts = facts._replace(
    gram=along(along(facts.gram, -1, present), -2, present),
    scale=along(facts.scale, -1, present),
    dims=along(facts.dims, -1, present),
    noise_dims=along(facts.noise_dims, -1, present),
    steps=along(facts.steps, 0, index <= kept),
  )
  by_size = {size: j for j, size in enumerate(old_sizes)}
  windows, histories = [], []
  for i, size in enumerate(new_sizes):
    j = by_size.get(size)
    if j is None:
      windows.append(new.windows[i])
    else:
      direction = along(old.windows[j].direction, -1, present)
      windows.append(old.windows[j]._replace(direction=direction))
    if new.history:
      histories.append(new.history[i] if j is None or not old.history else _carry_history(old, new, i, j))
  return new._replace(
    rows=jax.tree.map(lambda ring: along(ring, 0, index <= kept), old.rows),
    base=old.base,
    facts=facts,
    cursor=kept,
    pushed=old.pushed,
    filled=kept,
    elapsed=old.elapsed,
    nonfinite=old.nonfinite,
    zero=old.zero,
    flags=old.flags,
    windows=tuple(windows),
    history=tuple(histories),
  )


def _carry_history(old: Parts, new: Parts, i: int, j: int) -> Any:
  """The newest of the old reports, each in the place that its number has in the new ring."""
  old_ring, new_ring = old.history[j], new.history[i]
  old_length, length = old_ring.ints.shape[0], new_ring.ints.shape[0]
  place = jnp.arange(length, dtype=jnp.int32)
  age = (old.pushed - 1 - place) % length  # how many reports ago the one in this place was made
  number = old.pushed - 1 - age
  known = (age < old_length) & (number >= 0)

  def move(x: jax.Array, empty: jax.Array) -> jax.Array:
    moved = jnp.take(x, number % old_length, 0)
    return jnp.where(known.reshape((length,) + (1,) * (x.ndim - 1)), moved, empty)

  return jax.tree.map(move, old_ring, new_ring)
