"""The count sketch of leaves of a few long rows, such as a flattened model, on CPU. See `_count`.

Their bucket sums would be as large as they are. So they are summed some laps around the sketch at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._count import HASH_ROWS, Piece, Plan, index_hash, mix, slice_of, sum_dtype, sum_rows

# Numbers in a leaf at least: the sums of shorter ones are stored, in 4 MiB.
_LEAST = 2**20
# Slices of a leaf that one kernel sums.
_SLICES = 16


def is_long(piece: Piece, plan: Plan) -> bool:
  """Whether a leaf's rows share their hashes and their buckets, and are long."""
  return plan.rows <= HASH_ROWS and plan.pairs == 1 and piece.array.size > _LEAST


def long_row(piece: Piece, plan: Plan, dim: int, part: int | None, grid: Any) -> jax.Array:
  """float32[dim]: what a long leaf adds to a row, before it is rolled to the leaf's offset."""
  x = piece.array.reshape(plan.rows, plan.columns)
  row_hash = index_hash(np.zeros(1, np.uint32), ~plan.key) if piece.hashes is None else piece.hashes.rows

  def column_hashes(first: Any, count: int) -> Any:
    if piece.hashes is not None:
      return lax.dynamic_slice_in_dim(piece.hashes.columns, first, count)
    return index_hash(lax.iota(jnp.uint32, count) + jnp.asarray(first, jnp.uint32), plan.key)

  half_of = plan.bucket(np.arange(plan.rows, dtype=np.uint32))
  halves = [np.flatnonzero(half_of == half).tolist() for half in range(plan.buckets)]

  def add(rows: list[jax.Array], first: Any, count: int) -> list[jax.Array]:
    rows = list(rows)
    for lap in range(0, count, dim):  # each with operations of its own: those that all share XLA would store
      at, width = first + lap, min(dim, count - lap)
      bits = mix(row_hash ^ column_hashes(at, width))
      for half, index in enumerate(halves):
        blocks = [slice_of(x[i], at, width, 0) for i in index]
        rows[half] = rows[half] + jnp.pad(sum_rows(blocks, index, bits, part, grid), (0, dim - width))
    return rows

  size = dim * max(1, _SLICES // plan.rows)
  whole, rest = divmod(plan.columns, size)
  rows = add([jnp.zeros((dim,), sum_dtype(part))] * len(halves), whole * size, rest)
  if whole:
    rows = lax.fori_loop(np.uint32(0), np.uint32(whole), lambda i, rows: add(rows, i * np.uint32(size), size), rows)
  return rows[0] if len(rows) == 1 else rows[0] + jnp.roll(rows[1], dim // 2)
