"""Sketches: linear maps from a tree of updates to a short row that keeps inner products.

The map depends on the leaves' normalised paths, the indices inside each leaf and the seed only, so a row is the same
on every device, under every sharding, live or from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_VERSION = 1
_ROWS_PER_HASH = 32
# How many times a leaf's bucket sums may wrap around the row: 2 keeps every bucket within 12 % of its fair share of
# variance whatever the leaf's width, where 1 leaves up to half of the buckets empty.
_WRAPS = 2


def _mix(x: Any) -> Any:
  """A bijection of uint32 in which every output bit depends on every input bit (for jax and NumPy arrays)."""
  x = x ^ (x >> 16)
  x = x * np.uint32(0x7FEB352D)
  x = x ^ (x >> 15)
  x = x * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _path_key(path: str, seed: int) -> np.uint32:
  """What a leaf's path and the seed contribute to every hash of that leaf."""
  digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=4).digest()
  return np.frombuffer(digest, "<u4")[0]


def _axis_keys(start: Any, size: int, salt: np.uint32) -> jax.Array:
  """uint32[size]: the hashes of the indices start, start + 1, … along one axis."""
  index = jnp.arange(size, dtype=jnp.uint32) + jnp.asarray(start, jnp.uint32)
  return _mix(_mix(index + np.uint32(0x9E3779B9)) + salt)


def as_matrix(leaf: jax.Array) -> jax.Array:
  """Views a leaf as float32 rows by columns: its trailing axis are the columns, a vector is one row."""
  columns = leaf.shape[-1] if leaf.ndim else 1
  return leaf.astype(jnp.float32).reshape(-1, columns)


def as_real(leaf: Any) -> jax.Array:
  """A complex leaf as its real and imaginary part on a new leading axis; any other leaf unchanged."""
  leaf = jnp.asarray(leaf)
  return jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf


@dataclasses.dataclass(frozen=True, slots=True)
class _Sketch:
  dim: int
  seed: int

  @property
  def sketch_id(self) -> tuple[int, int, int, int]:
    """(kind, version, seed, dim): two rows may be compared only where these agree."""
    return (_KINDS.index(type(self)), _VERSION, self.seed, self.dim)


class Count(_Sketch):
  """See `count`."""

  def apply(self, path: str, leaf: jax.Array) -> jax.Array:
    """float32[dim]: the sketch of one real leaf of any shape and float dtype."""
    if not leaf.size:
      return jnp.zeros((self.dim,), jnp.float32)
    x = as_matrix(leaf)
    rows, columns = x.shape
    key = _path_key(path, self.seed)
    capacity = max(1, _WRAPS * self.dim // columns)
    # A leaf too small to fill the row with 32 rows a bucket uses fewer: collisions are what makes error.
    per_bucket = _ROWS_PER_HASH
    while per_bucket > 1 and -(-rows // (per_bucket // 2)) <= capacity:
      per_bucket //= 2
    groups = min(-(-rows // per_bucket), capacity)
    column_keys = _axis_keys(0, columns, key)

    def signed_sums(block: jax.Array, first_hash_row: Any) -> jax.Array:
      """Sums of signed rows, one for each bucket row, of a block that starts at a multiple of 32 rows."""
      count = block.shape[0]
      hash_rows = -(-count // _ROWS_PER_HASH)
      block = jnp.pad(block, ((0, hash_rows * _ROWS_PER_HASH - count), (0, 0)))
      block = block.reshape(hash_rows, _ROWS_PER_HASH, columns)
      row_keys = _axis_keys(first_hash_row, hash_rows, ~key)
      bits = _mix(row_keys[:, None] ^ column_keys[None, :])
      shift = np.arange(_ROWS_PER_HASH - 1, -1, -1, dtype=np.uint32)[None, :, None]
      flip = (bits[:, None, :] << shift) & np.uint32(0x80000000)
      signed = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(block, jnp.uint32) ^ flip, jnp.float32)
      sums = signed.reshape(-1, per_bucket, columns).sum(1)[:groups]
      return jnp.pad(sums, ((0, groups - sums.shape[0]), (0, 0)))

    block_rows = per_bucket * groups
    if rows <= block_rows:
      sums = signed_sums(x, 0)
    else:  # here per_bucket is 32, so that every block starts at a new hash
      whole = rows // block_rows

      def add_block(i: Any, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(x, i * block_rows, block_rows)
        return total + signed_sums(block, i * groups)

      sums = jax.lax.fori_loop(0, whole, add_block, jnp.zeros((groups, columns), jnp.float32))
      if rows % block_rows:
        sums = sums + signed_sums(x[whole * block_rows :], whole * groups)
    folds = -(-sums.size // self.dim)
    folded = jnp.pad(sums.reshape(-1), (0, folds * self.dim - sums.size))
    return jnp.roll(folded.reshape(folds, self.dim).sum(0), int(_mix(np.asarray([key]))[0]) % self.dim)


class Gaussian(_Sketch):
  """See `gaussian`."""

  def apply(self, path: str, leaf: jax.Array) -> jax.Array:
    """float32[dim]: the sketch of one real leaf of any shape and float dtype."""
    if not leaf.size:
      return jnp.zeros((self.dim,), jnp.float32)
    x = as_matrix(leaf)
    rows, columns = x.shape
    key = _path_key(path, self.seed)
    chunk = max(1, min(self.dim, 2**20 // x.size))
    index_keys = _axis_keys(0, rows, ~key)[:, None] ^ _axis_keys(0, columns, key)[None, :]
    index_keys = _mix(index_keys)

    def outputs(i: Any) -> jax.Array:
      output_keys = _axis_keys(i * chunk, chunk, np.uint32(0x5851F42D))
      bits = _mix(index_keys[None] ^ output_keys[:, None, None])
      # 23 bits, centred in their cells, so that the quantile function never sees -1 or 1.
      uniform = (bits >> 9).astype(jnp.float32) * np.float32(2**-22) + np.float32(2**-23 - 1)
      normal = np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)
      return jnp.einsum("kmn,mn->k", normal, x, precision=jax.lax.Precision.HIGHEST)

    values = jax.lax.map(outputs, jnp.arange(-(-self.dim // chunk), dtype=jnp.uint32))
    return values.reshape(-1)[: self.dim] / np.float32(math.sqrt(self.dim))


class Exact(_Sketch):
  """See `exact`."""


_KINDS = (Count, Gaussian, Exact)


def _validated(kind: type, name: str, dim: Any, seed: Any) -> Any:
  if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or dim < 1:
    raise ValueError(f"sedjax.sketch.{name}: dim must be an int >= 1, got {dim!r}; try 16384.")
  if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
    raise ValueError(f"sedjax.sketch.{name}: seed must be an int in [0, 2**31), got {seed!r}.")
  return kind(int(dim), int(seed))


def count(dim: int = 16384, *, seed: int = 0) -> Count:
  """The count sketch: each number gets a hashed sign and is added to one of `dim` buckets.

  Inner products of rows are unbiased; for evenly spread energy their variance is that of a dense Gaussian map of the
  same `dim`, 2‖x‖²‖y‖²/dim, at a cost that does not grow with `dim`.

  Args:
    dim: int, length of a row. Relative errors of singular values fall as sqrt(1/dim).
    seed: int in [0, 2**31), selects the map.

  Returns:
    A hashable sketch object.

  Raises:
    ValueError: `dim` or `seed` is not an int in its range.

  Cost: one read of the updates and `dim` float32 numbers of output.
  Source: Charikar, Chen and Farach-Colton (2002). Departure: 32 rows of a leaf share a hash, and buckets follow the
    leaf's layout.

  Example:
    >>> import sedjax
    >>> sedjax.sketch.count(1024).dim
    1024
  """
  return _validated(Count, "count", dim, seed)


def gaussian(dim: int = 100, *, seed: int = 0) -> Gaussian:
  """The dense Johnson–Lindenstrauss map of the paper: `dim` rows of N(0, 1)/sqrt(dim), generated by hashing.

  Args:
    dim: int, length of a row; the paper uses 10 times the window.
    seed: int in [0, 2**31), selects the map.

  Returns:
    A hashable sketch object.

  Raises:
    ValueError: `dim` or `seed` is not an int in its range.

  Cost: `dim` normal numbers are made for each number of the updates: for comparisons, not for large models.
  Source: arXiv 2603.15678, section on random projections.

  Example:
    >>> import sedjax
    >>> sedjax.sketch.gaussian(100).dim
    100
  """
  return _validated(Gaussian, "gaussian", dim, seed)


def exact() -> Exact:
  """No sketch: the window keeps the W + 1 updates themselves, in float32.

  Returns:
    A hashable sketch object with `dim` 0.

  Cost: memory of W + 1 copies of the parameters, and each row that is pushed reads all of them.

  Example:
    >>> import sedjax
    >>> sedjax.sketch.exact().dim
    0
  """
  return Exact(0, 0)
