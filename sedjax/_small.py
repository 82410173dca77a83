"""The count sketch of small leaves, which are signed and placed as one. See `_count`.

A model has many vectors. A kernel for each would take longer to compile, and on GPU to start, than all of their numbers
take to add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._count import Piece, Plan, flip, hashes_of, part_of, row_signs

# Numbers in a leaf at most: a CPU adds one in 2 ns, and starts a kernel in as much as 2,000 of them take.
MOST = 2**12
# Leaves that are added as one: as much as 2 MiB.
_LEAVES = 128


def is_small(piece: Piece, plan: Plan) -> bool:
  """Whether a leaf's rows need no sums, and are few."""
  return piece.hashes is None and plan.lot == 1 and piece.array.size <= MOST


def lots(
  pieces: Sequence[Piece], plans: Sequence[Plan], groups: Sequence[int]
) -> Iterator[tuple[int, list[Piece], list[Plan]]]:
  """Small leaves of one group and dtype, and the group."""
  kinds: dict[tuple[int, Any], list[int]] = {}
  for i, (piece, plan) in enumerate(zip(pieces, plans, strict=True)):
    if is_small(piece, plan):
      kinds.setdefault((groups[i], piece.array.dtype), []).append(i)
  for (group, _), found in kinds.items():
    for first in range(0, len(found), _LEAVES):
      some = found[first : first + _LEAVES]
      yield group, [pieces[i] for i in some], [plans[i] for i in some]


def places_of(plan: Plan, dim: int) -> np.ndarray:
  """int64[size]: into which bucket each number of a leaf falls."""
  bucket = plan.bucket(np.arange(plan.rows, dtype=np.uint32)).astype(np.int64)[:, None]
  column, half, end = (np.arange(plan.columns) + plan.shift) % plan.columns, dim // 2, plan.pairs * plan.columns
  left = np.where(column < half - end, end + column, 2 * end + column)  # in the gaps that the others leave
  place = bucket % plan.pairs * plan.columns + column + bucket // plan.pairs * half
  return (plan.offset + np.where(bucket < 2 * plan.pairs, place, left)).reshape(-1) % dim


def small_row(
  pieces: Sequence[Piece], plans: Sequence[Plan], dim: int, seed: int, part: Any, grid: Any, wait: Any
) -> jax.Array:
  """float32[dim]: what a lot of small leaves adds to a row; it waits for what `wait` is made of, a 0 as uint32[]."""
  signs, places = [], []
  for piece, plan in zip(pieces, plans, strict=True):
    places.append(places_of(plan, dim))
    signs.append(row_signs(hashes_of(piece.path, piece.array.shape, seed), 0, plan.rows).reshape(-1) < 0)
  bits = jnp.asarray(np.concatenate(signs).astype(np.uint8)).astype(jnp.uint32) << 31
  numbers = [piece.array.reshape(-1) for piece in pieces]
  if wait is not None:
    numbers[0] = flip(numbers[0], wait << 31).astype(numbers[0].dtype)
  x = part_of(flip(jnp.concatenate(numbers), bits), part, grid)
  at = np.concatenate(places)

  def scattered(x: jax.Array) -> jax.Array:
    return jnp.zeros((dim,), x.dtype).at[at].add(x, mode="promise_in_bounds")

  return lax.platform_dependent(x, cpu=scattered, default=lambda x: gathered_row(x, at, dim))


def gathered_row(x: jax.Array, at: np.ndarray, dim: int) -> jax.Array:
  """Adds numbers x [n] into places `at` [n] of zeros [dim], where scatters add in an order that chance decides."""
  order = np.argsort(at, kind="stable")
  place = at[order]
  turn = np.arange(at.size) - np.searchsorted(place, place)  # how many numbers came into the same place before
  source = np.full((turn.max() + 1, dim), at.size, np.int32)
  source[turn, place] = order
  return jnp.pad(x, (0, 1)).at[source].get(mode="promise_in_bounds").sum(0)
