"""Eigenvalues and the leading eigenvector of small Gram matrices without LAPACK or cuSOLVER.

LAPACK's BLAS wakes a thread for each core from 64 rows on; these spin for a tenth of a second after each call, and take
half of the speed of two cores from the step that follows. cuSOLVER starts some fifty kernels, and its host waits for
the device several times in between. `solve` is in plain operations: XLA compiles it on CPU, on GPU it is one kernel.
It gives one eigenvector; exact rows need all (`_gram`), and have LAPACK find them.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._late import by_devices
from sedjax._placement import explicit_spec, mesh_of
from sedjax._primitives import devices_of, is_exported, lower, new_primitive, shaped

# Nothing beside the largest entry of a Gram matrix of scaled rows, which is 1 or more.
_TINY = np.float32(1e-30)
# Least side of a matrix that a GPU's matrix units multiply, and the largest that its registers hold a few of.
_SIDE, _LARGEST = 16, 128


def _index(size: int) -> jax.Array:
  return lax.broadcasted_iota(jnp.int32, (size,), 0)


def _at(x: jax.Array, i: Any, kernel: bool) -> jax.Array:
  """x[i] of a matrix or vector; a kernel adds up its rows with zeros for the others, having no other way to it."""
  if kernel:
    return jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) == i, x, 0), 0)
  return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _tridiagonal(matrix: jax.Array, size: int, kernel: bool) -> jax.Array:
  """A tridiagonal matrix with the eigenvalues of a symmetric one, of which the first `size` rows are not zero."""
  index = _index(matrix.shape[0])

  def reflect(k: Any, a: jax.Array) -> jax.Array:
    below = jnp.where(index > k, _at(a, k, kernel), 0)
    length = jnp.sqrt(jnp.sum(below * below))
    v = below + jnp.where(index == k + 1, jnp.where(_at(below, k + 1, kernel) < 0, -length, length), 0)
    energy = jnp.sum(v * v)
    factor = jnp.where(energy > _TINY, 2 / jnp.maximum(energy, _TINY), 0)
    image = factor * (jnp.sum(a * v[:, None], 0) if kernel else jnp.sum(a * v[None, :], 1))  # whichever is faster
    image = image - (factor / 2 * jnp.sum(image * v)) * v
    return a - v[:, None] * image[None, :] - image[:, None] * v[None, :]

  return lax.fori_loop(0, size - 2, reflect, matrix)


def _tridiagonal_values(matrix: jax.Array, size: int, kernel: bool) -> jax.Array:
  """Its eigenvalues, ascending, by the signs of Sturm's sequence at 15 places at once for each, seven times over."""
  rows, columns = (lax.broadcasted_iota(jnp.int32, matrix.shape, axis) for axis in (0, 1))
  diagonal = jnp.sum(jnp.where(rows == columns, matrix, 0), 0)
  # Entry i of these is beside entries i - 1 and i, or i and i + 1, of the diagonal.
  before = jnp.sum(jnp.where(rows + 1 == columns, matrix, 0), 0)
  after = jnp.sum(jnp.where(rows - 1 == columns, matrix, 0), 0)
  radius = jnp.abs(before) + jnp.abs(after)
  real = _index(matrix.shape[0]) < size
  low = jnp.min(jnp.where(real, diagonal - radius, np.float32(np.inf)))
  high = jnp.max(jnp.where(real, diagonal + radius, np.float32(-np.inf)))
  tiny = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)) * np.float32(1e-12), _TINY)
  squares = before * before

  def away(q: jax.Array) -> jax.Array:
    """From 0, on one side, since it divides next."""
    return jnp.where(jnp.abs(q) < tiny, -tiny, q)

  def count_below(x: jax.Array) -> jax.Array:
    def step(carry: tuple[jax.Array, jax.Array], entry: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
      q, count = carry
      q = away(entry[0] - x - entry[1] / q)
      return (q, count + (q < 0).astype(jnp.int32)), None

    def step_in_kernel(i: Any, carry: Any) -> Any:
      return step(carry, (_at(diagonal, i, kernel), _at(squares, i, kernel)))[0]

    first = away(_at(diagonal, 0, kernel) - x)
    start = first, (first < 0).astype(jnp.int32)
    if kernel:
      return lax.fori_loop(1, size, step_in_kernel, start)[1]
    return lax.scan(step, start, (diagonal[1:], squares[1:]), unroll=32)[0][1]

  shape = matrix.shape[0], 16
  place = _index(matrix.shape[0])[:, None]
  part = lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32) / 16

  def narrow(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    start, width = bracket
    inner = count_below(start[:, None] + width * part)
    # The first of the 16 places is the bracket's own start, with no more eigenvalues below it than it should have.
    steps = jnp.sum((inner <= place).astype(jnp.float32), 1) - 1
    return start + jnp.maximum(steps, 0) * (width / 16), width / 16

  start, width = lax.fori_loop(0, 7, narrow, (jnp.zeros_like(diagonal) + low, high - low))
  return start + width / 2


def _leading_vector(matrix: jax.Array) -> jax.Array:
  """Of a symmetric matrix without negative eigenvalues, by squaring it 14 times; of norm 1, or 0 for the matrix 0."""
  rows, columns = (lax.broadcasted_iota(jnp.int32, matrix.shape, axis) for axis in (0, 1))

  def square(_: Any, power: jax.Array) -> jax.Array:
    power = power / jnp.maximum(jnp.max(jnp.abs(power)), _TINY)
    return jnp.matmul(power, power, precision=lax.Precision.HIGHEST)

  power = lax.fori_loop(0, 14, square, matrix)
  best = jnp.argmax(jnp.sum(jnp.where(rows == columns, power, 0), 0))
  vector = jnp.sum(jnp.where(rows == best, power, 0), 0)
  norm = jnp.sqrt(jnp.sum(vector * vector))
  return vector / jnp.where(norm > 0, norm, 1)


def solve(matrix: jax.Array, size: int | None = None, kernel: bool = False) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues (ascending) [n], and the leading eigenvector [n], of a float32 Gram matrix of scaled rows.

  Where only the first `size` of n rows and columns are given, the others being zero, the first `size` eigenvalues are
  theirs, and the others mean nothing. In a `kernel` it does without what Triton does not know.
  """
  size = matrix.shape[0] if size is None else size
  return _tridiagonal_values(_tridiagonal(matrix, size, kernel), size, kernel), _leading_vector(matrix)


def solve_each(grams: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`solve` of float32[batch, n, n]; a single one as such, which takes half of the time."""
  if grams.shape[0] > 1:
    return jax.vmap(solve)(grams)
  values, vector = solve(grams[0])
  return values[None], vector[None]


def _plain_eigh(grams: jax.Array) -> tuple[jax.Array, jax.Array]:
  values, vectors = jnp.linalg.eigh(grams)
  return values, vectors


_one_eigh = jax.custom_batching.custom_vmap(_plain_eigh)


@_one_eigh.def_vmap
def _(size: int, batched: Any, grams: jax.Array) -> tuple[Any, tuple[bool, bool]]:
  del size, batched
  spec, _ = explicit_spec(grams)
  seeds_apart = bool(spec) and bool(spec[0])  # a device has few of them
  return _plain_eigh(grams) if seeds_apart else lax.map(_one_eigh, grams), (True, True)


def eigh_each(grams: jax.Array) -> tuple[jax.Array, jax.Array]:
  """JAX's `eigh` of float32[batch, n, n], in programs for several CPU devices one matrix after the other.

  jaxlib's solver of several at once occupies a thread of XLA's pool while it waits for others, so that as many devices
  as the pool has threads would wait for each other forever.
  """
  one_by_one = functools.partial(lax.map, _one_eigh)
  if jax.device_count() == 1:
    return _plain_eigh(grams)
  if mesh_of(grams).size > 1:
    on_cpu = one_by_one
  else:
    like = [(shape, grams.dtype) for shape in (grams.shape[:-1], grams.shape)]
    on_cpu = lambda grams: tuple(by_devices(_plain_eigh, one_by_one, like, [grams]))  # noqa: E731
  values, vectors = lax.platform_dependent(grams, cpu=on_cpu, default=_plain_eigh)
  return values, vectors


def by_library(grams: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`solve` of float32[batch, n, n] by JAX's `eigh`."""
  values, vectors = eigh_each(grams)
  return values, vectors[..., -1]


def solve_in_kernel(grams: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """`solve` of float32[batch, n, n] in one kernel, one block of threads a matrix."""
  from jax.experimental import pallas  # which only a GPU needs
  from jax.experimental.pallas import triton

  count, size = grams.shape[0], grams.shape[-1]
  side = max(_SIDE, 2 ** (size - 1).bit_length())

  def kernel(gram: Any, values: Any, vector: Any) -> None:
    values[...], vector[...] = solve(gram[...], size, kernel=True)

  def block(*shape: int) -> Any:
    return pallas.BlockSpec((None, *shape), lambda i: (i, *(0 for _ in shape)))

  values, vector = pallas.pallas_call(
    kernel,
    grid=(count,),
    in_specs=[block(side, side)],
    out_specs=[block(side), block(side)],
    out_shape=[jax.ShapeDtypeStruct((count, side), jnp.float32)] * 2,
    compiler_params=triton.CompilerParams(num_warps=max(1, min(8, side * side // 1024)), num_stages=1),
    interpret=interpret,
    name="sedjax_eigen",
  )(jnp.pad(grams, ((0, 0), (0, side - size), (0, side - size))))
  return values[:, :size], vector[:, :size]


def _has_kernels() -> bool:
  """Whether this JAX compiles kernels by Triton, which it is to give up."""
  return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@functools.cache
def _primitive() -> Any:
  """`solve` of a batch, whose form is chosen when it is lowered for a GPU."""

  def results(grams: Any) -> tuple[Any, Any]:
    like = shaped(grams.shape[:-1], grams.dtype)
    return like, like

  def batched(args: Any, axes: Any) -> tuple[Any, Any]:
    grams = jnp.moveaxis(args[0], axes[0], 0)
    found = primitive.bind(grams.reshape(-1, *grams.shape[2:]))
    return [x.reshape(grams.shape[:-1]) for x in found], (0, 0)

  def lowered(context: Any, grams: Any) -> Any:
    # jax.export promises nothing for kernels, and no partitioner knows them.
    alone = devices_of(context) == 1 and not is_exported(context)
    fits = alone and context.avals_in[0].shape[-1] <= _LARGEST and _has_kernels()
    form = solve_in_kernel if fits else by_library
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)  # of Triton, see `_has_kernels`
      return lower(context, form, grams)

  def library(context: Any, grams: Any) -> Any:
    return lower(context, by_library, grams)

  # Programs that are exported for several platforms at once hold a rule for each, whether or not it is reached.
  rules = {None: library, "cuda": lowered}
  primitive = new_primitive("eigen", eager=by_library, results=results, batched=batched, lowered=rules)
  return primitive


def solve_on_gpu(grams: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`solve` of float32[batch, n, n] in a kernel for one GPU of NVIDIA's; in programs for several, by the library."""
  values, vectors = _primitive().bind(lax.stop_gradient(grams))
  return values, vectors
