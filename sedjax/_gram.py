"""Inner products of rows, and the spectrum of the small matrix that they make.

Rows are scaled by powers of two before any product, so that neither 1e20 nor 1e-20 overflows. Two accuracies exist:
plain float32 for random sketches, whose own error is far larger, and a double-float form for exact rows, which keeps
singular values accurate to 2e-5 down to 1/30 of the largest (a float32 Gram matrix loses half of its digits there).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedjax import _eigen, _placement

_HIGHEST = jax.lax.Precision.HIGHEST
# Rows from which LAPACK's `eigh` uses threads, see `_eigen`.
_THREADED = 64


def power_of_two(x: jax.Array) -> jax.Array:
  """The power of two at or below |x| (float32), and 0 for zero and subnormal numbers."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jax.lax.bitcast_convert_type(bits & np.uint32(0x7F800000), jnp.float32)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x as high + low parts of 12 bits each, so that products of parts are exact in float32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  high = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFFF000), jnp.float32)
  return high, x - high


def add_pairs(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
  """Sum of two double-floats (high, low), without loss in the high parts."""
  high = a[0] + b[0]
  part = high - a[0]
  low = (a[0] - (high - part)) + (b[0] - part) + a[1] + b[1]
  total = high + low
  return total, low - (total - high)


def sum_pairs(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
  """Sum of double-floats of one shape, in a loop.

  Of one expression XLA on CPU would make every part again wherever it is used: twice as long with each number.
  """
  high, low = (jnp.stack(part) for part in zip(*pairs, strict=True))
  total, _ = jax.lax.scan(lambda total, pair: (add_pairs(total, pair), None), (high[0], low[0]), (high[1:], low[1:]))
  return total


def precise_dot(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Sum of x·y over axes as a double-float, for float32 arrays that broadcast and lie within [-1, 1].

  Products of the high halves are exact; they are summed as two levels of fixed-point integers, which is exact in any
  order and under any sharding, and what remains below 2⁻⁴⁰ or so is summed in float32.
  """
  x_high, x_low = _split(x)
  y_high, y_low = _split(y)
  product = x_high * y_high
  rest = x_high * y_low + x_low * y_high + x_low * y_low
  terms = math.prod(product.shape[axis] for axis in axes)
  bits = 30 - max(terms - 1, 1).bit_length()
  if bits < 4:
    raise ValueError(f"sedjax: a leaf of {terms} numbers is too large for sketch.exact(); use sketch.count().")
  first = jnp.round(product * np.float32(2.0**bits))
  product = product - first * np.float32(2.0**-bits)
  second = jnp.round(product * np.float32(2.0 ** (2 * bits)))
  rest = rest + (product - second * np.float32(2.0 ** (-2 * bits)))
  first = first.astype(jnp.int32).sum(axes, dtype=jnp.int32)
  second = second.astype(jnp.int32).sum(axes, dtype=jnp.int32)
  high = first.astype(jnp.float32)
  low = (first - high.astype(jnp.int32)).astype(jnp.float32) * np.float32(2.0**-bits)
  low = low + second.astype(jnp.float32) * np.float32(2.0 ** (-2 * bits)) + rest.sum(axes)
  return add_pairs((high * np.float32(2.0**-bits), low), (jnp.zeros_like(low), jnp.zeros_like(low)))


def psum_pairs(pairs: jax.Array, others: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
  """Sums double-floats [2, ...] over mesh axes, without loss, and `others` with them, in one float32 all-reduce."""
  # Limbs of 12 bits: their sums over 4,096 devices are whole numbers below 2²⁴, exact in any order.
  unit = power_of_two(jax.lax.pmax(jnp.max(jnp.abs(pairs[0])), axes)) * 2
  unit = jnp.where(unit > 0, unit, 1)
  high, low = pairs / unit
  first = jnp.round(high * np.float32(2.0**12))
  high = high - first * np.float32(2.0**-12)
  second = jnp.round(high * np.float32(2.0**24))
  rest = high - second * np.float32(2.0**-24) + low
  parts = jnp.concatenate([first.reshape(-1), second.reshape(-1), rest.reshape(-1), others.reshape(-1)])
  parts = jax.lax.psum(parts, axes)
  first, second, rest = parts[: 3 * rest.size].reshape(3, *rest.shape)
  zero = jnp.zeros_like(rest)
  total = add_pairs((second * np.float32(2.0**-24), zero), (rest, zero))
  total = add_pairs((first * np.float32(2.0**-12), zero), total)
  return jnp.stack(total) * unit, parts[3 * rest.size :].reshape(others.shape)


def plain_dot(rows: jax.Array, row: jax.Array) -> jax.Array:
  """rows [n, G, d] times row [G, d] over d: float32[G, n]."""
  slots, groups, dim = rows.shape
  if groups == 1:
    return jnp.einsum("ngd,gd->gn", rows, row, precision=_HIGHEST)
  # XLA would store the rows of many groups again, turned, for the same as products of matrices.
  inner = math.gcd(dim, 128)
  shape = groups, inner, dim // inner
  products = rows.reshape(slots, *shape) * row.reshape(shape)
  return products.sum(2).sum(-1).T


def _round_robin(size: int) -> np.ndarray:
  """int[size - 1, size]: in each of size - 1 rounds every index meets another one (size is even)."""
  order: list[int] = list(range(size))
  rounds = []
  for _ in range(size - 1):
    partner = np.empty(size, np.int32)
    for a, b in zip(order[: size // 2], reversed(order[size // 2 :]), strict=True):
      partner[a], partner[b] = b, a
    rounds.append(partner)
    order = [order[0], order[-1], *order[1:-1]]
  return np.stack(rounds)


# Under jit, as where else NumPy makes a table: it would be an operand of a `cond` on no mesh, which fails where seeds
# lie over an explicit axis.
@functools.partial(jax.jit, static_argnames="sweeps")
def _jacobi(matrix: jax.Array, sweeps: int) -> jax.Array:
  """Diagonal of a nearly diagonal symmetric matrix after Jacobi sweeps, accurate relative to each eigenvalue."""
  size = matrix.shape[0] + matrix.shape[0] % 2
  matrix = jnp.pad(matrix, (0, size - matrix.shape[0]))
  partners = jnp.asarray(_round_robin(size))
  index = jnp.arange(size, dtype=jnp.int32)

  def rotate(i: Any, m: jax.Array) -> jax.Array:
    partner = partners[i % (size - 1)]
    diagonal = jnp.diagonal(m)
    off = m[index, partner]
    difference = diagonal[partner] - diagonal
    half = difference / jnp.where(off == 0, 1, 2 * off)
    tangent = jnp.where(half < 0, -1, 1) / (jnp.abs(half) + jnp.sqrt(1 + half * half))
    # A tie gives tangent 1 for both of a pair; the rotation wants opposite signs.
    tangent = jnp.where((half == 0) & (index > partner), -tangent, tangent)
    tangent = jnp.where(off == 0, 0, tangent).astype(jnp.float32)
    cosine = jax.lax.rsqrt(1 + tangent * tangent)
    sine = tangent * cosine
    m = cosine[:, None] * m - sine[:, None] * m[partner]
    m = cosine[None, :] * m - sine[None, :] * m[:, partner]
    m = m.at[index, partner].set(0)
    return m

  return jnp.diagonal(jax.lax.fori_loop(0, sweeps * (size - 1), rotate, matrix))


def _precise_eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues (ascending) and leading vector of a double-float [2, n, n] matrix, small eigenvalues included.

  float32 `eigh` errs by about 1e-7 of the largest eigenvalue. Its vectors are good enough to make the matrix nearly
  diagonal in double-float arithmetic; the result is graded, and Jacobi sweeps solve it to relative accuracy.
  """
  scale = power_of_two(jnp.trace(gram[0])) * 2
  high, low = gram / jnp.where(scale > 0, scale, 1)
  (vectors,) = _eigen.eigh_each(high[None])[1]
  vectors = jnp.clip(vectors, -1, 1)
  image, image_low = precise_dot(high[:, :, None], vectors[None, :, :], (1,))
  image_low = image_low + jnp.einsum("ij,jk->ik", low, vectors, precision=_HIGHEST)
  turned, turned_low = precise_dot(vectors[:, :, None], jnp.clip(image, -1, 1)[:, None, :], (0,))
  turned = turned + (turned_low + jnp.einsum("ji,jk->ik", vectors, image_low, precision=_HIGHEST))
  values = _jacobi((turned + turned.T) / 2, sweeps=2)[: high.shape[0]]
  order = jnp.argsort(values)
  return values[order] * scale, vectors[:, order[-1]]


def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues (ascending) and leading eigenvector of float32[G, n, n], by the library where that is faster."""
  on_cpu = _eigen.by_library if gram.shape[-1] < _THREADED else _eigen.solve_each
  on_gpu = _eigen.solve_on_gpu if _placement.mesh_of(gram).empty else _eigen.by_library
  return jax.lax.platform_dependent(gram, cpu=on_cpu, cuda=on_gpu, default=_eigen.by_library)


def descending_spectrum(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Singular values and leading left vector of rows with Gram matrix `gram`.

  Args:
    gram: float32[parts, G, n, n]: one part, or the high and low part of a double-float.

  Returns:
    float32[G, n], descending, never negative; float32[G, n], of norm 1 unless the matrix is 0.
  """
  values, vector = _eigh(gram[0]) if gram.shape[0] == 1 else jax.vmap(_precise_eigh, 1)(gram)
  return jnp.sqrt(jnp.maximum(values[:, ::-1], 0)), vector
