"""The strided form of the count sketch: whole leaves on one device, some rows at a time. See `_count`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax import _placement
from sedjax._count import (
  HASH_ROWS,
  SIGN,
  TABLE,
  WIDE,
  Piece,
  Plan,
  flip,
  folded_sum,
  index_hash,
  indices,
  mix,
  part_of,
  plan_of,
  sign_bits,
  sign_shift,
  sum_dtype,
  sum_rows,
)
from sedjax._long import is_long, long_row
from sedjax._order import shared_zero_of, zero_of_each
from sedjax._small import is_small, lots, small_row

# Partial sums alive at a time (4 MiB), since XLA's schedulers would start all leaves at once.
_ALIVE = 2**20


@functools.partial(jax.jit, static_argnames=("row", "count", "stride", "part"))  # leaves of one shape are traced once
def _strided_sums(
  x: Any, keys: Any, columns: Any, grid: Any, *, row: int, count: int, stride: int, part: int | None
) -> jax.Array:
  """float32[count, n]: sums of `stride` signed rows each, from `row` on, a multiple of 32; `keys` are of all rows."""
  first, last = row // HASH_ROWS, -(-(row + count * stride) // HASH_ROWS)
  keys = jnp.broadcast_to(lax.slice(keys, (first,), (last,))[:, None], (last - first, HASH_ROWS // stride))
  keys = keys.reshape(-1)[:count]
  shift = np.uint32(HASH_ROWS - stride) - lax.iota(jnp.uint32, count) * np.uint32(stride) % HASH_ROWS
  bits = sign_bits(keys, columns, shift)
  # The first row's sign is taken out of the sum: XLA hands sums that end in an addition to a library, which would
  # have every signed row stored.
  sign = bits << np.uint32(stride - 1)
  bits = jnp.where(sign >= SIGN, ~bits, bits)
  # Shifted by one at a time, which takes the fewest operations to compile.
  shifted, one = [bits], jnp.full(bits.shape, np.uint32(1))
  for _ in range(stride - 1):
    shifted.append(lax.shift_left(shifted[-1], one))
  sums: list[Any] = [None] * min(4, stride)  # shorter chains of dependent additions
  for i in range(stride):
    each = lax.slice(x, (row + i, 0), (row + i + stride * (count - 1) + 1, x.shape[1]), (stride, 1))
    # Signs first: what is done to all slices alike XLA would rather do to the whole leaf, which is then stored.
    each = part_of(flip(each, shifted[stride - 1 - i]) if i else each, part, grid)
    sums[i % 4] = each if sums[i % 4] is None else sums[i % 4] + each
  return flip(functools.reduce(jnp.add, sums), sign)


def stride_of(dtype: Any, per_bucket: int, part: int | None, gpu: bool = False) -> int:
  """How many rows of a bucket one kernel sums."""
  if gpu:  # all, since each kernel takes some microseconds to start
    return per_bucket
  # 16 streams are as many as prefetchers follow, and code for 16 compiles fast. XLA repeats what is done to every slice
  # in the kernel up to 15 times; more often, it would store the whole leaf.
  return min(16 if part in (None, WIDE) and dtype == jnp.float32 else 8, per_bucket)


def chunk_sums(x: jax.Array, keys: Any, columns: Any, *, stride: int) -> jax.Array:
  """float64[m / stride, n]: sums of `stride` signed rows each, of the rows [m, n] of a leaf that have `keys`.

  It has to be called where float64 is enabled; m is a multiple of 32, and so is the number of rows before.
  """
  count = x.shape[0] // stride
  return _strided_sums(x, keys, columns, jnp.float32(1), row=0, count=count, stride=stride, part=WIDE)


def aligned(piece: Piece) -> bool:
  """Whether a block holds rows one after the other, and hashes and buckets of its own."""
  shape = piece.array.shape
  return shape[1:-1] == piece.shape[1:-1] and math.prod(shape[:-1]) % HASH_ROWS == 0 < piece.array.size


def block_sums(piece: Piece, plan: Plan, part: int | None, grid: Any) -> jax.Array:
  """float32[g, n]: the bucket sums of an `aligned` block on a GPU; blocks before it are as large as it is."""
  x = piece.array.reshape(-1, piece.array.shape[-1])
  first = jnp.ravel(piece.row_index())[0]
  keys = index_hash(indices(x.shape[0] // HASH_ROWS) + first // HASH_ROWS, ~plan.key)
  columns = index_hash(piece.column_index(), plan.key)
  count = x.shape[0] // plan.per_bucket
  sums = _strided_sums(x, keys, columns, grid, row=0, count=count, stride=plan.per_bucket, part=part)
  sums = lax.optimization_barrier(sums)  # else they are made anew, by few threads, wherever they are used
  flat = folded_sum(sums.reshape(-1), plan.buckets * x.shape[1])
  flat = jnp.pad(flat, (0, plan.buckets * x.shape[1] - flat.size))
  bucket = first // np.uint32(plan.per_bucket) % np.uint32(plan.buckets)
  return lax.optimization_barrier(jnp.roll(flat.reshape(plan.buckets, -1), bucket.astype(jnp.int32), 0))


@functools.partial(jax.jit, static_argnames="part")
def _signed(x: jax.Array, bits: Any, grid: Any, *, part: int | None) -> jax.Array:
  return flip(part_of(x, part, grid), bits)


def _last_rows(x: jax.Array, row: int, keys: Any, columns: Any, part: Any, grid: Any) -> jax.Array:
  """float32[1, n]: the sum of fewer than 32 rows that share a hash, from `row` to the end."""
  bits = mix(keys[row // HASH_ROWS] ^ columns)
  return sum_rows([x[i] for i in range(row, x.shape[0])], bits, row % HASH_ROWS, part, grid)[None]


def _folded(sums: jax.Array, buckets: int, dim: int) -> jax.Array:
  """float32[at most dim]: rows of sums, which begin anew after so many buckets, around a sketch as often as need be."""
  return folded_sum(folded_sum(sums.reshape(-1), buckets * sums.shape[1]), dim)


def _sliced_and_added(rows: jax.Array, numbers: jax.Array, place: Any) -> jax.Array:
  """Rows [..., n] with numbers [..., k] added from this place of the last axis on."""
  start = (*(np.int32(0),) * (rows.ndim - 1), place)
  return lax.dynamic_update_slice(rows, lax.dynamic_slice(rows, start, numbers.shape) + numbers, start)


_added_at = jax.custom_batching.custom_vmap(_sliced_and_added)


@_added_at.def_vmap
def _(axis_size: int, in_batched: Any, rows: jax.Array, numbers: jax.Array, place: Any) -> tuple[jax.Array, bool]:
  """Slices again where the place is one for all: JAX's own rules gather and scatter, in two kernels."""
  axes = [0 if batched else None for batched in in_batched]
  if in_batched[2]:  # by a branch, of which vmap batches all results
    return jax.vmap(_sliced_and_added, axes, axis_size=axis_size)(rows, numbers, place), True
  rows, numbers = (
    x if axis == 0 else jnp.broadcast_to(x, (axis_size, *x.shape))
    for x, axis in zip((rows, numbers), axes, strict=False)
  )
  return _added_at(rows, numbers, place), True


@functools.partial(jax.jit, static_argnames=("parts", "buckets"))
def _added(row: jax.Array, sums: jax.Array, place: Any, *, parts: int, buckets: int) -> jax.Array:
  """`row`, in two laps, with the sums of a `_Term` added."""
  sums = functools.reduce(jnp.add, (sums[i::parts] for i in range(parts)))  # XLA hands a sum to a library
  return _added_at(row, _folded(sums, buckets, row.size // 2), place)


class _Term(NamedTuple):
  """Something to be added to a row."""

  sums: Callable[[Any], jax.Array]  # made when the uint32[] 0 that it is given is known
  shape: tuple[int, int]  # of the sums, where they are stored before they are added; else (0, 0)
  group: int
  place: Any  # in the row, below its length
  parts: int  # rows of `sums` that make one bucket
  buckets: int  # after which `sums` begins anew at `place`


def _strided_terms(piece: Piece, plan: Plan, group: int, dim: int, part: Any, grid: Any, gpu: bool) -> Iterator[_Term]:
  if piece.hashes is None:
    columns = index_hash(indices(plan.columns), plan.key)
    keys = index_hash(indices(-(-plan.rows // HASH_ROWS)), ~plan.key)
  else:
    columns, keys = piece.hashes.columns, piece.hashes.rows
  x = piece.array.reshape(plan.rows, plan.columns)
  term = functools.partial(_Term, group=group, place=plan.offset, parts=1, buckets=plan.buckets)
  if plan.per_bucket == 1 and x.size <= TABLE:  # no sums to make; signs as a constant cost less than hashes
    row = np.arange(plan.rows, dtype=np.uint32)
    bits = sign_bits(keys[row // HASH_ROWS], columns, sign_shift(row))
    yield term(lambda _: _signed(x, bits & SIGN, grid, part=part), (0, 0))
    return
  stride = stride_of(x.dtype, plan.per_bucket, part, gpu)
  whole = plan.rows // plan.per_bucket
  # Each term begins with the first bucket, and with a hash of its own.
  turn = math.lcm(plan.buckets, HASH_ROWS // plan.per_bucket)
  most = max(1, _ALIVE * max(16, stride) // (plan.per_bucket * plan.columns * turn)) * turn
  parts = plan.per_bucket // stride

  def strided_sums(zero: Any, row: int, count: int) -> jax.Array:
    keys_of_each = keys ^ zero ^ zero_of_each(x[0, 0].astype(jnp.float32))
    return _strided_sums(x, keys_of_each, columns, grid, row=row, count=count, stride=stride, part=part)

  for done in range(0, whole, most):
    count = parts * min(most, whole - done)
    sums = functools.partial(strided_sums, row=done * plan.per_bucket, count=count)
    yield term(sums, (count, plan.columns), parts=parts)
  if whole * plan.per_bucket < plan.rows:
    place = (plan.offset + whole % plan.buckets * plan.columns) % dim
    yield term(lambda _: _last_rows(x, whole * plan.per_bucket, keys, columns, part, grid), (0, 0), place=place)


def _apart(zero: jax.Array) -> jax.Array:
  """bool[]: true, as XLA cannot know on CPU, where what a branch on it is given has then been stored.

  Else its compiler would make sums where they are used, index by index of a flat array.
  """
  return lax.platform_dependent(zero, cpu=lambda zero: zero == 0, default=lambda _: jnp.bool_(True))


def _waves(terms: list[_Term], gpu: bool) -> list[list[_Term]]:
  """The terms in order, in lots that may be alive together."""
  waves: list[list[_Term]] = [[]]
  alive = 0
  for term in terms:
    size = math.prod(term.shape) * (1 if gpu else 2)  # on CPU those of the next lot are, too
    if waves[-1] and alive + size > _ALIVE:
      waves.append([])
      alive = 0
    waves[-1].append(term)
    alive += size
  return waves


def _add_wave(
  wave: list[_Term], first: int, wait: Any, rows: list[jax.Array], places: jax.Array, stored: list[jax.Array]
) -> list[jax.Array]:
  """The rows with what a wave, that begins with this number of all terms, adds at these places."""
  rows, left = list(rows), iter(stored)
  for i, term in enumerate(wave, first):
    sums = next(left) if any(term.shape) else term.sums(wait)
    rows[term.group] = _added(rows[term.group], sums, places[i], parts=term.parts, buckets=term.buckets)
  return rows


def _add_wave_on_gpu(wave: list[_Term], wait: Any, rows: list[jax.Array], stored: list[jax.Array]) -> list[jax.Array]:
  """The same as one kernel, which reads all sums and writes new rows."""
  rows, left = list(rows), iter(lax.optimization_barrier(stored))
  for term in wave:
    sums = next(left) if any(term.shape) else term.sums(wait)
    row = rows[term.group]
    flat = _folded(sums, term.buckets, row.size // 2)
    after = row.size - term.place - flat.size
    rows[term.group] = row + lax.pad(flat, flat.dtype.type(0), ((term.place, after, 0),))
  return lax.optimization_barrier(rows)


def strided_rows(
  pieces: Sequence[Piece],
  groups: Sequence[int],
  labels: int,
  dim: int,
  seed: int,
  part: Any,
  grid: Any,
  gpu: bool = False,
) -> list[jax.Array]:
  """float32[dim] for each label: the count sketches of whole leaves, each in one place."""
  plans = [plan_of(piece.path, piece.hashes, piece.array.shape, dim, seed) for piece in pieces]
  # One lot after the other, and a leaf is kept until its turn comes: so those first that are made first.
  in_turn = sorted(zip(pieces, plans, groups, strict=True), key=lambda each: each[0].rank)
  long = [] if gpu else [each for each in in_turn if is_long(*each[:2])]
  terms = [
    term
    for piece, plan, group in in_turn
    if not is_small(piece, plan) and (gpu or not is_long(piece, plan))
    for term in _strided_terms(piece, plan, group, dim, part, grid, gpu)
  ]
  some = in_turn[0][0].array if pieces else grid
  zero = shared_zero_of(some[(0,) * some.ndim].astype(jnp.float32))
  apart = _apart(zero)
  # Where XLA knew the place it would write a new row, instead of a part of the old one.
  places = jnp.asarray([term.place for term in terms], jnp.int32) + zero.astype(jnp.int32)
  rows = [jnp.zeros((2 * dim,), sum_dtype(part)) for _ in range(labels)]  # whatever is added lies in one piece
  rows = _placement.on_mesh(rows, _placement.explicit_mesh([piece.array for piece in pieces]))  # of one device
  wait: Any = np.uint32(0)
  first = 0
  for wave in _waves(terms, gpu):
    add = functools.partial(_add_wave, wave, first, wait)
    stored = [term.sums(wait) for term in wave if any(term.shape)]
    if gpu:
      rows = _add_wave_on_gpu(wave, wait, rows, stored)
    elif stored:
      rows = lax.cond(apart, add, lambda rows, *_: rows, rows, places, stored)
    else:
      rows = add(rows, places, stored)
    if wave:
      wait = shared_zero_of(rows[wave[-1].group].astype(jnp.float32))
    first += len(wave)
  rows = [row[:dim] + row[dim:] for row in rows]
  for piece, plan, group in long:
    rows[group] = rows[group] + jnp.roll(long_row(piece, plan, dim, part, grid), plan.offset)
  wait = None
  for group, some, their_plans in lots(pieces, plans, groups):
    row = small_row(some, their_plans, dim, seed, part, grid, wait)
    rows[group] = rows[group] + row
    wait = shared_zero_of(row.astype(jnp.float32))
  return rows
