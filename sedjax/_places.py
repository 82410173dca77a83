"""Where the sums of a leaf's lots are added up, and how they are laid out in a sketch. See `_count`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._count import Plan, folded_sum, halves_of, is_odd

# Slices of an array that are summed by one expression.
_SLICES = 128
# Turns through all rows of buckets that are, of lots of one row.
_TURNS = 32
# Sketches of so many numbers are worth two kernels, each of which reads half as much, instead of one.
_LARGE = 2**15


class At(NamedTuple):
  """Where a leaf's first lot falls."""

  first: Any  # row of buckets for its rows of even parity; of leaves with a place of their own, that place
  second: Any = 0  # for those of odd parity
  shift: Any = 0  # column


class Places(NamedTuple):
  """How leaves of one shape fall into buckets; hashable."""

  shared: bool
  columns: int
  pairs: int
  buckets: int
  dim: int

  @property
  def planes(self) -> int:
    """2 where sums of even and of odd parity are added up apart; 1 where those of pairs' first buckets come first."""
    return 1 if self.buckets == 2 * self.pairs and self.dim >= _LARGE else 2

  def at(self, plan: Plan) -> At:
    """Of a leaf with this plan."""
    if not self.shared:
      return At(plan.offset)
    return At(plan.turn, (plan.turn + (self.pairs if self.planes == 1 else 0)) % self.buckets, plan.shift)

  def zeros(self, dtype: Any) -> jax.Array:
    """What is added up before it is laid out, twice as long as it is along each axis that is gone around."""
    shape = (2 * self.buckets, self.planes, 2 * self.columns) if self.shared else (2, 2 * self.dim)
    return jnp.zeros(shape, dtype)

  def once(self, sums: jax.Array) -> jax.Array:
    """The same once around each axis."""
    if not self.shared:
      return sums[:, : self.dim] + sums[:, self.dim :]
    turns = sums[: self.buckets] + sums[self.buckets :]
    return turns[..., : self.columns] + turns[..., self.columns :]

  def row(self, turns: jax.Array, offset: int) -> jax.Array:
    """float32[dim]: what sums once around are in the sketch."""
    half = self.dim // 2
    if not self.shared:
      return jnp.roll(turns[0] + jnp.roll(turns[1], half), offset)
    parts = by_bucket([turns[:, i] for i in range(self.planes)], self.pairs)
    halves = halves_of([part.reshape(-1) for part in parts], self.dim)
    # Pairs that reach around the sketch do so by less than half of it.
    inside = [padded(each[:half], half) for each in halves]
    if halves[0].size > half:
      inside = [a + padded(b[half:], half) for a, b in zip(inside, halves[::-1], strict=True)]
    return jnp.roll(padded(jnp.concatenate(inside), self.dim), offset)


def by_bucket(turns: Sequence[Any], pairs: int) -> list[Any]:
  """What falls into pairs' first buckets [pairs, n], into their second ones, and into a row that is left [0 or 1, n].

  Args:
    turns: sums [g, n] of the rows of one parity, or those of even and those of odd parity.
    pairs: how many rows of pairs there are.
  """
  parts = [[each[:pairs], each[pairs : 2 * pairs], each[2 * pairs :]] for each in turns]
  if len(parts) == 1:
    return parts[0]
  even, odd = parts
  return [even[0] + odd[1], odd[0] + even[1], even[2] + odd[2]]


def lot_sums(lots: Any, parity: int, parts: int, first: int, rows: int) -> Any:
  """Sums of the rows of one parity of so many lots, [rows, n]; for jax and NumPy arrays.

  Args:
    lots: sums [lots·parts, 2, n] of rows of even and of odd parity, or a list of [lots·parts, n] for each.
    parity: the one that is meant.
    parts: how many of the sums are of one lot.
    first, rows: lots.
  """
  # Slices of what is given, since XLA would store a slice of which it is to make more. A part has a parity, too.
  sums = []
  for part in range(first * parts, first * parts + parts):
    mine, each = slice(part, part + (rows - 1) * parts + 1, parts), parity ^ is_odd(part % parts)
    sums.append(lots[each][mine] if isinstance(lots, list) else lots[mine, each])
  return functools.reduce(lambda a, b: a + b, sums)  # XLA hands a sum over an axis to a library


@functools.partial(jax.jit, static_argnames=("places", "parts", "number"))
def added(sums: jax.Array, lots: Any, at: At, places: Places, parts: int = 1, number: int = 0) -> jax.Array:
  """Sums with those of a leaf's lots added.

  Args:
    sums: see `Places.zeros`.
    lots: sums [lots·parts, 2, n] of rows of even and of odd parity, or a list of [lots·parts, n] for each parity.
    at: where the leaf's first lot falls.
    places: where the others do.
    parts: how many of the sums are of one lot.
    number: of the first of these lots, where they are less than a turn.
  """
  apart = places.shared and places.planes == 2
  # What a lot adds to one half, the next turn through all rows of pairs adds to the other.
  step = places.buckets if apart else places.pairs
  count = jax.tree.leaves(lots)[0].shape[0] // parts
  if count > _SLICES * step:  # XLA hands such sums to a library, which is slow where they are few
    size = places.buckets * parts
    whole = count // places.buckets * size
    of_turns = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]).sum(0), lots)
    sums, rest = added(sums, of_turns, at, places, parts), jax.tree.map(lambda x: x[whole:], lots)
    return added(sums, rest, at, places, parts) if count % places.buckets else sums

  def sums_of(half: int) -> jax.Array:
    """[lots, n]: what is added to one half; where parities are apart, those of one."""
    blocks = []
    for turn, first in enumerate(range(0, count, step)):
      found = lot_sums(lots, half if apart else (half + turn) % 2, parts, first, min(step, count - first))
      blocks.append(_filled(found, min(step, count)))
    return functools.reduce(jnp.add, blocks)

  def sums_of_both() -> jax.Array:
    """[lots, 2, n]: the same of both, which takes one kernel."""
    blocks = []
    for turn, first in enumerate(range(0, count, step)):
      found = lots[first : min(first + step, count)]
      blocks.append(_filled(found if apart or turn % 2 == 0 else found[:, ::-1], min(step, count)))
    return functools.reduce(jnp.add, blocks)

  number %= places.buckets
  at_once = parts == 1 and not isinstance(lots, list)
  if apart and at_once:
    return added_at(sums, sums_of_both(), at.first + number if number else at.first, 0, at.shift)
  if places.shared:
    for half, row in enumerate((at.first, at.second)):
      block = sums_of(half)[:, None]
      sums = added_at(sums, block, row + number if number else row, half if apart else 0, at.shift)
    return sums
  # Pairs are one row.
  halves = sums_of_both()[0] if at_once else jnp.concatenate([sums_of(half ^ number) for half in (0, 1)])
  return added_at(sums, jnp.stack([folded_sum(half, places.dim) for half in halves]), 0, at.first)


@functools.partial(jax.jit, static_argnames="places")
def added_rows(sums: jax.Array, rows: jax.Array, at: At, places: Places) -> jax.Array:
  """The same of lots of one row each [m, 1, n], of which every turn through all rows of buckets has a parity."""
  rows = rows[:, 0]
  turns, rest = divmod(rows.shape[0], places.buckets)
  by_parity = [[turn for turn in range(turns) if is_odd(turn) == odd] for odd in (0, 1)]
  if turns > 1:
    flat, size = rows[: turns * places.buckets].reshape(turns, -1), places.buckets * rows.shape[1]
    some = [
      flat[np.asarray(mine)].sum(0)
      if turns > _TURNS
      else functools.reduce(jnp.add, (rows.reshape(-1)[turn * size : (turn + 1) * size] for turn in mine))
      for mine in by_parity
    ]
    both = [each.reshape(places.buckets, -1) for each in some]
    sums = _added_halves(sums, by_bucket(both, places.pairs), at, places)
  elif turns:
    sums = _added_halves(sums, by_bucket([rows[: places.buckets]], places.pairs), at, places)
  if rest:  # by itself, since numbers beyond the end make all slower
    first, second, left = by_bucket([rows[rows.shape[0] - rest :]], places.pairs)
    sums = _added_halves(sums, [second, first, left] if is_odd(turns) else [first, second, left], at, places)
  return sums


def _added_halves(sums: jax.Array, halves: list[jax.Array], at: At, places: Places) -> jax.Array:
  """The same of what falls into pairs' first and second buckets [at most pairs, n], and into the row that is left."""
  for i, half in enumerate(halves[:2]):
    if half.size:
      sums = added_at(sums, folded_sum(half.reshape(-1), places.dim)[None], i, at.first)
  if halves[2].size:  # in the gaps that pairs leave in both halves
    begin = places.pairs * places.columns
    gap = places.dim // 2 - begin
    sums = added_at(sums, padded(halves[2][0], 2 * gap).reshape(2, gap), 0, at.first + begin)
  return sums


def _filled(block: jax.Array, rows: int) -> jax.Array:
  """A block with zeros instead of rows that it lacks."""
  return jnp.pad(block, [(0, rows - len(block)), *[(0, 0)] * (block.ndim - 1)]) if len(block) < rows else block


def padded(flat: jax.Array, size: int, at: int = 0) -> jax.Array:
  """[size]: zeros, with these numbers from a place on."""
  return lax.pad(flat, flat.dtype.type(0), [(at, size - at - flat.size, 0)]) if flat.size < size else flat


def _sliced_and_added(rows: jax.Array, numbers: jax.Array, start: Any) -> jax.Array:
  """An array with another one added from these indices on."""
  return lax.dynamic_update_slice(rows, lax.dynamic_slice(rows, start, numbers.shape) + numbers, start)


_sliced = jax.custom_batching.custom_vmap(_sliced_and_added)


@_sliced.def_vmap
def _(axis_size: int, in_batched: Any, rows: jax.Array, numbers: jax.Array, start: Any) -> tuple[jax.Array, bool]:
  """Slices again where the place is one for all: JAX's own rules gather and scatter, in two kernels."""
  axes = [0 if batched else None for batched in in_batched[:2]]
  if any(in_batched[2]):  # by a branch, of which vmap batches all results
    starts = [0 if batched else None for batched in in_batched[2]]
    return jax.vmap(_sliced_and_added, (*axes, starts), axis_size=axis_size)(rows, numbers, start), True
  rows, numbers = (
    x if axis == 0 else jnp.broadcast_to(x, (axis_size, *x.shape))
    for x, axis in zip((rows, numbers), axes, strict=False)
  )
  return _sliced(rows, numbers, [jnp.zeros_like(start[0]), *start]), True


def added_at(rows: jax.Array, numbers: jax.Array, *start: Any) -> jax.Array:
  """`_sliced_and_added`; where the indices are known, without a kernel of its own."""
  if all(isinstance(at, int) for at in start):
    ends = zip(start, rows.shape, numbers.shape, strict=True)
    return rows + lax.pad(numbers, numbers.dtype.type(0), [(at, whole - at - size, 0) for at, whole, size in ends])
  return _sliced(rows, numbers, [jnp.asarray(at, jnp.uint32) for at in start])  # int32 would be wrapped first
