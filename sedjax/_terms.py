"""What leaves and blocks add to a row, and the sum of it: the end of the count sketch's indexed form. See `_count`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._count import HASH_ROWS, SIGN, flip, folded_sum, part_of, sum_dtype, vector_bits
from sedjax._places import added_at, padded

# Laps around the sketch of a term at most: those of all terms are added up in one kernel, and longer terms are folded.
MOST_LAPS = 4


class Term(NamedTuple):
  """Bucket sums that are to be added to a row."""

  at: int  # place in the sketch of the first number
  sums: jax.Array  # [g, n]
  pairs: int = 1  # rows of pairs of buckets
  start: Any = 0  # by how many columns they are to be turned

  def where(self, condition: Any) -> Term:
    """The same where the condition holds, else nothing."""
    return self if condition is True else self._replace(sums=jnp.where(condition, self.sums, 0))


class Vector(NamedTuple):
  """A leaf of one row, or a block of it, that is to be signed and added to a row."""

  at: int  # place in the sketch of the leaf's first number
  numbers: jax.Array  # [k]
  key: Any  # uint32[], not traced: the leaf's, of its signs
  columns: int  # of the leaf, no more than `dim`
  start: Any = 0  # of the block
  speaks: Any = True  # whether it is added

  def where(self, condition: Any) -> Vector:
    """The same where the condition holds, else nothing."""
    return self._replace(speaks=condition)

  def bits(self) -> Any:
    """uint32[k]: the highest bit of each is its number's sign; in NumPy where `start` is known."""
    size, start = self.numbers.size, self.start
    if isinstance(start, int):
      return vector_bits(np.arange(start, start + size, dtype=np.uint32), self.key)
    return vector_bits(lax.iota(jnp.uint32, size) + start, self.key)

  def signed(self, part: Any, grid: Any) -> jax.Array:
    """float32[k]."""
    return jnp.where(self.speaks, flip(part_of(self.numbers, part, grid), self.bits()), 0)


def placed_at(sums: jax.Array, start: Any, columns: int) -> jax.Array:
  """[g, columns] of zeros, with sums [g, n] from a column on, which may be traced."""
  # A slice of what is padded, not an update of zeros, which TPUs would store before and after it.
  padded = lax.pad(sums, sums.dtype.type(0), ((0, 0, 0), (columns, columns, 0)))
  return lax.dynamic_slice_in_dim(padded, columns - jnp.asarray(start, jnp.int32), columns, 1)


class _Span(NamedTuple):
  """Numbers that are added to a row."""

  at: int  # place in the sketch of the first of them
  flat: jax.Array
  begin: int
  end: int  # flat[begin:end]


def _laid_out(terms: Sequence[Term]) -> list[Term]:
  """One term for all that have one place."""
  by_start: dict[Any, list[Term]] = {}
  for term in terms:
    start = term.start if isinstance(term.start, int) else id(term.start)
    by_start.setdefault((term.at, term.sums.shape, term.pairs, start), []).append(term)
  by_place: dict[Any, list[Term]] = {}
  for alike in by_start.values():
    sums, (at, _, pairs, start) = functools.reduce(jnp.add, [term.sums for term in alike]), alike[0]
    if not (isinstance(start, int) and start == 0):
      sums = jnp.roll(sums, jnp.asarray(start, jnp.int32), 1)
    by_place.setdefault((at, sums.shape, pairs), []).append(Term(at, sums, pairs))
  return [
    alike[0]._replace(sums=functools.reduce(jnp.add, [term.sums for term in alike])) for alike in by_place.values()
  ]


def _spans(term: Term, dim: int) -> list[_Span]:
  """Where bucket sums lie: `halves_of` them, as parts of one array."""
  flat, half, at = term.sums.reshape(-1), dim // 2, term.at
  end = term.pairs * term.sums.shape[1]
  if flat.size == end or (2 * end == flat.size == dim):  # as one where the second half follows the first
    return [_Span(at, flat, 0, flat.size)]
  spans = [_Span(at, flat, 0, end), _Span(at + half, flat, end, 2 * end)]
  if flat.size > 2 * end:  # a row that is left, in the gaps that pairs leave in both halves
    spans += [_Span(at + end, flat, 2 * end, half + end), _Span(at + half + end, flat, half + end, flat.size)]
  return spans


def _by_itself(span: _Span, dim: int, laps: int) -> _Span:
  """The same of an array of its own, folded into one lap where it has more than so many."""
  flat = span.flat[span.begin : span.end]
  flat = folded_sum(flat, dim) if flat.size > laps * dim else flat
  return _Span(span.at % dim, flat, 0, flat.size)


def _side_by_side(ends: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
  """Which of some arrays, that begin and end there, share a layer, in which none overlap; large ones share none."""
  layers: list[tuple[int, list[int]]] = []
  for i in sorted(range(len(ends)), key=lambda i: ends[i]):
    begin, end = ends[i]
    large = end - begin >= most
    found = next((j for j, (last, _) in enumerate(layers) if last <= begin and not large), len(layers))
    members = layers.pop(found)[1] if found < len(layers) else []
    layers.insert(found, (sys.maxsize if large else end, [*members, i]))
  return [members for _, members in layers]


def _folded(total: jax.Array, dim: int) -> jax.Array:
  return functools.reduce(jnp.add, (total[lap : lap + dim] for lap in range(0, total.size, dim)))


def sum_terms(terms: Sequence[Term], dim: int, laps: int = MOST_LAPS) -> jax.Array:
  """float32[dim]: the sum of terms that begin at given places and go around the end as often as need be.

  What is longer than so many laps is folded first.
  """
  spans = [_by_itself(span, dim, laps) for term in _laid_out(terms) for span in _spans(term, dim)]
  size = max(-(-(span.at + span.end) // dim) for span in spans) * dim
  dtype = spans[0].flat.dtype
  total = jnp.zeros((size,), dtype)
  # Small ones that do not overlap share an array, so that each does not cost a whole one.
  for layer in _side_by_side([(span.at, span.at + span.end) for span in spans], dim // 4):
    parts, first, end = [], spans[layer[0]].at, spans[layer[0]].at
    for span in (spans[i] for i in layer):
      parts += [jnp.zeros((span.at - end,), dtype), span.flat] if span.at > end else [span.flat]
      end = span.at + span.end
    total = total + padded(jnp.concatenate(parts), size, first)
  return _folded(total, dim)


def sum_terms_elsewhere(terms: Sequence[Term | Vector], dim: int, part: Any, grid: Any) -> jax.Array:
  """`sum_terms`, of vectors too; the arguments are those of `sum_terms_on_tpu`."""

  def bucket_sums(vector: Vector) -> jax.Array:
    signed = vector.signed(part, grid)[None]
    return signed if signed.size == vector.columns else placed_at(signed, vector.start, vector.columns)

  return sum_terms([Term(term.at, bucket_sums(term)) if isinstance(term, Vector) else term for term in terms], dim)


def sum_terms_on_tpu(terms: Sequence[Term | Vector], dim: int, part: Any, grid: Any) -> jax.Array:
  """`sum_terms` for a compiler that fuses what is made of padded arrays, but nothing that is to be padded or sliced.

  Args:
    terms: at least one.
    dim: int.
    part, grid: of vectors, see `part_of`.
  """
  vectors = [term for term in terms if isinstance(term, Vector)]
  spans = [span for term in _laid_out([term for term in terms if isinstance(term, Term)]) for span in _spans(term, dim)]
  spans = [_by_itself(span, dim, MOST_LAPS) if span.end - span.begin > dim else span for span in spans]
  total = _sum_of_spans(spans, dim) if spans else jnp.zeros((2 * dim,), sum_dtype(part))
  for vector in vectors:
    if not isinstance(vector.start, int):
      total = added_at(total, vector.signed(part, grid), vector.at + vector.start)
  rows = _vector_rows([vector for vector in vectors if isinstance(vector.start, int)], dim, part, grid)
  return functools.reduce(jnp.add, rows, _folded(total, dim))


def _sum_of_spans(spans: Sequence[_Span], dim: int) -> jax.Array:
  """float32[laps·dim], two laps at least: the sum of arrays of which each span is left."""
  firsts = [(span.at - span.begin) % dim for span in spans]  # where flat[0] comes to lie
  size = max(2, *(-(-(first + span.flat.size) // dim) for first, span in zip(firsts, spans, strict=True))) * dim
  place = lax.iota(jnp.uint32, size)
  rows = []
  for first, (_, flat, begin, end) in zip(firsts, spans, strict=True):
    inside = (place >= np.uint32(first + begin)) & (place < np.uint32(first + end))
    row = padded(flat, size, first)
    rows.append(row if end - begin == flat.size else jnp.where(inside, row, 0))
  return functools.reduce(jnp.add, rows)


class _Segment(NamedTuple):
  """Numbers of a vector that are in one lap."""

  at: int
  numbers: jax.Array
  bits: np.ndarray  # uint32: the highest one of each is its sign


def _vector_rows(vectors: Sequence[Vector], dim: int, part: Any, grid: Any) -> list[jax.Array]:
  """float32[dim] each, whose sum is that of the vectors."""
  alike: dict[Any, list[Vector]] = {}
  for vector in vectors:
    alike.setdefault((vector.numbers.dtype, id(vector.speaks)), []).append(vector)
  # Numbers side by side are signed as one, by a bit of a constant for each layer.
  layers = []
  for some in alike.values():
    segments = [segment for vector in some for segment in _segments(vector, dim)]
    ends = [(segment.at, segment.at + segment.numbers.size) for segment in segments]
    layers += [(some[0].speaks, [segments[i] for i in layer]) for layer in _side_by_side(ends, sys.maxsize)]
  rows = []
  for first in range(0, len(layers), HASH_ROWS):
    some = layers[first : first + HASH_ROWS]
    signs = np.zeros((dim,), np.uint32)
    for i, (_, layer) in enumerate(some):
      for at, _, bits in layer:
        signs[at : at + bits.size] |= bits >> np.uint32(i)
    signs = lax.optimization_barrier(jnp.asarray(signs))  # else there would be a constant for each layer
    for i, (speaks, layer) in enumerate(some):
      row = functools.reduce(jnp.add, [padded(numbers, dim, at) for at, numbers, _ in layer])
      rows.append(jnp.where(speaks, flip(part_of(row, part, grid), signs << np.uint32(i)), 0))
  return rows


def _segments(vector: Vector, dim: int) -> list[_Segment]:
  """A vector before and after the end of the sketch."""
  at, bits = (vector.at + vector.start) % dim, vector.bits() & SIGN
  rest = dim - at
  parts = [_Segment(at, vector.numbers[:rest], bits[:rest]), _Segment(0, vector.numbers[rest:], bits[rest:])]
  return [each for each in parts if each.bits.size]
