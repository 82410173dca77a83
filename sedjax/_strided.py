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
  is_odd,
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
from sedjax._places import At, Places, added, added_rows, by_bucket
from sedjax._small import is_small, lots, small_row

# Partial sums alive at a time (4 MiB), since XLA's schedulers would start all leaves at once.
_ALIVE = 2**20


@functools.partial(jax.jit, static_argnames=("row", "count", "stride", "half", "part"))  # leaves of one shape share it
def _strided_sums(
  x: Any, keys: Any, columns: Any, grid: Any, *, row: int, count: int, stride: int, half: int | None, part: int | None
) -> jax.Array:
  """float32[count, 2, n]: sums of signed rows, `stride` at a time, of even and of odd parity, from `row` on.

  Where `half` is given: float32[count, n], of those of one parity, for arrays of which XLA would make a copy to see so
  many rows as one. A stride of one row has one sum, float32[count, 1, n].

  Args:
    x: [m, n].
    keys: uint32[ceil(m / 32)], of all rows.
    columns: uint32[n].
    row: a multiple of 32.
    count, stride, half, part: static.
  """
  first, last = row // HASH_ROWS, -(-(row + count * stride) // HASH_ROWS)
  keys = jnp.broadcast_to(lax.slice(keys, (first,), (last,))[:, None], (last - first, HASH_ROWS // stride))
  keys = keys.reshape(-1)[:count]
  shift = np.uint32(HASH_ROWS - stride) - lax.iota(jnp.uint32, count) * np.uint32(stride) % HASH_ROWS
  bits = sign_bits(keys, columns, shift)  # of the last of the rows that are summed
  if stride == 1:
    return flip(part_of(x[row : row + count], part, grid), bits)[:, None]

  # Two rows side by side have other parities: which of them is meant, where the first one's is even.
  if half is None:
    x, bits, which = x.reshape(-1, stride, x.shape[1]), bits[:, None], np.arange(2, dtype=np.uint32)[:, None]
  else:
    which = np.uint32(half)
  # The first row's sign is taken out of the sum: XLA hands sums that end in an addition to a library, which would
  # have every signed row stored.
  sign = bits << np.uint32(stride - 1) - which
  bits = jnp.where(sign >= SIGN, ~bits, bits)
  # Shifted by constants, one after the other, which takes the fewest operations to compile.
  shifted = {}
  for odd in (0, 1):
    before, latest = stride - 2, bits << (which if odd else 1 - which)
    for i in range(stride - 2, -1, -2):
      if is_odd(i) == odd:
        latest = latest << np.uint32(before - i) if before > i else latest
        before, shifted[i] = i, latest
  sums: list[Any] = [None] * min(4, stride // 2)  # shorter chains of dependent additions
  for turn, i in enumerate(range(0, stride, 2)):
    if half is None:
      each = lax.slice(x, (row // stride, i, 0), (row // stride + count, i + 2, x.shape[2]))
      each = lax.rev(each, (1,)) if is_odd(i) else each
    else:
      mine = row + i + (is_odd(i) ^ half)
      each = lax.slice(x, (mine, 0), (mine + stride * (count - 1) + 1, x.shape[1]), (stride, 1))
    # Signs first: what is done to all slices alike XLA would rather do to the whole leaf, which is then stored.
    each = part_of(flip(each, shifted[i]) if i else each, part, grid)
    sums[turn % 4] = each if sums[turn % 4] is None else sums[turn % 4] + each
  return flip(functools.reduce(jnp.add, sums), sign)


def stride_of(dtype: Any, lot: int, part: int | None, gpu: bool = False) -> int:
  """How many rows of a lot one kernel sums."""
  if gpu:  # all, since each kernel takes some microseconds to start
    return lot
  # 16 streams are as many as prefetchers follow, and code for 16 compiles fast. XLA repeats what is done to every slice
  # in the kernel up to 15 times; more often, it would store the whole leaf.
  return min(32 if part in (None, WIDE) and dtype == jnp.float32 else 16, lot)


def chunk_sums(x: jax.Array, keys: Any, columns: Any, *, stride: int) -> jax.Array:
  """float64[m / stride, 1 or 2, n]: `_strided_sums` of the rows [m, n] of a leaf that have `keys`.

  It has to be called where float64 is enabled; m is a multiple of 32, and so is the number of rows before.
  """
  count = x.shape[0] // stride
  return _strided_sums(x, keys, columns, jnp.float32(1), row=0, count=count, stride=stride, half=None, part=WIDE)


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
  count = x.shape[0] // plan.lot
  sums = _strided_sums(x, keys, columns, grid, row=0, count=count, stride=plan.lot, half=None, part=part)
  sums = lax.optimization_barrier(sums)  # else they are made anew, by few threads, wherever they are used
  turn = (first // np.uint32(plan.lot) + plan.turn) % np.uint32(plan.buckets)
  size = plan.buckets * sums[0].size
  turns = jnp.pad(sums, ((0, -count % plan.buckets), (0, 0), (0, 0))).reshape(-1)
  turns = jnp.roll(folded_sum(turns, size).reshape(plan.buckets, *sums.shape[1:]), turn.astype(jnp.int32), 0)
  halves = by_bucket([turns[:, i] for i in range(turns.shape[1])], plan.pairs)
  return lax.optimization_barrier(jnp.concatenate(halves))


@functools.partial(jax.jit, static_argnames="part")
def _signed(x: jax.Array, bits: Any, grid: Any, *, part: int | None) -> jax.Array:
  return flip(part_of(x, part, grid), bits)


def _last_rows(x: jax.Array, row: int, keys: Any, columns: Any, part: Any, grid: Any) -> list[jax.Array]:
  """float32[1, n] each: the sums of fewer than 32 rows that share a hash, from `row` to the end, by their parity."""
  bits = mix(keys[row // HASH_ROWS] ^ columns)
  lot = range(row, x.shape[0])
  halves = [[i for i in lot if is_odd(i - row) == odd] for odd in (0, 1)]
  sums = [sum_rows([x[i] for i in half], [i % HASH_ROWS for i in half], bits, part, grid) for half in halves if half]
  return [each[None] for each in (sums if len(sums) == 2 else [*sums, jnp.zeros_like(sums[0])])]


class _Term(NamedTuple):
  """Something to be added to a row."""

  lots: Callable[[Any], Any]  # made when the uint32[] 0 that it is given is known
  size: int  # of these, where they are stored before they are added; else 0
  added: Callable[[jax.Array, Any, At], jax.Array]
  at: At
  places: Places
  offset: int  # of those that share a place
  group: int

  @property
  def key(self) -> Any:
    """Of what is added up together."""
    return self.group, self.places.shared and self.places.columns


def _strided_terms(piece: Piece, plan: Plan, group: int, dim: int, part: Any, grid: Any, gpu: bool) -> Iterator[_Term]:
  if piece.hashes is None:
    columns = index_hash(indices(plan.columns), plan.key)
    keys = index_hash(indices(-(-plan.rows // HASH_ROWS)), ~plan.key)
  else:
    columns, keys = piece.hashes.columns, piece.hashes.rows
  x = piece.array.reshape(plan.rows, plan.columns)
  stride = stride_of(x.dtype, plan.lot, part, gpu)
  places = Places(plan.shared, plan.columns, plan.pairs, plan.buckets, dim)
  term = functools.partial(
    _Term, at=places.at(plan), places=places, offset=plan.offset if plan.shared else 0, group=group
  )
  if plan.lot == 1 and x.size <= TABLE:  # no sums to make; signs as a constant cost less than hashes
    row = np.arange(plan.rows, dtype=np.uint32)
    bits = sign_bits(keys[row // HASH_ROWS], columns, sign_shift(row))
    rows = functools.partial(_signed, x, bits & SIGN, grid, part=part)
    yield term(lambda _: rows()[:, None], 0, functools.partial(added_rows, places=places))
    return
  whole = plan.rows // plan.lot
  # Each term begins with the first bucket, and with a hash of its own.
  turn = math.lcm(plan.buckets, HASH_ROWS // plan.lot)
  most = max(1, _ALIVE * max(16, stride // 2) // (plan.lot * plan.columns * turn)) * turn
  parts = plan.lot // stride

  def strided_sums(zero: Any, row: int, count: int) -> Any:
    keys_of_each = keys ^ zero ^ zero_of_each(x[0, 0].astype(jnp.float32))
    sums = functools.partial(
      _strided_sums, x, keys_of_each, columns, grid, row=row, count=count, stride=stride, part=part
    )
    # Both parities in one array where rows are seen as lots without a copy.
    return sums(half=None) if plan.rows % stride == 0 else [sums(half=0), sums(half=1)]

  add = (
    functools.partial(added, places=places, parts=parts)
    if plan.lot > 1
    else functools.partial(added_rows, places=places)
  )
  most = whole if plan.lot == 1 else most  # whose turns have parities of their own, and are few
  for done in range(0, whole, most):
    count = parts * min(most, whole - done)
    sums = functools.partial(strided_sums, row=done * plan.lot, count=count)
    yield term(sums, min(2, stride) * count * plan.columns, add)
  if whole * plan.lot < plan.rows:
    last = functools.partial(_last_rows, x, whole * plan.lot, keys, columns, part, grid)
    yield term(lambda _: last(), 0, functools.partial(added, places=places, number=whole))


def _apart(zero: jax.Array) -> jax.Array:
  """bool[]: true, as XLA cannot know on CPU, where what a branch on it is given has then been stored.

  Else its compiler would make sums where they are used, index by index of a flat array.
  """
  return lax.platform_dependent(zero, cpu=lambda zero: zero == 0, default=lambda _: jnp.bool_(True))


def _waves(terms: list[_Term], gpu: bool) -> list[list[_Term]]:
  """The terms in order, those one after the other that may be alive together."""
  waves: list[list[_Term]] = [[]]
  alive = 0
  for term in terms:
    size = term.size * (1 if gpu else 2)  # on CPU those of the next wave are, too
    if waves[-1] and alive + size > _ALIVE:
      waves.append([])
      alive = 0
    waves[-1].append(term)
    alive += size
  return waves


def _once(done: dict[Any, _Term], sums: dict[Any, jax.Array], *_: Any) -> dict[Any, jax.Array]:
  """The sums, once around those that are done."""
  return {key: done[key].places.once(each) if key in done else each for key, each in sums.items()}


def _add_wave(
  wave: list[_Term],
  first: int,
  wait: Any,
  done: dict[Any, _Term],
  sums: dict[Any, jax.Array],
  at: Any,
  stored: list[Any],
) -> dict[Any, jax.Array]:
  """`_once` of the sums with what a wave, that begins with this number of all terms, adds to them."""
  sums, left = dict(sums), iter(stored)
  for i, term in enumerate(wave, first):
    lots = next(left) if term.size else term.lots(wait)
    where = At(*(at[i][j] for j in range(len(At._fields))))
    sums[term.key] = term.added(sums[term.key], lots, where)
  return _once(done, sums)


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
  # Where XLA knew the places it would write a new array, instead of a part of the old one.
  at = [term.at for term in terms]
  if not gpu:
    at = jnp.asarray(at, jnp.uint32) + zero if at else at
  mesh = _placement.explicit_mesh([piece.array for piece in pieces])  # of one device
  rows = _placement.on_mesh([jnp.zeros((dim,), sum_dtype(part)) for _ in range(labels)], mesh)
  last = {term.key: i for i, term in enumerate(terms)}
  sums: dict[Any, jax.Array] = {}
  wait: Any = np.uint32(0)
  first = 0
  for wave in _waves(terms, gpu):
    for term in wave:
      if term.key not in sums:
        sums[term.key] = _placement.on_mesh(term.places.zeros(sum_dtype(part)), mesh)
    mine = {term.key: term for term in wave}
    done = {key: term for key, term in mine.items() if last[key] < first + len(wave)}
    some = {key: sums.pop(key) for key in mine}
    stored = [term.lots(wait) for term in wave if term.size]
    add = functools.partial(_add_wave, wave, first, wait, {} if gpu else done)
    if gpu:  # as one kernel, which reads all and writes new sums
      some = _once(done, lax.optimization_barrier(add(some, at, lax.optimization_barrier(stored))))
    elif stored:
      some = lax.cond(apart, add, functools.partial(_once, done), some, at, stored)
    else:
      some = add(some, at, stored)
    if wave:
      wait = shared_zero_of(some[wave[-1].key].astype(jnp.float32))
    first += len(wave)
    sums |= some
    for key, term in done.items():
      rows[term.group] = rows[term.group] + term.places.row(sums.pop(key), term.offset)
  for piece, plan, group in long:
    rows[group] = rows[group] + jnp.roll(long_row(piece, plan, dim, part, grid), plan.offset)
  wait = None
  for group, some, their_plans in lots(pieces, plans, groups):
    row = small_row(some, their_plans, dim, seed, part, grid, wait)
    rows[group] = rows[group] + row
    wait = shared_zero_of(row.astype(jnp.float32))
  return rows
