"""The sketch of one real tensor after the other, in float64 and without compiling anew for each of them.

In float64 neither the sums of a sketch nor the differences of two lose what parameters in float32 hold.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from sedjax._compile import ROW_OPTIONS, compiling, known
from sedjax._count import HASH_ROWS, WIDE, Hashes, Piece, Plan, halves_of, ring_of, row_signs
from sedjax._places import lot_sums
from sedjax._selection import Leaf, Selection, aligned
from sedjax._strided import chunk_sums, stride_of
from sedjax.sketch import Count, as_real

_PLAIN = 2**18  # numbers of tensors that NumPy sketches, in less time than it takes to compile for them
_CHUNK = 3 * 2**19  # numbers, about, that one call of a compiled function sums
_KEPT = 2**16  # numbers of a tensor's hashes or signs that are kept from checkpoint to checkpoint


@functools.lru_cache(maxsize=512)
def _compiled_whole(sketch: Any, axes: Any, shape: tuple[int, ...], dtype: np.dtype) -> concurrent.futures.Future[Any]:
  """The function that sketches tensors of one shape by their hashes, being compiled by a thread."""

  def row(leaf: jax.Array, hashes: Hashes) -> jax.Array:
    leaf = as_real(leaf if axes is None else leaf.transpose(axes))
    return sketch.rows([Piece("", leaf, hashes=hashes)], [0], 1, WIDE)[0]

  def program() -> Any:
    with jax.enable_x64(True):
      turned = shape if axes is None else tuple(shape[axis] for axis in axes)
      hashes = sketch.hashes("", (2, *turned) if dtype.kind == "c" else turned)
      return jax.jit(row).lower(jax.ShapeDtypeStruct(shape, dtype), hashes).compile(known(**ROW_OPTIONS))

  return compiling(program)


@functools.lru_cache(maxsize=512)
def _compiled_chunk(rows: int, columns: int, dtype: np.dtype, stride: int) -> concurrent.futures.Future[Any]:
  """The function that sums each `stride` rows of a part of a tensor, being compiled by a thread."""

  def program() -> Any:
    with jax.enable_x64(True):
      function = functools.partial(chunk_sums, stride=stride)
      call = jax.jit(function, compiler_options=known(**ROW_OPTIONS))
      # A call, since what `compile` returns takes ten times as long to be called as a jitted function.
      x = aligned(rows * columns, dtype).reshape(rows, columns)
      call(x, np.zeros(rows // HASH_ROWS, np.uint32), np.zeros(columns, np.uint32)).block_until_ready()
      return call

  return compiling(program)


class _Way(NamedTuple):
  """How the rows of a tensor are summed, that a count sketch sees as m rows by n columns."""

  path: str
  plan: Plan
  stride: int  # rows of a lot that a compiled function sums
  chunk: int  # rows that one call of it sums; 0 where NumPy sums all

  @property
  def shape(self) -> tuple[int, int]:
    return self.plan.rows, self.plan.columns


class Part(NamedTuple):
  """Some rows of a tensor, which are summed at once."""

  start: int
  rows: int
  known: int  # of them belong to the part before, too


def _chunk_rows(rows: list[int], columns: int) -> int:
  """Rows of a chunk for tensors of so many rows: as many as the smallest has, or a part of it."""
  smallest = min(rows) // HASH_ROWS
  parts = -(-smallest * HASH_ROWS * columns // _CHUNK)
  return -(-smallest // parts) * HASH_ROWS


class Sketcher:
  """Sketches the tensors of a selection; what has to be compiled begins to be when it is made."""

  def __init__(self, selection: Selection):
    self._sketch = selection.config.sketch
    self._ways: dict[str, _Way] = {}
    alike: dict[Any, list[_Way]] = collections.defaultdict(list)
    for leaf in selection.leaves:
      plain = leaf.axes is None or leaf.info.size == max(leaf.shape)
      if not isinstance(self._sketch, Count) or leaf.dtype.kind == "c" or not plain:
        _compiled_whole(self._sketch, leaf.axes, leaf.info.shape, leaf.dtype)
        continue
      columns = leaf.columns
      plan = self._sketch.plan(leaf.path, leaf.shape)
      stride = stride_of(leaf.dtype, plan.lot, WIDE)
      way = _Way(leaf.path, plan, stride, 0)
      self._ways[leaf.path] = way
      if leaf.info.size > _PLAIN and plan.rows >= HASH_ROWS:
        # By the rows of a lot rather than the stride: of larger tensors chunks are larger.
        alike[columns, leaf.dtype, plan.lot].append(way)
    for (columns, dtype, _), ways in alike.items():
      chunk = _chunk_rows([way.shape[0] for way in ways], columns)
      _compiled_chunk(chunk, columns, dtype, ways[0].stride)
      self._ways |= {way.path: way._replace(chunk=chunk) for way in ways}

  def parts(self, leaf: Leaf) -> list[Part]:
    """The parts in which a tensor is sketched, in order; one of no rows where it has to be whole."""
    way = self._ways.get(leaf.path)
    if way is None:
      return [Part(0, 0, 0)]
    whole = way.shape[0] // HASH_ROWS * HASH_ROWS if way.chunk else 0
    parts = []
    for first in range(0, whole, way.chunk or 1):
      start = min(first, whole - way.chunk)  # the last chunk begins with rows of the one before it
      parts.append(Part(start, way.chunk, first - start))
    return parts + ([Part(whole, way.shape[0] - whole, 0)] if whole < way.shape[0] else [])

  def add(self, leaf: Leaf, part: Part, array: np.ndarray, row: np.ndarray) -> None:
    """Adds the sketch of a part of a tensor to a row; threads may do so at the same time."""
    way = self._ways.get(leaf.path)
    if way is None:
      shape = (2, *leaf.shape) if leaf.dtype.kind == "c" else leaf.shape
      call = _compiled_whole(self._sketch, leaf.axes, leaf.info.shape, leaf.dtype).result()
      with jax.enable_x64(True):
        found = call(jax.device_put(array.reshape(leaf.info.shape)), _hashes(self._sketch, leaf.path, shape))
      row += np.asarray(found)
      return
    plan, columns = way.plan, way.plan.columns
    x = array.reshape(-1, columns)
    if part.rows == way.chunk:
      hashes = _hashes(self._sketch, way.path, way.shape)
      call = _compiled_chunk(way.chunk, columns, x.dtype, way.stride).result()
      keys = hashes.rows[part.start // HASH_ROWS : (part.start + part.rows) // HASH_ROWS]
      with jax.enable_x64(True):
        sums = np.asarray(call(x, keys, hashes.columns))
      if (parts := plan.lot // way.stride) > 1:
        sums = np.stack([lot_sums(sums, parity, parts, 0, len(sums) // parts) for parity in (0, 1)], 1)
    else:
      signs = (_signs if x.size <= _KEPT else _signs.__wrapped__)(self._sketch, way.path, way.shape, part.start)
      signed = np.multiply(signs, x if x.dtype.kind == "f" else x.astype(np.float64), dtype=np.float64)
      lots = -(-len(x) // plan.lot)
      if lots * plan.lot > len(x):
        signed = np.concatenate([signed, np.zeros((lots * plan.lot - len(x), columns))])
      sums = np.matmul(_parities(plan.lot), signed.reshape(lots, plan.lot, columns))
    _add_lots(sums[part.known // plan.lot :], (part.start + part.known) // plan.lot, plan, row)


@functools.cache
def _parities(lot: int) -> np.ndarray:
  """float64[1 or 2, lot]: which rows of a lot have each parity."""
  odd = np.asarray([i.bit_count() % 2 for i in range(lot)])
  return np.stack([odd == 0, odd == 1][: min(lot, 2)]).astype(np.float64)


def _add_lots(lots: np.ndarray, number: int, plan: Plan, row: np.ndarray) -> None:
  """Adds sums of lots [lots, 1 or 2, n], one after the other from this number on, to a sketch."""
  pairs, buckets, columns = plan.pairs, plan.buckets, plan.columns
  total = np.zeros((buckets, columns))
  while len(lots):
    turn = (number + plan.turn) % buckets
    second = turn // pairs
    odd = (number // buckets).bit_count() % 2 if plan.lot == 1 else 0
    some = lots[: min(pairs * (second + 1), buckets) - turn]
    if second == 2:  # the row of buckets that is left
      total[turn] += some[0].sum(0)
    else:
      for parity in range(some.shape[1]):
        first = (parity ^ odd ^ second) * pairs + turn % pairs if buckets > pairs else turn
        total[first : first + len(some)] += some[:, parity]
    lots, number = lots[len(some) :], number + len(some)
  flat = np.roll(total, plan.shift, 1).reshape(-1) if plan.shift else total.reshape(-1)
  ring, end = row[: ring_of(row.size)], pairs * columns
  parts = [flat] if buckets == pairs else [flat[:end], flat[end : 2 * end], flat[2 * end :]]
  for i, half in enumerate(halves_of(parts, ring.size)):
    _add(half, ring, (plan.offset + i * (ring.size // 2)) % ring.size)


def _add(sums: np.ndarray, row: np.ndarray, offset: int) -> None:
  """Adds what lies in the sketch from `offset` on, and goes around its end."""
  for at in range(0, sums.size, row.size):
    lap = sums[at : at + row.size]
    end = min(lap.size, row.size - offset)
    row[offset : offset + end] += lap[:end]
    if end < lap.size:
      row[: lap.size - end] += lap[end:]


@functools.lru_cache(maxsize=1024)
def _kept_hashes(sketch: Any, path: str, shape: tuple[int, ...]) -> Hashes:
  return sketch.hashes(path, shape)


def _hashes(sketch: Any, path: str, shape: tuple[int, ...]) -> Hashes:
  few = sum(shape[-1:]) + math.prod(shape[:-1]) // HASH_ROWS <= _KEPT
  return (_kept_hashes if few else _kept_hashes.__wrapped__)(sketch, path, shape)


@functools.lru_cache(maxsize=1024)
def _signs(sketch: Any, path: str, shape: tuple[int, ...], start: int) -> np.ndarray:
  return row_signs(sketch.hashes(path, shape), start, shape[0])
