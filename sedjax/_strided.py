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
  halves_of,
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

# Turns through all rows of buckets that are summed by one expression.
_TURNS = 32
# Partial sums alive at a time (4 MiB), since XLA's schedulers would start all leaves at once.
_ALIVE = 2**20


def _is_odd(number: int) -> int:
  """1 where the number of bits is odd, by which the rows of a lot are told apart; else 0."""
  return number.bit_count() % 2


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
      if _is_odd(i) == odd:
        latest = latest << np.uint32(before - i) if before > i else latest
        before, shifted[i] = i, latest
  sums: list[Any] = [None] * min(4, stride // 2)  # shorter chains of dependent additions
  for turn, i in enumerate(range(0, stride, 2)):
    if half is None:
      each = lax.slice(x, (row // stride, i, 0), (row // stride + count, i + 2, x.shape[2]))
      each = lax.rev(each, (1,)) if _is_odd(i) else each
    else:
      mine = row + i + (_is_odd(i) ^ half)
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


def lot_sums(sums: Any, parts: int) -> Any:
  """Sums of lots [lots, 1 or 2, n], of those of their parts [lots·parts, 1 or 2, n]; for jax and NumPy arrays."""
  # Each part's rows have its own parity besides. XLA hands a sum to a library.
  turned = (sums[q::parts, :: -1 if _is_odd(q) else 1] for q in range(parts))
  return functools.reduce(lambda a, b: a + b, turned)


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
  turns = jnp.roll(_of_turns(sums, plan.buckets), turn.astype(jnp.int32), 0)
  halves = _by_bucket([turns[:, i] for i in range(turns.shape[1])], plan.pairs)
  return lax.optimization_barrier(jnp.concatenate(halves))


def _of_turns(lots: jax.Array, buckets: int) -> jax.Array:
  """[buckets, …, n]: sums of the lots [lots, …, n] that lie so many apart."""
  size = buckets * lots[0].size
  return _padded(folded_sum(lots.reshape(-1), size), size).reshape(buckets, *lots.shape[1:])


def _by_bucket(turns: Sequence[jax.Array], pairs: int) -> list[jax.Array]:
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


@functools.partial(jax.jit, static_argnames="part")
def _signed(x: jax.Array, bits: Any, grid: Any, *, part: int | None) -> jax.Array:
  return flip(part_of(x, part, grid), bits)


def _last_rows(x: jax.Array, row: int, keys: Any, columns: Any, part: Any, grid: Any) -> list[jax.Array]:
  """float32[n] each: the sums of fewer than 32 rows that share a hash, from `row` to the end, by their parity."""
  bits = mix(keys[row // HASH_ROWS] ^ columns)
  lot = range(row, x.shape[0])
  halves = [[i for i in lot if _is_odd(i - row) == odd] for odd in (0, 1)]
  return [sum_rows([x[i] for i in half], [i % HASH_ROWS for i in half], bits, part, grid) for half in halves if half]


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


def _added_at(rows: jax.Array, numbers: jax.Array, *start: Any) -> jax.Array:
  """`_sliced_and_added`; where the indices are known, without a kernel of its own."""
  if all(isinstance(at, int) for at in start):
    ends = zip(start, rows.shape, numbers.shape, strict=True)
    return rows + lax.pad(numbers, numbers.dtype.type(0), [(at, whole - at - size, 0) for at, whole, size in ends])
  return _sliced(rows, numbers, [jnp.asarray(at, jnp.uint32) for at in start])  # int32 would be wrapped first


class _Places(NamedTuple):
  """How leaves of one shape fall into buckets; hashable."""

  shared: bool
  columns: int
  pairs: int
  buckets: int
  parts: int  # of a lot that are sums of their own
  dim: int

  def zeros(self, dtype: Any) -> jax.Array:
    """What is added up before it is laid out, twice as long as it is along each axis that is gone around."""
    return jnp.zeros((2 * self.buckets, 2, 2 * self.columns) if self.shared else (2, 2 * self.dim), dtype)

  def row(self, sums: jax.Array, offset: int) -> jax.Array:
    """float32[dim]: what that is in the sketch."""
    if self.shared:
      turns = sums[: self.buckets] + sums[self.buckets :]
      turns = turns[..., : self.columns] + turns[..., self.columns :]
      parts = [part.reshape(-1) for part in _by_bucket([turns[:, 0], turns[:, 1]], self.pairs)]
      halves = [folded_sum(half, self.dim) for half in halves_of(parts, self.dim)]
      rows = [_padded(half, self.dim) for half in halves]
    else:
      rows = list(sums[:, : self.dim] + sums[:, self.dim :])
    return jnp.roll(rows[0] + jnp.roll(rows[1], self.dim // 2), offset)


@functools.partial(jax.jit, static_argnums=3)
def _added(sums: jax.Array, lots: Any, at: Any, places: _Places) -> jax.Array:
  """Sums with those of a leaf's lots, from the first one on, added.

  Args:
    sums: see `_Places.zeros`.
    lots: what `_strided_sums` made, or a list of two of these, by parity.
    at: the leaf's turn and shift, or its offset.
    places: where they fall.
  """
  pairs, buckets = places.pairs, places.buckets
  if not isinstance(lots, list):
    lots = lot_sums(lots, places.parts)
    by_parity = [lots[:, i] for i in range(lots.shape[1])]
  else:
    by_parity = [
      functools.reduce(jnp.add, (lots[i ^ _is_odd(q)][q :: places.parts] for q in range(places.parts))) for i in (0, 1)
    ]
  if places.shared:
    blocks = [lots] if not isinstance(lots, list) else [each[:, None] for each in by_parity]
    for half, block in enumerate(blocks):
      block = _of_turns(block, places.buckets) if block.shape[0] > places.buckets else block
      sums = _added_at(sums, block, at[0], half, at[1])
    return sums
  if places.pairs == 1 and not isinstance(lots, list) and lots.shape[1] == 2:  # as one, which need not be laid out
    turns = _of_turns(lots, 2)
    return _added_at(sums, _folded(turns[0] + turns[1, ::-1], places.dim), 0, at[0])
  if buckets == pairs:
    return _added_at(sums, _folded(by_parity[0].reshape(1, -1), places.dim), 0, at[0])
  if len(by_parity) == 1:
    return _added_rows(sums, by_parity[0], at[0], places)
  halves = _by_bucket([_of_turns(each, buckets) for each in by_parity], pairs)
  return _added_halves(sums, halves, at[0], places)


def _added_rows(sums: jax.Array, rows: jax.Array, at: Any, places: _Places) -> jax.Array:
  """The same of lots of one row each [m, n], of which every turn through all rows of buckets has a parity."""
  turns, rest = divmod(rows.shape[0], places.buckets)
  by_parity = [[turn for turn in range(turns) if _is_odd(turn) == odd] for odd in (0, 1)]
  if turns > 1:
    flat, size = rows[: turns * places.buckets].reshape(turns, -1), places.buckets * rows.shape[1]
    some = [
      flat[np.asarray(mine)].sum(0)
      if turns > _TURNS
      else functools.reduce(jnp.add, (rows.reshape(-1)[turn * size : (turn + 1) * size] for turn in mine))
      for mine in by_parity
    ]
    both = [each.reshape(places.buckets, -1) for each in some]
    sums = _added_halves(sums, _by_bucket(both, places.pairs), at, places)
  elif turns:
    sums = _added_halves(sums, _by_bucket([rows[: places.buckets]], places.pairs), at, places)
  if rest:  # by itself, since numbers beyond the end make all slower
    first, second, left = _by_bucket([rows[rows.shape[0] - rest :]], places.pairs)
    sums = _added_halves(sums, [second, first, left] if _is_odd(turns) else [first, second, left], at, places)
  return sums


def _added_halves(sums: jax.Array, halves: list[jax.Array], at: Any, places: _Places) -> jax.Array:
  """The same of what falls into pairs' first and second buckets [at most pairs, n], and into the row that is left."""
  for i, half in enumerate(halves[:2]):
    if half.shape[0]:
      sums = _added_at(sums, _folded(half.reshape(1, -1), places.dim), i, at)
  if halves[2].shape[0]:
    sums = _added_at(sums, _cut(halves[2][0], places), 0, at + places.pairs * places.columns)
  return sums


def _cut(left: jax.Array, places: _Places) -> jax.Array:
  """[2, gap]: sums [n] of the row of buckets that is left, in the gaps that pairs leave in both halves of a sketch."""
  gap = places.dim // 2 - places.pairs * places.columns
  return jnp.pad(left, (0, 2 * gap - left.size)).reshape(2, gap)


def _padded(flat: jax.Array, size: int) -> jax.Array:
  return jnp.pad(flat, (0, size - flat.size)) if flat.size < size else flat


def _folded(rows: jax.Array, dim: int) -> jax.Array:
  """[k, at most dim]: rows [k, n] around a sketch as often as need be."""
  return jnp.stack([folded_sum(row, dim) for row in rows]) if rows.shape[1] > dim else rows


@functools.partial(jax.jit, static_argnums=(3, 4))
def _added_lot(sums: jax.Array, lot: list[jax.Array], at: Any, number: int, places: _Places) -> jax.Array:
  """The same of one lot, of sums [n] by parity, and its number."""
  both = jnp.stack([*lot, jnp.zeros_like(lot[0])][:2])
  turn, columns = number % places.buckets, places.columns
  if places.shared:
    return _added_at(sums, both[None], at[0] + turn, 0, at[1])
  if turn < 2 * places.pairs:
    block = both[::-1] if turn >= places.pairs else both
    return _added_at(sums, _folded(block, places.dim), 0, at[0] + turn % places.pairs * columns)
  return _added_at(sums, _cut(both[0] + both[1], places), 0, at[0] + places.pairs * columns)


class _Term(NamedTuple):
  """Something to be added to a row."""

  lots: Callable[[Any], Any]  # made when the uint32[] 0 that it is given is known
  size: int  # of these, where they are stored before they are added; else 0
  added: Callable[[jax.Array, Any, Any], jax.Array]
  at: tuple[Any, Any]  # see `_added`
  places: _Places
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
  places = _Places(plan.shared, plan.columns, plan.pairs, plan.buckets, plan.lot // stride, dim)
  at, offset = ((plan.turn, plan.shift), plan.offset) if plan.shared else ((plan.offset, 0), 0)
  term = functools.partial(_Term, at=at, places=places, offset=offset, group=group)
  added = functools.partial(_added, places=places)
  if plan.lot == 1 and x.size <= TABLE:  # no sums to make; signs as a constant cost less than hashes
    row = np.arange(plan.rows, dtype=np.uint32)
    bits = sign_bits(keys[row // HASH_ROWS], columns, sign_shift(row))
    yield term(lambda _: _signed(x, bits & SIGN, grid, part=part)[:, None], 0, added)
    return
  whole = plan.rows // plan.lot
  # Each term begins with the first bucket, and with a hash of its own.
  turn = math.lcm(plan.buckets, HASH_ROWS // plan.lot)
  most = max(1, _ALIVE * max(16, stride // 2) // (plan.lot * plan.columns * turn)) * turn
  # Both parities in one array where rows are seen as lots without a copy, and it need not be laid out anew.
  as_one = plan.lot == 1 or (plan.rows % stride == 0 and (plan.shared or plan.pairs == 1))

  def strided_sums(zero: Any, row: int, count: int) -> Any:
    keys_of_each = keys ^ zero ^ zero_of_each(x[0, 0].astype(jnp.float32))
    sums = functools.partial(
      _strided_sums, x, keys_of_each, columns, grid, row=row, count=count, stride=stride, part=part
    )
    return sums(half=None) if as_one else [sums(half=0), sums(half=1)]

  most = whole if plan.lot == 1 else most  # whose turns have parities of their own, and are few
  for done in range(0, whole, most):
    count = places.parts * min(most, whole - done)
    sums = functools.partial(strided_sums, row=done * plan.lot, count=count)
    yield term(sums, min(2, stride) * count * plan.columns, added)
  if whole * plan.lot < plan.rows:
    last = functools.partial(_last_rows, x, whole * plan.lot, keys, columns, part, grid)
    yield term(lambda _: last(), 0, functools.partial(_added_lot, number=whole, places=places))


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


def _add_wave(
  wave: list[_Term], first: int, wait: Any, sums: dict[Any, jax.Array], at: Any, stored: list[Any]
) -> dict[Any, jax.Array]:
  """The sums with what a wave, that begins with this number of all terms, adds to them."""
  sums, left = dict(sums), iter(stored)
  for i, term in enumerate(wave, first):
    lots = next(left) if term.size else term.lots(wait)
    sums[term.key] = term.added(sums[term.key], lots, (at[i][0], at[i][1]))
  return sums


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
    mine = {key: sums[key] for key in dict.fromkeys(term.key for term in wave)}
    add = functools.partial(_add_wave, wave, first, wait)
    stored = [term.lots(wait) for term in wave if term.size]
    if gpu:  # as one kernel, which reads all and writes new sums
      mine = lax.optimization_barrier(add(mine, at, lax.optimization_barrier(stored)))
    elif stored:
      mine = lax.cond(apart, add, lambda sums, *_: sums, mine, at, stored)
    else:
      mine = add(mine, at, stored)
    sums |= mine
    if wave:
      wait = shared_zero_of(mine[wave[-1].key].astype(jnp.float32))
    first += len(wave)
    for key, term in {term.key: term for term in wave}.items():
      if last[key] < first:
        rows[term.group] = rows[term.group] + term.places.row(sums.pop(key), term.offset)
  for piece, plan, group in long:
    rows[group] = rows[group] + jnp.roll(long_row(piece, plan, dim, part, grid), plan.offset)
  wait = None
  for group, some, their_plans in lots(pieces, plans, groups):
    row = small_row(some, their_plans, dim, seed, part, grid, wait)
    rows[group] = rows[group] + row
    wait = shared_zero_of(row.astype(jnp.float32))
  return rows
