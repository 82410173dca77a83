"""The map of the count sketch, which two forms compute that differ in the order of their sums only.

A leaf is m rows by n columns (its trailing axis; a vector is one row). The sign of (row, column) is bit (row mod 32) of
a 32-bit hash of (path, row div 32, column, seed); its bucket is ((row div p) mod g, column), where p <= 32 rows share a
bucket; the g bucket rows lie one after the other from a hashed offset on, folded into d.

*Strided* (in `_strided`), for whole leaves on one CPU or GPU: up to p rows are summed in one elementwise kernel, that
reads them as strided slices and makes one hash for them; what remains to be added up is a small fraction of the leaf.
Small leaves are signed and placed as one there (`_small`), and those of a few long rows on CPU by parts (`_long`).
*Indexed* (in `_indexed`), for TPU and for leaves or blocks of leaves that are sharded: signs are made from the indices
of each number, and a contraction with a one-hot matrix adds the rows of a bucket. It never reshapes or slices the leaf,
so that partitioners need nothing but sums of at most d numbers. (On GPUs, where such a product stores its operands,
blocks of whole hashes are summed as whole leaves are.)
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIGN = np.uint32(0x80000000)
_GOLDEN = np.uint32(0x9E3779B9)
HASH_ROWS = 32
# Laps around a sketch that are summed by one expression.
_LAPS = 64
# Hashes of so many indices are made while tracing, which halves the strided kernels and their compile time.
TABLE = 2**18
# A `part` of numbers that is all of them, summed in float64 (which has to be enabled).
WIDE = 2


class Hashes(NamedTuple):
  """Of a leaf's path and indices, for programs that are compiled for a shape and run for many paths."""

  key: Any  # uint32[], see `path_key`
  columns: Any  # uint32[n], of the trailing axis' indices
  rows: Any  # uint32[ceil(m / 32)], of the rows' indices div 32


class Piece(NamedTuple):
  """A leaf, or the block of a leaf that one device holds."""

  path: str
  array: jax.Array  # any shape and float dtype
  start: tuple[Any, ...] | None = None  # of the block, by axis; None for a whole leaf
  shape: tuple[int, ...] = ()  # of the whole leaf, where `start` is given
  hashes: Hashes | None = None  # instead of the path; the row is then to be rolled by `offset_of` the path
  rank: int = 0  # the program that sums them makes pieces of lower rank first

  def placed(self) -> Piece:
    """The same with at least one axis, and the shape of the whole leaf."""
    start = (0,) if self.start == () else self.start
    array = self.array if self.array.ndim else self.array[None]
    shape = array.shape if start is None else self.shape or (1,)
    return self._replace(array=array, start=start, shape=shape)

  def row_index(self) -> Any:
    """uint32[leading axes]: the row, in the whole leaf, of each place of the leading axes."""
    shape = self.array.shape[:-1]
    if self.start is None and math.prod(shape) <= TABLE:
      return np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(self.shape[:-1]):
      at = lax.broadcasted_iota(jnp.uint32, shape, axis)
      if self.start is not None:
        at = at + jnp.asarray(self.start[axis], jnp.uint32)
      index = index * np.uint32(size) + at
    return index

  def column_index(self) -> Any:
    """uint32[trailing axis]: likewise for the columns."""
    size = self.array.shape[-1]
    if self.start is None:  # a vector's constant would be as long as the vector
      return indices(size) if self.array.ndim > 1 else lax.iota(jnp.uint32, size)
    return lax.iota(jnp.uint32, size) + jnp.asarray(self.start[-1], jnp.uint32)


def indices(size: int) -> Any:
  """uint32[size]: 0, 1, …, in NumPy where that is not too long, so that what is made of them becomes a constant."""
  return np.arange(size, dtype=np.uint32) if size <= TABLE else lax.iota(jnp.uint32, size)


class Plan(NamedTuple):
  """How a leaf's rows fall into buckets."""

  key: Any  # uint32[]
  rows: int
  columns: int
  per_bucket: int  # rows that share a bucket: a power of two up to 32
  buckets: int  # rows of buckets; row r falls into number (r div per_bucket) mod buckets
  offset: int  # of the first bucket in the sketch


def mix(x: Any) -> Any:
  """A bijection of uint32 in which every output bit depends on every input bit (for jax and NumPy arrays)."""
  return _mix(x) if isinstance(x, np.ndarray | np.generic) else _traced_mix(x)


def _mix(x: Any) -> Any:
  with np.errstate(over="ignore"):
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


_traced_mix = jax.jit(_mix, inline=True)  # traced once for each shape


def path_key(path: str, seed: int) -> np.uint32:
  """What a leaf's path and the seed contribute to every hash of that leaf."""
  digest = hashlib.blake2b(f"{seed}/{path}".encode(errors="backslashreplace"), digest_size=4).digest()
  return np.frombuffer(digest, "<u4")[0]


def index_hash(index: Any, salt: np.uint32) -> Any:
  """Hashes of the indices (uint32) along one axis, for jax and NumPy arrays."""
  with np.errstate(over="ignore"):
    return mix(mix(index + _GOLDEN) + salt)


def hashes_of(path: str, shape: tuple[int, ...], seed: int) -> Hashes:
  """The hashes of a real leaf of this shape, in NumPy."""
  key = path_key(path, seed)
  rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
  column_hashes = index_hash(np.arange(columns, dtype=np.uint32), key)
  return Hashes(key, column_hashes, index_hash(np.arange(-(-rows // HASH_ROWS), dtype=np.uint32), ~key))


def offset_of(path: str, dim: int, seed: int) -> int:
  """Where a leaf's first bucket lies in the sketch."""
  return int(mix(np.asarray([path_key(path, seed)]))[0]) % dim


def sign_shift(row: Any) -> Any:
  """uint32: by how much `sign_bits` shifts the hash of 32 rows for each of them, of which these are the indices."""
  return np.uint32(HASH_ROWS - 1) - row % np.uint32(HASH_ROWS)


def sign_bits(keys: Any, columns: Any, shift: Any) -> Any:
  """uint32[..., n], for jax and NumPy arrays: the highest bit is set where the sign is minus.

  Args:
    keys: uint32[...], of each row the hash of the 32 rows that it belongs to.
    columns: uint32[n], the columns' hashes.
    shift: uint32[...], `sign_shift` of each row.
  """
  return mix(keys[..., None] ^ columns) << shift[..., None]


def sum_rows(rows: Sequence[jax.Array], bits: Any, first: Any, part: int | None, grid: Any) -> jax.Array:
  """float32[n]: the sum of signed rows [n] that share hashes `bits` [n]; `first`: index of the first, of those 32.

  One after the other: XLA on CPU would store what a reduction over them is given.
  """
  signed = [flip(part_of(row, part, grid), bits << sign_shift(np.uint32(first + i))) for i, row in enumerate(rows)]
  return functools.reduce(jnp.add, signed)


def row_signs(hashes: Hashes, start: int, stop: int) -> np.ndarray:
  """int8[stop - start, n], in NumPy: the signs of a real leaf's rows from `start` on."""
  row = np.arange(start, stop, dtype=np.uint32)
  bits = sign_bits(hashes.rows[row // HASH_ROWS], hashes.columns, sign_shift(row))
  return np.where(bits >= SIGN, -1, 1).astype(np.int8)


def plan_of(path: str, hashes: Hashes | None, shape: tuple[int, ...], dim: int, seed: int) -> Plan:
  """That of a leaf; where its hashes are given, its first bucket is number 0."""
  key = path_key(path, seed) if hashes is None else hashes.key
  columns = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  if max(rows, columns) > 2**32:
    raise ValueError(
      f"sedjax.sketch.count: leaf {path!r} has {max(rows, columns):,} {'rows' if rows > columns else 'columns'}, "
      "and indices of up to 2**32 are told apart; split the leaf, or give it more trailing numbers and fewer rows."
    )
  # Where whole bucket rows would leave more than a ninth of the sketch empty, they wrap around it once.
  laps = 1 if 9 * (dim // columns * columns) >= 8 * dim else 2
  capacity = max(1, laps * dim // columns)
  # As many rows share a bucket as leave two or more in each row of buckets, so that all buckets are filled alike.
  per_bucket = HASH_ROWS
  while per_bucket > 1 and -(-rows // per_bucket) < 2 * capacity:
    per_bucket //= 2
  buckets = min(-(-rows // per_bucket), capacity)
  offset = offset_of(path, dim, seed) if hashes is None else 0
  return Plan(key, rows, columns, per_bucket, buckets, offset)


@functools.partial(jax.jit, inline=True)
def flip(x: jax.Array, bits: Any) -> jax.Array:
  """x with its sign flipped where the highest bit of `bits` (uint32) is set."""
  size = x.dtype.itemsize
  if size not in (2, 4, 8):
    x, size = x.astype(jnp.float32), 4
  kind = jnp.dtype(f"uint{8 * size}")
  mask = bits & SIGN
  mask = (mask >> 16).astype(kind) if size == 2 else mask.astype(kind) << (8 * size - 32)
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, kind) ^ mask, x.dtype)


def sum_dtype(part: int | None) -> Any:
  """The dtype in which a part is summed."""
  return jnp.float64 if part == WIDE else jnp.float32


def part_of(x: jax.Array, part: int | None, grid: Any) -> jax.Array:
  """float32: x itself, or its multiple of `grid` (part 0), or what that leaves (part 1); part WIDE: x in float64."""
  if part is None or part == WIDE:
    return x.astype(sum_dtype(part))
  x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  # The grid is a power of two: a product is exact, and XLA would store the quotients of a whole leaf.
  coarse = jnp.round(x * (1 / grid.astype(x.dtype))) * grid.astype(x.dtype)
  return (x - coarse if part else coarse).astype(jnp.float32)


def slice_of(x: jax.Array, first: Any, count: int, axis: int) -> jax.Array:
  """`count` places of an axis, from an int or a traced index on."""
  if isinstance(first, int):  # which may be more than an int32 holds
    return lax.slice_in_dim(x, first, first + count, axis=axis)
  return lax.dynamic_slice_in_dim(x, first, count, axis)


def folded_sum(flat: jax.Array, size: int) -> jax.Array:
  """The sum of laps of `size` numbers each, the last of which may be shorter; `flat` itself where there is one."""
  if flat.size <= size:
    return flat
  flat = lax.pad(flat, flat.dtype.type(0), ((0, -flat.size % size, 0),))
  laps = range(0, flat.size, size)
  # XLA hands sums over the leading axis of a matrix to a library that is slow where they are long.
  return (
    flat.reshape(-1, size).sum(0)
    if len(laps) > _LAPS
    else functools.reduce(jnp.add, (flat[at : at + size] for at in laps))
  )
