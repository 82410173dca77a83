"""The count sketch: one map, in two forms that differ in the order of their sums only.

A leaf is m rows by n columns (its trailing axis; a vector is one row). The sign of (row, column) is bit (row mod 32) of
a 32-bit hash of (path, row div 32, column, seed); its bucket is ((row div p) mod g, column), where p <= 32 rows share a
bucket; the g bucket rows lie one after the other from a hashed offset on, folded into d.

*Strided*, for whole leaves on one CPU or GPU: every p rows are summed in one elementwise kernel, that reads them as
strided slices and makes one hash for them; what remains to be added up is a small fraction of the leaf.
*Indexed*, for TPU and for leaves or blocks of leaves that are sharded: signs are made from the indices of each number,
and a contraction with a one-hot matrix adds the rows of a bucket. It never reshapes or slices the leaf, so that
partitioners need nothing but sums of at most d numbers.
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

_SIGN = np.uint32(0x80000000)
_GOLDEN = np.uint32(0x9E3779B9)
_HASH_ROWS = 32
# Strided form: rows summed by one kernel. 16 streams are as many as prefetchers follow, and code for 16 compiles fast.
_STRIDE = 16
# Strided form: partial sums alive at a time (4 MiB), since XLA's CPU scheduler would start all leaves at once.
_ALIVE = 2**20
# Indexed form on CPU: numbers of a block that are signed at a time, since CPU contractions store their operands.
_CHUNK = 2**20
# Hashes of indices up to this size are made while tracing, which halves the strided kernels and their compile time.
_TABLE = 2**18


class Piece(NamedTuple):
  """A leaf, or the block of a leaf that one device holds."""

  path: str
  array: jax.Array  # any shape and float dtype
  start: tuple[Any, ...] | None = None  # of the block, by axis; None for a whole leaf
  shape: tuple[int, ...] = ()  # of the whole leaf, where `start` is given

  def placed(self) -> Piece:
    """The same with at least one axis, and the shape of the whole leaf."""
    start = (0,) if self.start == () else self.start
    array = self.array if self.array.ndim else self.array[None]
    return Piece(self.path, array, start, array.shape if start is None else self.shape or (1,))

  def row_index(self) -> jax.Array:
    """uint32[leading axes]: the row, in the whole leaf, of each place of the leading axes."""
    shape = self.array.shape[:-1]
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(self.shape[:-1]):
      at = lax.broadcasted_iota(jnp.uint32, shape, axis)
      if self.start is not None:
        at = at + jnp.asarray(self.start[axis], jnp.uint32)
      index = index * np.uint32(size) + at
    return index

  def column_index(self) -> jax.Array:
    """uint32[trailing axis]: likewise for the columns."""
    index = lax.iota(jnp.uint32, self.array.shape[-1])
    return index if self.start is None else index + jnp.asarray(self.start[-1], jnp.uint32)


class _Plan(NamedTuple):
  """How a leaf's rows fall into buckets."""

  key: np.uint32
  rows: int
  columns: int
  per_bucket: int  # rows that share a bucket: a power of two up to 32
  buckets: int  # rows of buckets; row r falls into number (r div per_bucket) mod buckets
  offset: int  # of the first bucket in the sketch


def mix(x: Any) -> Any:
  """A bijection of uint32 in which every output bit depends on every input bit (for jax and NumPy arrays)."""
  with np.errstate(over="ignore"):
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def path_key(path: str, seed: int) -> np.uint32:
  """What a leaf's path and the seed contribute to every hash of that leaf."""
  digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=4).digest()
  return np.frombuffer(digest, "<u4")[0]


def index_hash(index: Any, salt: np.uint32) -> Any:
  """Hashes of the indices (uint32) along one axis, for jax and NumPy arrays."""
  with np.errstate(over="ignore"):
    return mix(mix(index + _GOLDEN) + salt)


def _index_table(size: int, salt: np.uint32) -> Any:
  """uint32[size]: the hashes of 0, 1, …, size - 1."""
  if size > _TABLE:
    return index_hash(lax.iota(jnp.uint32, size), salt)
  return index_hash(np.arange(size, dtype=np.uint32), salt)


def _plan(path: str, shape: tuple[int, ...], dim: int, seed: int) -> _Plan:
  key = path_key(path, seed)
  columns = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  # Where whole bucket rows would leave more than a ninth of the sketch empty, they wrap around it once.
  laps = 1 if 9 * (dim // columns * columns) >= 8 * dim else 2
  capacity = max(1, laps * dim // columns)
  # A leaf too small to fill the sketch with 32 rows a bucket uses fewer: collisions are what makes error.
  per_bucket = _HASH_ROWS
  while per_bucket > 1 and -(-rows // (per_bucket // 2)) <= capacity:
    per_bucket //= 2
  buckets = min(-(-rows // per_bucket), capacity)
  return _Plan(key, rows, columns, per_bucket, buckets, int(mix(np.asarray([key]))[0]) % dim)


def _as_uint(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def _flip(x: jax.Array, bits: Any) -> jax.Array:
  """x with its sign flipped where the highest bit of `bits` is set."""
  return lax.bitcast_convert_type(_as_uint(x) ^ (bits & _SIGN), jnp.float32)


def _zero_of(x: jax.Array) -> jax.Array:
  """uint32[]: 0, made of x in a way that XLA does not see through; it drops optimization barriers on CPU."""
  return (_as_uint(x[(0,) * x.ndim]) << 1) & np.uint32(1)


def later_than(x: jax.Array, other: jax.Array) -> jax.Array:
  """x (float32) unchanged, but on paper dependent on `other` (float32)."""
  return lax.bitcast_convert_type(_as_uint(x) ^ _zero_of(other), jnp.float32)


def part_of(x: jax.Array, part: int | None, grid: Any) -> jax.Array:
  """float32: x itself, or its multiple of `grid` (part 0), or what that leaves (part 1)."""
  if part is None:
    return x.astype(jnp.float32)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  coarse = jnp.round(x / grid.astype(x.dtype)) * grid.astype(x.dtype)
  return (x - coarse if part else coarse).astype(jnp.float32)


def _add_flat(row: jax.Array, flat: jax.Array, offset: int) -> jax.Array:
  """Adds `flat` to `row` from `offset` on, around its end as often as need be."""
  done = 0
  while done < flat.size:
    at = (offset + done) % row.size
    size = min(row.size - at, flat.size - done)
    new = lax.slice(row, (at,), (at + size,)) + lax.slice(flat, (done,), (done + size,))
    row = lax.dynamic_update_slice(row, new, (at,))
    done += size
  return row


# ---- strided form ----


def _strided_sums(
  x: jax.Array, row: int, count: int, keys: Any, columns: Any, stride: int, part: Any, grid: Any
) -> Any:
  """float32[count, n]: sums of `stride` signed rows each, from `row` on; `keys` are the hashes of their rows."""
  first = lax.iota(jnp.uint32, count) * np.uint32(stride) + np.uint32(row % _HASH_ROWS)
  bits = mix(keys[:, None] ^ columns[None, :]) << (np.uint32(32 - stride) - first % _HASH_ROWS)[:, None]
  # The first row's sign is taken out of the sum: XLA hands sums that end in an addition to a library, which would
  # have every signed row stored.
  sign = bits << np.uint32(stride - 1)
  bits = jnp.where(sign >= _SIGN, ~bits, bits)
  sums: list[Any] = [None] * min(4, stride)  # shorter chains of dependent additions
  for i in range(stride):
    each = lax.slice(x, (row + i, 0), (row + i + stride * (count - 1) + 1, x.shape[1]), (stride, 1))
    each = part_of(each, part, grid)
    each = _flip(each, bits << np.uint32(stride - 1 - i)) if i else each
    sums[i % 4] = each if sums[i % 4] is None else sums[i % 4] + each
  return _flip(functools.reduce(jnp.add, sums), sign)


def _block_sums(x: Any, row: int, count: int, plan: _Plan, keys: Any, columns: Any, part: Any, grid: Any) -> jax.Array:
  """float32[min(count, g), n]: sums of `count` buckets' worth of rows from `row` on, which falls into bucket 0."""
  stride = min(_STRIDE, max(1, plan.per_bucket // 2))
  per_bucket = plan.per_bucket // stride
  first = row // _HASH_ROWS
  last = -(-(row + count * plan.per_bucket) // _HASH_ROWS)
  keys = jnp.broadcast_to(lax.slice(keys, (first,), (last,))[:, None], (last - first, _HASH_ROWS // stride))
  keys = keys.reshape(-1)[: count * per_bucket]
  sums = _strided_sums(x, row, count * per_bucket, keys, columns, stride, part, grid)
  sums = sums.reshape(count, per_bucket, x.shape[1]).sum(1) if per_bucket > 1 else sums
  if count <= plan.buckets:
    return sums
  sums = lax.pad(sums, np.float32(0), ((0, -count % plan.buckets, 0), (0, 0, 0)))
  return sums.reshape(-1, plan.buckets, x.shape[1]).sum(0)


@functools.partial(jax.jit, static_argnames=("row", "count", "plan", "part"))
def _shared_block_sums(
  x: Any, keys: Any, columns: Any, grid: Any, *, row: int, count: int, plan: Any, part: Any
) -> Any:
  """`_block_sums`, traced once for all leaves of one shape."""
  return _block_sums(x, row, count, plan, keys, columns, part, grid)


def _last_rows(x: jax.Array, row: int, keys: Any, columns: Any, part: Any, grid: Any) -> jax.Array:
  """float32[n]: the sum of fewer than 32 rows that share a hash, from `row` to the end."""
  shift = np.arange(row, x.shape[0], dtype=np.uint32) % np.uint32(_HASH_ROWS)
  bits = mix(keys[row // _HASH_ROWS] ^ columns)[None, :] << (np.uint32(31) - shift)[:, None]
  return _flip(part_of(x[row:], part, grid), bits).sum(0)


class _Rows:
  """Rows under construction; starts new work only after earlier work is done, to bound what is alive."""

  def __init__(self, labels: int, dim: int):
    self.rows = [jnp.zeros((dim,), jnp.float32) for _ in range(labels)]
    self._alive = 0
    self._last: jax.Array | None = None
    self._wait: Any = np.uint32(0)

  def after_earlier_work(self, keys: Any, size: int) -> Any:
    """`keys`, unchanged, but on paper dependent on earlier rows when `size` more numbers would be too many alive."""
    if self._alive + size > _ALIVE and self._last is not None:
      self._wait = _zero_of(self._last)
      self._alive, self._last = 0, None
    self._alive += size
    return keys ^ self._wait

  def add(self, group: int, flat: jax.Array, offset: int) -> None:
    self.rows[group] = self._last = _add_flat(self.rows[group], flat, offset)


def _add_strided(rows: _Rows, group: int, piece: Piece, dim: int, seed: int, part: Any, grid: Any) -> None:
  plan = _plan(piece.path, piece.array.shape, dim, seed)
  columns = _index_table(plan.columns, plan.key)
  keys = _index_table(-(-plan.rows // _HASH_ROWS), ~plan.key)
  x = piece.array.reshape(plan.rows, plan.columns)
  if plan.rows == 1:
    flat = _flip(part_of(x[0], part, grid), mix(keys[0] ^ columns) << np.uint32(31))
    return rows.add(group, flat, plan.offset)
  shared = plan._replace(key=np.uint32(0), offset=0)
  whole = plan.rows // plan.per_bucket
  most = max(1, _ALIVE * _STRIDE // (plan.per_bucket * plan.buckets * plan.columns)) * plan.buckets
  done = 0
  while done < whole:
    count = min(most, whole - done)
    row = done * plan.per_bucket
    waiting = rows.after_earlier_work(keys, count * plan.columns * max(1, plan.per_bucket // _STRIDE))
    sums = _shared_block_sums(x, waiting, columns, grid, row=row, count=count, plan=shared, part=part)
    rows.add(group, sums.reshape(-1), plan.offset)
    done += count
  if whole * plan.per_bucket < plan.rows:
    sums = _last_rows(x, whole * plan.per_bucket, keys, columns, part, grid)
    rows.add(group, sums, plan.offset + whole % plan.buckets * plan.columns)
  return None


# ---- indexed form ----


def _bucket_sums(x: Any, row: Any, columns: Any, plan: _Plan, most: int, part: Any, grid: Any) -> jax.Array:
  """float32[g, n]: bucket sums of a block with rows `row`; one contraction gives at most `most` of the g."""
  bits = mix(index_hash(row >> 5, ~plan.key)[..., None] ^ columns) << (np.uint32(31) - (row & np.uint32(31)))[..., None]
  signed = _flip(part_of(x, part, grid), bits)
  leading = tuple(range(row.ndim))
  if plan.buckets == 1:
    return signed.sum(leading)[None]
  bucket = row // np.uint32(plan.per_bucket) % np.uint32(plan.buckets)
  sums = []
  for first in range(0, plan.buckets, most):
    wanted = np.arange(first, min(first + most, plan.buckets), dtype=np.uint32)
    one_hot = (bucket[..., None] == wanted).astype(jnp.float32)
    sums.append(lax.dot_general(one_hot, signed, ((leading, leading), ((), ())), lax.Precision.HIGHEST))
  return jnp.concatenate(sums)


def _chunked_bucket_sums(x: Any, row: Any, columns: Any, plan: _Plan, most: int, part: Any, grid: Any) -> jax.Array:
  """`_bucket_sums` by blocks of rows, for CPU, whose contractions store their operands; x must not be sharded."""
  x, row = x.reshape(-1, x.shape[-1]), row.reshape(-1)
  size = max(1, _CHUNK // x.shape[1])
  whole = x.shape[0] // size
  sums = functools.partial(_bucket_sums, columns=columns, plan=plan, most=most, part=part, grid=grid)

  def add(i: Any, total: jax.Array) -> jax.Array:
    return total + sums(*(lax.dynamic_slice_in_dim(a, i * size, size) for a in (x, row)))

  total = sums(x[whole * size :], row[whole * size :])
  return lax.fori_loop(0, whole, add, total) if whole else total


def _add_indexed(row: jax.Array, piece: Piece, dim: int, seed: int, part: Any, grid: Any) -> jax.Array:
  """Adds the sketch of a leaf or block to `row`."""
  piece = piece.placed()
  plan = _plan(piece.path, piece.shape, dim, seed)
  args = (piece.array, piece.row_index(), index_hash(piece.column_index(), plan.key))
  if piece.start is None:
    # Partitioners sum what each contraction gives: no more than dim numbers, where a leaf is no wider.
    sums = _bucket_sums(*args, plan, max(1, dim // plan.columns), part, grid)
  else:
    direct = functools.partial(_bucket_sums, plan=plan, most=plan.buckets, part=part, grid=grid)
    chunked = functools.partial(_chunked_bucket_sums, plan=plan, most=plan.buckets, part=part, grid=grid)
    sums = lax.platform_dependent(*args, cpu=chunked, default=direct)  # pyright: ignore
    if sums.shape[1] < plan.columns:
      at = jnp.asarray(piece.start[-1], jnp.int32)
      sums = lax.dynamic_update_slice_in_dim(jnp.zeros((plan.buckets, plan.columns), jnp.float32), sums, at, 1)
  return _add_flat(row, sums.reshape(-1), plan.offset)


# ---- both ----


def count_rows(
  pieces: Sequence[Piece],
  groups: Sequence[int],
  labels: int,
  dim: int,
  seed: int,
  part: int | None = None,
  grid: Any = None,
) -> list[jax.Array]:
  """float32[dim] for each label: the sketches of its leaves or blocks, summed.

  Args:
    pieces: real leaves or blocks, none of them empty.
    groups: by piece, index of its label.
    labels: how many labels there are.
    dim, seed: of the sketch.
    part, grid: see `part_of`.
  """
  grid = jnp.float32(1) if grid is None else grid

  def strided(arrays: list[jax.Array], grid: Any) -> list[jax.Array]:
    rows = _Rows(labels, dim)
    for piece, group, array in zip(pieces, groups, arrays, strict=True):
      _add_strided(rows, group, piece._replace(array=array), dim, seed, part, grid)
    return rows.rows

  def indexed(arrays: list[jax.Array], grid: Any) -> list[jax.Array]:
    rows = [jnp.zeros((dim,), jnp.float32) for _ in range(labels)]
    for piece, group, array in zip(pieces, groups, arrays, strict=True):
      rows[group] = _add_indexed(rows[group], piece._replace(array=array), dim, seed, part, grid)
    return rows

  arrays = [piece.array for piece in pieces]
  # With several devices leaves may be sharded, which automatic mesh axes do not show while tracing.
  if jax.device_count() > 1 or any(piece.start is not None for piece in pieces):
    return indexed(arrays, grid)
  return lax.platform_dependent(arrays, grid, cpu=strided, cuda=strided, default=indexed)
