"""The map of the count sketch, which two forms compute that differ in the order of their sums only.

A leaf is m rows by n columns (its trailing axis; a vector is one row). The sign of (row, column) is bit (row mod 32) of
a 32-bit hash of (path, row div 32, column, seed). Buckets come in pairs, which lie half a sketch apart. Lots of p <= 32
rows fall into j rows of pairs in turn: rows with an even number of bits in (row mod p) into the first bucket of a pair
and the others into the second, and in the next turn the other way round; where p = 1 it is the turns' numbers that
count. So what comes into one bucket of a pair is as much as comes into the other, whether energy is in some rows after
another, in every so manieth, or in columns; and their sums tell how much collides (see `_rows`).

The first buckets of all pairs lie one after the other from some place on, and the second ones likewise, half a sketch
further on, around it as often as it takes. Where five or seven rows of buckets fill a sketch better than an even number
does, the last one fills what the others leave. Large leaves of as many columns begin in one place, which lets their
sums be added up before they are laid out; each begins with a hashed row of buckets, and turns its columns by a hashed
number. All others begin in a hashed place of their own.

*Strided* (in `_strided`), for whole leaves on one CPU or GPU: up to p rows are summed in one elementwise kernel, that
reads them as strided slices and makes one hash for them; what remains to be added up (in `_places`) is a small fraction
of the leaf.
Small leaves are signed and placed as one there (`_small`), and those of a few long rows on CPU by parts (`_long`).
*Indexed* (in `_indexed`), for TPU and for leaves or blocks of leaves that are sharded: signs are made from the indices
of each number, and a contraction with a one-hot matrix adds the rows of a bucket; `_terms` lays out what that gives. It
never reshapes or slices the leaf, so that partitioners need nothing but sums of at most d numbers. (On GPUs, where such
a product stores its operands, blocks of whole hashes are summed as whole leaves are.)
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
# Leaves of so many numbers are no more than a few times as large as the sketch, or little work.
_SMALL = 2**17
# A `part` of numbers that is all of them, summed in float64 (which has to be enabled).
WIDE = 2


class Hashes(NamedTuple):
  """Of a leaf's path and indices, for programs that are compiled for a shape and run for many paths."""

  key: Any  # uint32[], see `path_key`
  columns: Any  # uint32[n], of the trailing axis' indices
  rows: Any  # uint32[ceil(m / 32)], of the rows' indices div 32
  place: Any  # uint32[2], see `place_hashes`


class Piece(NamedTuple):
  """A leaf, or the block of a leaf that one device holds."""

  path: str
  array: jax.Array  # any shape and float dtype
  start: tuple[Any, ...] | None = None  # of the block, by axis; None for a whole leaf
  shape: tuple[int, ...] = ()  # of the whole leaf, where `start` is given
  speaks: Any = True  # whether this device adds it, where several hold the same block
  hashes: Hashes | None = None  # instead of the path
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
    whole = shape == self.shape[:-1] and all(isinstance(at, int) for at in self.start[:-1]) if self.start else True
    if whole and math.prod(shape) <= TABLE:
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
  """How a leaf's rows fall into buckets. Where its hashes are traced, so are `offset`, `turn` and `shift`."""

  key: Any  # uint32[]
  rows: int
  columns: int
  lot: int  # rows that share a pair of buckets: a power of two up to 32
  pairs: int  # rows of pairs of buckets
  buckets: int  # rows of buckets, through which lots go in turn: pairs, or twice as many, or one more
  offset: Any  # of the first bucket in the sketch
  turn: Any  # number of the first lot's row of buckets
  shift: Any  # by how many columns buckets are turned

  @property
  def shared(self) -> bool:
    """Whether leaves of as many columns begin in one place: those whose lots are summed first."""
    return self.buckets > self.pairs > 1 and self.lot > 1

  def bucket(self, row: Any) -> Any:
    """In which row of buckets a row falls, for jax and NumPy arrays of uint32: first the first ones of all pairs."""
    turn = (row // np.uint32(self.lot) + self.turn) % np.uint32(self.buckets)
    if self.buckets == self.pairs:
      return turn
    parity = row % np.uint32(self.lot)
    if self.lot == 1:  # every turn through all rows of buckets has a parity instead
      parity = row // np.uint32(self.buckets)
    for shift in (16, 8, 4, 2, 1) if self.lot == 1 else (4, 2, 1):
      parity = parity ^ parity >> np.uint32(shift)
    pairs = np.uint32(self.pairs)
    half = (parity ^ turn // pairs) & np.uint32(1)
    where = np.where if isinstance(turn, np.ndarray) else jnp.where
    return where(turn < 2 * pairs, turn % pairs + half * pairs, turn)


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
  row_hashes = index_hash(np.arange(-(-rows // HASH_ROWS), dtype=np.uint32), ~key)
  return Hashes(key, column_hashes, row_hashes, place_hashes(key))


def place_hashes(key: np.uint32) -> np.ndarray:
  """uint32[2]: what decides where a leaf's buckets lie."""
  first = mix(np.asarray([key]))
  return np.concatenate([first, mix(first + _GOLDEN)])


def is_odd(number: int) -> int:
  """1 where the number of bits is odd, by which the rows of a lot are told apart; else 0."""
  return number.bit_count() % 2


def ring_of(dim: int) -> int:
  """How many numbers of a sketch are buckets: an even number, since these come in pairs."""
  return dim - dim % 2 if dim > 1 else 1


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


def vector_bits(columns: Any, key: Any) -> Any:
  """uint32[n]: `sign_bits` of a leaf of one row, of the numbers in these columns (uint32[n])."""
  row = np.uint32(0)
  return sign_bits(index_hash(row, ~key), index_hash(columns, key), sign_shift(row))


def sum_rows(rows: Sequence[jax.Array], index: Sequence[int], bits: Any, part: int | None, grid: Any) -> jax.Array:
  """float32[n]: the sum of signed rows [n] with these indices, which share hashes `bits` [n].

  One after the other: XLA on CPU would store what a reduction over them is given.
  """
  shifts = [sign_shift(np.uint32(i)) for i in index]
  signed = [flip(part_of(row, part, grid), bits << shift) for row, shift in zip(rows, shifts, strict=True)]
  return functools.reduce(jnp.add, signed)


def row_signs(hashes: Hashes, start: int, stop: int) -> np.ndarray:
  """int8[stop - start, n], in NumPy: the signs of a real leaf's rows from `start` on."""
  row = np.arange(start, stop, dtype=np.uint32)
  bits = sign_bits(hashes.rows[row // HASH_ROWS], hashes.columns, sign_shift(row))
  return np.where(bits >= SIGN, -1, 1).astype(np.int8)


def plan_of(path: str, hashes: Hashes | None, shape: tuple[int, ...], dim: int, seed: int) -> Plan:
  """That of a leaf, of its hashes where they are given."""
  key = path_key(path, seed) if hashes is None else hashes.key
  columns = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  if max(rows, columns) > 2**32:
    raise ValueError(
      f"sedjax.sketch.count: leaf {path!r} has {max(rows, columns):,} {'rows' if rows > columns else 'columns'}, "
      "and indices of up to 2**32 are told apart; split the leaf, or give it more trailing numbers and fewer rows."
    )
  # As many rows of buckets as fill eight ninths of the sketch: of pairs, so that they reach around it, if need be.
  buckets = dim // columns
  if 9 * (buckets - buckets % 2) * columns >= 8 * dim:
    buckets -= buckets % 2
  elif buckets not in (5, 7) or 9 * buckets * columns < 8 * dim:
    buckets = 2 * (dim // 2 // columns + 1)
  pairs = buckets // 2
  # As many rows in a lot as leave one lot for each row of pairs, or two or more, so that all buckets are filled alike.
  # Small leaves are not summed before they are added to the sketch.
  lot = HASH_ROWS if rows * columns > _SMALL else 1
  while lot > 1 and (lots := -(-rows // lot)) < buckets and 2 * lots != buckets:
    lot //= 2
  if rows <= pairs:  # the first buckets of pairs are enough
    pairs = buckets = rows
  first, second = [int(x) for x in place_hashes(key)] if hashes is None else hashes.place
  plan = Plan(key, rows, columns, lot, pairs, buckets, first % dim, 0, 0)
  if not plan.shared:
    return plan
  shared = int(mix(index_hash(np.asarray([columns], np.uint32), path_key("", seed)))[0]) % dim
  return plan._replace(offset=shared, turn=first % buckets, shift=second % columns)


def halves_of(parts: Sequence[Any], dim: int) -> list[Any]:
  """What a leaf's bucket sums add from its place on, and what from half of the sketch further on, if anything.

  Args:
    parts: flat sums of pairs' first buckets, and if there are any, of their second ones and of a row that is left.
    dim: of the sketch.
  """
  if len(parts) == 1:
    return list(parts)
  first, second, left = parts
  if not left.size:
    return [first, second]
  gap, concatenate = dim // 2 - first.size, np.concatenate if isinstance(first, np.ndarray) else jnp.concatenate
  return [concatenate([first, left[:gap]]), concatenate([second, left[gap:]])]


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
