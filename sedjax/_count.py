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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from sedjax import _placement

_SIGN = np.uint32(0x80000000)
_GOLDEN = np.uint32(0x9E3779B9)
_HASH_ROWS = 32
# Strided form: rows summed by one kernel. 16 streams are as many as prefetchers follow, and code for 16 compiles fast.
_STRIDE = 16
# Strided form: partial sums alive at a time (4 MiB), since XLA's CPU scheduler would start all leaves at once.
_ALIVE = 2**20
# Strided form: laps around a sketch that are summed by one expression.
_LAPS = 64
# Indexed form on CPU: numbers of a block that are signed at a time, since CPU contractions store their operands.
_CHUNK = 2**20
# Hashes of so many indices are made while tracing, which halves the strided kernels and their compile time.
_TABLE = 2**18
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

  def placed(self) -> Piece:
    """The same with at least one axis, and the shape of the whole leaf."""
    start = (0,) if self.start == () else self.start
    array = self.array if self.array.ndim else self.array[None]
    shape = array.shape if start is None else self.shape or (1,)
    return self._replace(array=array, start=start, shape=shape)

  def row_index(self) -> Any:
    """uint32[leading axes]: the row, in the whole leaf, of each place of the leading axes."""
    shape = self.array.shape[:-1]
    if self.start is None and math.prod(shape) <= _TABLE:
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
      return _indices(size) if self.array.ndim > 1 else lax.iota(jnp.uint32, size)
    return lax.iota(jnp.uint32, size) + jnp.asarray(self.start[-1], jnp.uint32)


def _indices(size: int) -> Any:
  """uint32[size]: 0, 1, …, in NumPy where that is not too long, so that what is made of them becomes a constant."""
  return np.arange(size, dtype=np.uint32) if size <= _TABLE else lax.iota(jnp.uint32, size)


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
  digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=4).digest()
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
  return Hashes(key, column_hashes, index_hash(np.arange(-(-rows // _HASH_ROWS), dtype=np.uint32), ~key))


def offset_of(path: str, dim: int, seed: int) -> int:
  """Where a leaf's first bucket lies in the sketch."""
  return int(mix(np.asarray([path_key(path, seed)]))[0]) % dim


def row_signs(hashes: Hashes, start: int, stop: int) -> np.ndarray:
  """int8[stop - start, n], in NumPy: the signs of a real leaf's rows from `start` on."""
  row = np.arange(start, stop, dtype=np.uint32)
  bits = mix(hashes.rows[row // _HASH_ROWS][:, None] ^ hashes.columns) << (np.uint32(31) - row % _HASH_ROWS)[:, None]
  return np.where(bits >= _SIGN, -1, 1).astype(np.int8)


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
  per_bucket = _HASH_ROWS
  while per_bucket > 1 and -(-rows // per_bucket) < 2 * capacity:
    per_bucket //= 2
  buckets = min(-(-rows // per_bucket), capacity)
  offset = offset_of(path, dim, seed) if hashes is None else 0
  return Plan(key, rows, columns, per_bucket, buckets, offset)


def _as_uint(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


@functools.partial(jax.jit, inline=True)
def _flip(x: jax.Array, bits: Any) -> jax.Array:
  """x with its sign flipped where the highest bit of `bits` (uint32) is set."""
  size = x.dtype.itemsize
  if size not in (2, 4, 8):
    x, size = x.astype(jnp.float32), 4
  kind = jnp.dtype(f"uint{8 * size}")
  mask = bits & _SIGN
  mask = (mask >> 16).astype(kind) if size == 2 else mask.astype(kind) << (8 * size - 32)
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, kind) ^ mask, x.dtype)


def _zero_of(x: jax.Array) -> jax.Array:
  """uint32[]: 0, made of x in a way that XLA does not see through; it drops optimization barriers on CPU."""
  return (_as_uint(x[(0,) * x.ndim]) << 1) & np.uint32(1) if x.size else jnp.uint32(0)


def _shared_zero_of(x: jax.Array) -> jax.Array:
  """`_zero_of`, and one for all under vmap, where a place of its own for each would make scatters of slices."""
  return _first_zero_of(lax.stop_gradient(x))


_first_zero_of = jax.custom_batching.custom_vmap(_zero_of)
_first_zero_of.def_vmap(lambda axis_size, in_batched, x: (_first_zero_of(x[0]), False))  # noqa: ARG005


def later_than(x: jax.Array, other: jax.Array) -> jax.Array:
  """x (float32) unchanged, but on paper dependent on `other` (float32)."""
  return lax.bitcast_convert_type(_as_uint(x) ^ _zero_of(other), jnp.float32)


def _dtype(part: int | None) -> Any:
  """In which a part is summed."""
  return jnp.float64 if part == WIDE else jnp.float32


def part_of(x: jax.Array, part: int | None, grid: Any) -> jax.Array:
  """float32: x itself, or its multiple of `grid` (part 0), or what that leaves (part 1); part WIDE: x in float64."""
  if part is None or part == WIDE:
    return x.astype(_dtype(part))
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # The grid is a power of two: a product is exact, and XLA would store the quotients of a whole leaf.
  coarse = jnp.round(x * (1 / grid.astype(x.dtype))) * grid.astype(x.dtype)
  return (x - coarse if part else coarse).astype(jnp.float32)


# ---- strided form ----


@functools.partial(jax.jit, static_argnames=("row", "count", "stride", "part"))  # leaves of one shape are traced once
def _strided_sums(
  x: Any, keys: Any, columns: Any, grid: Any, *, row: int, count: int, stride: int, part: int | None
) -> jax.Array:
  """float32[count, n]: sums of `stride` signed rows each, from `row` on, a multiple of 32; `keys` are of all rows."""
  first, last = row // _HASH_ROWS, -(-(row + count * stride) // _HASH_ROWS)
  keys = jnp.broadcast_to(lax.slice(keys, (first,), (last,))[:, None], (last - first, _HASH_ROWS // stride))
  keys = keys.reshape(-1)[:count]
  shift = np.uint32(32 - stride) - lax.iota(jnp.uint32, count) * np.uint32(stride) % _HASH_ROWS
  bits = mix(keys[:, None] ^ columns[None, :]) << shift[:, None]
  # The first row's sign is taken out of the sum: XLA hands sums that end in an addition to a library, which would
  # have every signed row stored.
  sign = bits << np.uint32(stride - 1)
  bits = jnp.where(sign >= _SIGN, ~bits, bits)
  # Shifted by one at a time, which takes the fewest operations to compile.
  shifted, one = [bits], jnp.full(bits.shape, np.uint32(1))
  for _ in range(stride - 1):
    shifted.append(lax.shift_left(shifted[-1], one))
  sums: list[Any] = [None] * min(4, stride)  # shorter chains of dependent additions
  for i in range(stride):
    each = lax.slice(x, (row + i, 0), (row + i + stride * (count - 1) + 1, x.shape[1]), (stride, 1))
    # Signs first: what is done to all slices alike XLA would rather do to the whole leaf, which is then stored.
    each = part_of(_flip(each, shifted[stride - 1 - i]) if i else each, part, grid)
    sums[i % 4] = each if sums[i % 4] is None else sums[i % 4] + each
  return _flip(functools.reduce(jnp.add, sums), sign)


def _stride(x: jax.Array, per_bucket: int, part: int | None) -> int:
  """How many rows one kernel sums."""
  # XLA repeats what is done to every slice in the kernel up to 15 times; more often, it would store the whole leaf.
  return min(_STRIDE if part in (None, WIDE) and x.dtype == jnp.float32 else _STRIDE // 2, per_bucket)


def chunk_sums(x: jax.Array, keys: Any, columns: Any, *, per_bucket: int) -> jax.Array:
  """float64[m / per_bucket, n]: sums of the signed rows of each bucket, of the rows [m, n] of a leaf that have `keys`.

  It has to be called where float64 is enabled; m is a multiple of 32, and so is the number of rows before.
  """
  stride = _stride(x, per_bucket, WIDE)

  def sums() -> list[jax.Array]:
    count = x.shape[0] // stride
    return [_strided_sums(x, keys, columns, jnp.float32(1), row=0, count=count, stride=stride, part=WIDE)]

  found = _branch(_apart(_zero_of(x[0, 0].astype(jnp.float32))), sums)[0]
  return found.reshape(-1, per_bucket // stride, x.shape[1]).sum(1) if stride < per_bucket else found


@functools.partial(jax.jit, static_argnames="part")
def _signed(x: jax.Array, bits: Any, grid: Any, *, part: int | None) -> jax.Array:
  return _flip(part_of(x, part, grid), bits)


def _last_rows(x: jax.Array, row: int, keys: Any, columns: Any, part: Any, grid: Any) -> jax.Array:
  """float32[1, n]: the sum of fewer than 32 rows that share a hash, from `row` to the end."""
  shift = np.arange(row, x.shape[0], dtype=np.uint32) % np.uint32(_HASH_ROWS)
  bits = mix(keys[row // _HASH_ROWS] ^ columns)[None, :] << (np.uint32(31) - shift)[:, None]
  return _flip(part_of(x[row:], part, grid), bits).sum(0, keepdims=True)


@functools.partial(jax.jit, static_argnames=("parts", "buckets"))
def _added(row: jax.Array, sums: jax.Array, place: Any, *, parts: int, buckets: int) -> jax.Array:
  """`row`, in two laps, with the sums of a `_Term` added."""
  if parts > 1:
    sums = sums.reshape(-1, parts, sums.shape[1]).sum(1)
  flat = _folded(_folded(sums.reshape(-1), buckets * sums.shape[1]), row.size // 2)
  return lax.dynamic_update_slice(row, lax.dynamic_slice(row, (place,), flat.shape) + flat, (place,))


def _folded(flat: jax.Array, size: int) -> jax.Array:
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


class _Term(NamedTuple):
  """Something to be added to a row."""

  sums: Callable[[Any], jax.Array]  # of a uint32[] 0; its result [m, n] is stored before it is added, or is small
  alive: int  # how many numbers are stored then; 0 where it is small
  group: int
  place: Any  # in the row, below its length
  parts: int  # rows of `sums` that make one bucket
  buckets: int  # after which `sums` begins anew at `place`


def _strided_terms(piece: Piece, group: int, dim: int, seed: int, part: Any, grid: Any) -> Iterator[_Term]:
  plan = plan_of(piece.path, piece.hashes, piece.array.shape, dim, seed)
  if piece.hashes is None:
    columns = index_hash(_indices(plan.columns), plan.key)
    keys = index_hash(_indices(-(-plan.rows // _HASH_ROWS)), ~plan.key)
  else:
    columns, keys = piece.hashes.columns, piece.hashes.rows
  x = piece.array.reshape(plan.rows, plan.columns)
  term = functools.partial(_Term, group=group, place=plan.offset, parts=1, buckets=plan.buckets)
  if plan.per_bucket == 1 and x.size <= _TABLE:  # no sums to make; signs as a constant cost less than hashes
    row = np.arange(plan.rows, dtype=np.uint32)
    bits = mix(keys[row // _HASH_ROWS][:, None] ^ columns) << (np.uint32(31) - row % np.uint32(_HASH_ROWS))[:, None]
    yield term(lambda _: _signed(x, bits & _SIGN, grid, part=part), 0)
    return
  stride = _stride(x, plan.per_bucket, part)
  whole = plan.rows // plan.per_bucket
  most = max(1, _ALIVE * _STRIDE // (plan.per_bucket * plan.buckets * plan.columns)) * plan.buckets
  parts = plan.per_bucket // stride

  def strided_sums(zero: Any, row: int, count: int) -> jax.Array:
    return _strided_sums(x, keys ^ zero, columns, grid, row=row, count=count, stride=stride, part=part)

  for done in range(0, whole, most):
    count = parts * min(most, whole - done)
    sums = functools.partial(strided_sums, row=done * plan.per_bucket, count=count)
    yield term(sums, 2 * count * plan.columns, parts=parts)
  if whole * plan.per_bucket < plan.rows:
    place = (plan.offset + whole % plan.buckets * plan.columns) % dim
    yield term(lambda _: _last_rows(x, whole * plan.per_bucket, keys, columns, part, grid), 0, place=place)


def _branch(condition: Any, results: Callable[[], list[Any]]) -> list[Any]:
  """The results, where the condition is true."""
  shapes = jax.eval_shape(results)
  return lax.cond(condition, results, lambda: [jnp.zeros(x.shape, x.dtype) for x in shapes]) if shapes else []


def _apart(zero: jax.Array) -> jax.Array:
  """bool[]: true, as XLA cannot know on CPU, where what a `_branch` gives is then stored.

  On GPU, whose host would wait for the condition, it is known, and branches are left out at once.
  """
  return lax.platform_dependent(zero, cpu=lambda zero: zero == 0, default=lambda _: jnp.bool_(True))


def _waves(terms: list[_Term]) -> list[list[_Term]]:
  """The terms in order, in lots that may be alive together."""
  waves: list[list[_Term]] = [[]]
  alive = 0
  for term in terms:
    if waves[-1] and alive + term.alive > _ALIVE:
      waves.append([])
      alive = 0
    waves[-1].append(term)
    alive += term.alive
  return waves


def _strided_rows(
  pieces: Sequence[Piece], groups: Sequence[int], labels: int, dim: int, seed: int, part: Any, grid: Any
) -> list[jax.Array]:
  """`count_rows` of whole leaves."""
  terms = [
    term
    for piece, group in zip(pieces, groups, strict=True)
    for term in _strided_terms(piece, group, dim, seed, part, grid)
  ]
  some = pieces[0].array if pieces else grid
  zero = _shared_zero_of(some[(0,) * some.ndim].astype(jnp.float32))
  # XLA's CPU compiler would make sums where they are used, index by index of a flat array; and where it knew the place
  # it would write a new row, instead of a part of the old one.
  apart = _apart(zero)
  places = _branch(apart, lambda: [np.int32(term.place) for term in terms])
  terms = [term._replace(place=place) for term, place in zip(terms, places, strict=True)]
  rows = [jnp.zeros((2 * dim,), _dtype(part)) for _ in range(labels)]  # whatever is added lies in one piece
  wait: Any = np.uint32(0)
  for wave in _waves(terms):
    last = rows[0]
    stored = iter(_branch(apart, lambda wave=wave, wait=wait: [term.sums(wait) for term in wave if term.alive]))
    for term in wave:
      sums = next(stored) if term.alive else term.sums(wait)
      rows[term.group] = last = _added(rows[term.group], sums, term.place, parts=term.parts, buckets=term.buckets)
    wait = _shared_zero_of(last.astype(jnp.float32))
  return [row[:dim] + row[dim:] for row in rows]


# ---- indexed form ----


def _bucket_sums(piece: Piece, plan: Plan, most: int, part: Any, grid: Any) -> jax.Array:
  """float32[g, n]: bucket sums of a leaf or block; one contraction gives at most `most` of the g."""
  row = piece.row_index()
  keys, columns = index_hash(row >> 5, ~plan.key), index_hash(piece.column_index(), plan.key)
  shift = np.uint32(31) - row % np.uint32(_HASH_ROWS)
  bucket = row // np.uint32(plan.per_bucket) % np.uint32(plan.buckets)
  hashes = keys, columns, shift, bucket
  return _hashed_bucket_sums(piece.array, hashes, grid, buckets=plan.buckets, most=most, part=part)


@functools.partial(jax.jit, static_argnames=("buckets", "most", "part"))  # leaves of one shape are traced once
def _hashed_bucket_sums(
  x: jax.Array, hashes: tuple[Any, ...], grid: Any, *, buckets: int, most: int, part: int | None
) -> jax.Array:
  keys, columns, shift, bucket = hashes
  signed = _flip(part_of(x, part, grid), mix(keys[..., None] ^ columns) << shift[..., None])
  leading = tuple(range(x.ndim - 1))
  if buckets == 1:
    return signed.sum(leading)[None]
  sums = []
  for first in range(0, buckets, most):
    wanted = np.arange(first, min(first + most, buckets), dtype=np.uint32)
    one_hot = (bucket[..., None] == wanted).astype(signed.dtype)
    sums.append(lax.dot_general(one_hot, signed, ((leading, leading), ((), ())), lax.Precision.HIGHEST))
  return jnp.concatenate(sums)


def _chunked_bucket_sums(piece: Piece, plan: Plan, most: int, part: Any, grid: Any) -> jax.Array:
  """`_bucket_sums` by parts of the first axis, for CPU, whose contractions store their operands."""
  x, start = piece.array, piece.start or (0,)
  size = max(1, _CHUNK * x.shape[0] // x.size) if x.ndim > 1 else x.shape[0]
  whole = x.shape[0] // size

  def sums(first: Any, count: int) -> jax.Array:
    array = lax.dynamic_slice_in_dim(x, first, count)
    chunk = piece._replace(array=array, start=(start[0] + jnp.asarray(first, jnp.uint32), *start[1:]))
    return _bucket_sums(chunk, plan, most, part, grid)

  if whole <= 1:
    return _bucket_sums(piece, plan, most, part, grid)
  total = sums(whole * size, x.shape[0] - whole * size) if x.shape[0] % size else jnp.zeros(())
  shape = (plan.buckets, x.shape[-1])
  return lax.fori_loop(0, whole, lambda i, total: total + sums(i * size, size), jnp.broadcast_to(total, shape))


def _mesh(x: jax.Array) -> Any:
  """The abstract mesh that an array lies on, as far as that is known while tracing; else an empty one."""
  return getattr(jax.typeof(x).sharding, "mesh", jax.sharding.AbstractMesh((), ()))


def _may_be_split(x: jax.Array) -> bool:
  """Whether an array may be sharded; older contexts of a mesh do not show while tracing."""
  return jax.device_count() > 1 or _mesh(x).size > 1


def _is_automatic(mesh: Any) -> bool:
  """Whether all axes of a mesh, if any, are left to the partitioner."""
  return all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def _gathered(vector: jax.Array) -> jax.Array:
  """Asks for a vector on every device of a mesh of automatic axes, where its pieces would be sent around one by one."""
  mesh = _mesh(vector)
  if mesh.empty or not _is_automatic(mesh):
    return vector
  return lax.with_sharding_constraint(vector, jax.NamedSharding(mesh, jax.P()))


def _placed_sums(piece: Piece, plan: Plan, sums: jax.Array) -> jax.Array:
  """float32[g, columns of the leaf]: bucket sums of a block, and zeros beside them."""
  if piece.start is None or sums.shape[1] == plan.columns:
    return sums
  at = jnp.asarray(piece.start[-1], jnp.int32)
  width = -(-plan.columns // sums.shape[1]) * sums.shape[1]  # a last block that is padded reaches beyond the leaf
  row = lax.dynamic_update_slice_in_dim(jnp.zeros((plan.buckets, width), sums.dtype), sums, at, 1)
  return row[:, : plan.columns]


def _folding_rule(piece: Piece, plan: Plan, dim: int, part: Any) -> Callable[..., jax.Array]:
  """A function of a leaf and `grid` that gives what the leaf adds, float32[dim], for bucket sums of more numbers.

  Partitioners would send all of them between devices, and then fold them. So it brings a rule of its own, by which each
  device folds those of its block. Such rules know no vmap, which does without, and no export; nor does libtpu.
  """

  def folded(x: jax.Array, grid: Any, start: tuple[Any, ...]) -> jax.Array:
    block = piece._replace(array=x, start=start)
    sums = _bucket_sums(block, plan, plan.buckets, part, grid)
    return _folded(_placed_sums(block, plan, sums).reshape(-1), dim)

  def whole(x: jax.Array, grid: Any) -> jax.Array:
    return folded(x, grid, (0,) * x.ndim)

  def partition(mesh: Any, args: Any, result: Any) -> Any:
    del result
    if not isinstance(args[0].sharding, jax.NamedSharding):  # of a mesh without names, where all arguments were on none
      mesh = jax.sharding.Mesh(np.asarray(sorted(args[0].sharding.device_set, key=lambda one: one.id)), ("devices",))
      everywhere = jax.NamedSharding(mesh, jax.P())
      return mesh, whole, everywhere, (everywhere, everywhere)
    spec = _placement.normalised(args[0].sharding.spec, len(piece.shape))

    def local(x: jax.Array, grid: Any) -> jax.Array:
      start = _placement.block_start(x.shape, spec)
      for axis, (first, size) in enumerate(zip(start, piece.shape, strict=True)):
        if x.shape[axis] * math.prod(mesh.shape[name] for name in spec[axis]) > size:  # the last block is padded
          x = jnp.where(lax.broadcasted_iota(jnp.uint32, x.shape, axis) < np.uint32(size) - first, x, 0)
      return _placement.psum(folded(x, grid, start), [name for names in spec for name in names])

    everywhere = jax.NamedSharding(mesh, jax.P())
    return mesh, local, everywhere, (args[0].sharding, everywhere)

  def without(size: int, batched: Any, *args: Any) -> Any:
    return jax.vmap(whole, [0 if each else None for each in batched], axis_size=size)(*args), True

  rule = custom_partitioning(whole)
  axes = " ".join(f"i{axis}" for axis in range(len(piece.shape)))
  rule.def_partition(partition, lambda mesh, *_: jax.NamedSharding(mesh, jax.P()), sharding_rule=f"{axes}, -> d")
  by_hand = jax.custom_batching.custom_vmap(rule)
  by_hand.def_vmap(without)
  return by_hand


def _indexed_term(piece: Piece, dim: int, seed: int, part: Any, grid: Any) -> tuple[int, jax.Array]:
  """A place in the sketch, and what a leaf or block adds from there on."""
  piece = piece.placed()
  plan = plan_of(piece.path, piece.hashes, piece.shape, dim, seed)
  if piece.start is None:
    # Partitioners sum what each contraction gives: no more than dim numbers, where a leaf is no wider.
    most = max(1, dim // plan.columns)
    if plan.buckets * plan.columns > dim and _may_be_split(piece.array) and _is_automatic(_mesh(piece.array)):

      def plain(array: jax.Array, grid: Any) -> jax.Array:
        return _folded(_bucket_sums(piece._replace(array=array), plan, most, part, grid).reshape(-1), dim)

      rule = _folding_rule(piece, plan, dim, part)
      array = lax.stop_gradient(piece.array)
      return plan.offset, lax.platform_dependent(array, jnp.asarray(grid), cpu=rule, cuda=rule, default=plain)
    if plan.rows == 1:
      piece = piece._replace(array=_gathered(piece.array))
    sums = _bucket_sums(piece, plan, most, part, grid)
  else:

    def chunked(array: jax.Array, start: Any, grid: Any) -> jax.Array:
      return _chunked_bucket_sums(piece._replace(array=array, start=start), plan, plan.buckets, part, grid)

    def direct(array: jax.Array, start: Any, grid: Any) -> jax.Array:
      return _bucket_sums(piece._replace(array=array, start=start), plan, plan.buckets, part, grid)

    sums = lax.platform_dependent(piece.array, piece.start, grid, cpu=chunked, default=direct)
  return plan.offset, _placed_sums(piece, plan, sums).reshape(-1)


def _sum_terms(terms: list[tuple[int, jax.Array]], dim: int) -> jax.Array:
  """float32[dim]: the sum of terms that begin at given places and go around the end as often as need be."""
  laps = max(-(-(at + term.size) // dim) for at, term in terms)
  # Small terms that do not overlap share an array, so that each does not cost a whole one.
  layers: list[list[tuple[int, jax.Array]]] = []
  for at, term in sorted(terms, key=lambda term: term[0]):
    fits = (layer for layer in layers if layer[-1][0] + layer[-1][1].size <= at)
    layer = next(fits, None) if 4 * term.size < dim else None
    if layer is None:
      layers.append([(at, term)])
    else:
      layer.append((at, term))
  dtype = terms[0][1].dtype
  total = jnp.zeros((laps * dim,), dtype)
  for layer in layers:
    parts, first, end = [], layer[0][0], layer[0][0]
    for at, term in layer:
      parts += [jnp.zeros((at - end,), dtype), term] if at > end else [term]
      end = at + term.size
    total = total + lax.pad(jnp.concatenate(parts), dtype.type(0), ((first, laps * dim - end, 0),))
  return functools.reduce(jnp.add, (lax.slice(total, (lap * dim,), ((lap + 1) * dim,)) for lap in range(laps)))


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
  """float32[dim] (float64 where `part` is WIDE) for each label: the sketches of its leaves or blocks, summed.

  Args:
    pieces: real leaves or blocks, none of them empty.
    groups: by piece, index of its label.
    labels: how many labels there are.
    dim, seed: of the sketch.
    part, grid: see `part_of`.
  """
  grid = jnp.float32(1) if grid is None else grid

  def strided(arrays: list[jax.Array], grid: Any) -> list[jax.Array]:
    placed = [piece._replace(array=array) for piece, array in zip(pieces, arrays, strict=True)]
    return _strided_rows(placed, groups, labels, dim, seed, part, grid)

  def indexed(arrays: list[jax.Array], grid: Any) -> list[jax.Array]:
    terms: list[list[tuple[int, jax.Array]]] = [[] for _ in range(labels)]
    for piece, group, array in zip(pieces, groups, arrays, strict=True):
      terms[group].append(_indexed_term(piece._replace(array=array), dim, seed, part, grid))
    rows = [_sum_terms(some, dim) if some else jnp.zeros((dim,), _dtype(part)) for some in terms]
    return lax.optimization_barrier([_gathered(row) for row in rows])

  arrays = [piece.array for piece in pieces]
  if any(piece.start is not None or _may_be_split(piece.array) for piece in pieces):
    return indexed(arrays, grid)
  return lax.platform_dependent(arrays, grid, cpu=strided, cuda=strided, default=indexed)
