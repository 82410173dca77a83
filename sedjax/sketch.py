"""Sketches: linear maps from a tree of updates to a short row that keeps inner products.

The map depends on the leaves' normalised paths, the indices inside each leaf and the seed only, so a row is the same
on every device, under every sharding, live or from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._count import (
  WIDE,
  Hashes,
  Piece,
  Plan,
  hashes_of,
  index_hash,
  mix,
  part_of,
  path_key,
  plan_of,
  ring_of,
  sum_dtype,
)
from sedjax._indexed import indexed_rows
from sedjax._late import by_devices
from sedjax._placement import mesh_of
from sedjax._strided import strided_rows

__all__ = ["Count", "Exact", "Gaussian", "count", "exact", "gaussian"]

_VERSION = 4


def as_real(leaf: Any) -> jax.Array:
  """A complex leaf as its real and imaginary part on a new leading axis; any other leaf unchanged."""
  leaf = jnp.asarray(leaf)
  return jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf


@dataclasses.dataclass(frozen=True, slots=True)
class _Sketch:
  dim: int
  seed: int

  def __post_init__(self) -> None:
    kind = f"sedjax.sketch.{type(self).__name__.lower()}"
    for name, least in (("dim", 1), ("seed", 0)):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**31:
        raise ValueError(
          f"{kind}: {name} must be an int in [{least}, 2**31), got {value!r}; leave it out for the default."
        )
      object.__setattr__(self, name, int(value))

  @property
  def sketch_id(self) -> tuple[int, int, int, int]:
    """(kind, version, seed, dim): two rows may be compared only where these agree."""
    return (_KINDS.index(type(self)), _VERSION, self.seed, self.dim)

  def rows(
    self, pieces: Sequence[Piece], groups: Sequence[int], labels: int, part: int | None = None, grid: Any = None
  ) -> list[jax.Array]:
    """float32[dim] for each label: the sketches of its leaves, or blocks of leaves, summed."""
    raise NotImplementedError

  def hashes(self, path: str, shape: tuple[int, ...]) -> Hashes:
    """What `Piece.hashes` of a real leaf is, in NumPy."""
    return hashes_of(path, shape, self.seed)

  def apply(self, path: str, leaf: jax.Array) -> jax.Array:
    """float32[dim]: the sketch of one real leaf of any shape and float dtype."""
    pieces = [Piece(path, leaf)] if leaf.size else []
    return self.rows(pieces, [0] * len(pieces), 1)[0]


def _count_rows(
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
    dim: how many buckets there are, see `ring_of`.
    seed: of the sketch.
    part, grid: see `part_of`.
  """
  grid = jnp.float32(1) if grid is None else grid
  arrays = [piece.array for piece in pieces]
  bare = [piece._replace(array=None) for piece in pieces]

  def strided(arrays: list[jax.Array], grid: Any, gpu: bool = False) -> list[jax.Array]:
    placed = [piece._replace(array=array) for piece, array in zip(bare, arrays, strict=True)]
    return strided_rows(placed, groups, labels, dim, seed, part, grid, gpu)

  def indexed(arrays: list[jax.Array], grid: Any, alone: bool = False) -> list[jax.Array]:
    placed = [piece._replace(array=array) for piece, array in zip(bare, arrays, strict=True)]
    return indexed_rows(placed, groups, labels, dim, seed, part, grid, alone)

  def whole(arrays: list[jax.Array], grid: Any) -> list[jax.Array]:
    # Without a GPU, what is exported for one has the form for CPUs, so that only one is traced.
    on_gpu = functools.partial(strided, gpu=True) if jax.default_backend() == "gpu" else strided
    elsewhere = functools.partial(indexed, alone=True)
    return lax.platform_dependent(arrays, grid, cpu=strided, cuda=on_gpu, default=elsewhere)

  if any(piece.start is not None or mesh_of(piece.array).size > 1 for piece in pieces):
    return indexed(arrays, grid)
  if jax.device_count() == 1:
    return whole(arrays, grid)
  if any(piece.hashes is not None for piece in pieces):  # which may be traced
    return indexed(arrays, grid)
  for piece in pieces:
    plan_of(piece.path, None, piece.array.shape or (1,), dim, seed)  # which refuses a leaf that is too large
  return by_devices(
    lambda *args: whole(list(args[:-1]), args[-1]),
    lambda *args: indexed(list(args[:-1]), args[-1]),
    [((dim,), np.dtype(sum_dtype(part)))] * labels,
    [*arrays, grid],
  )


class Count(_Sketch):
  """See `count`."""

  def rows(
    self, pieces: Sequence[Piece], groups: Sequence[int], labels: int, part: int | None = None, grid: Any = None
  ) -> list[jax.Array]:
    ring = ring_of(self.dim)
    rows = _count_rows(pieces, groups, labels, ring, self.seed, part, grid)
    return rows if ring == self.dim else [jnp.pad(row, (0, self.dim - ring)) for row in rows]

  def plan(self, path: str, shape: tuple[int, ...]) -> Plan:
    """How the rows of a real leaf fall into buckets."""
    return plan_of(path, None, shape, ring_of(self.dim), self.seed)


class Gaussian(_Sketch):
  """See `gaussian`."""

  def rows(
    self, pieces: Sequence[Piece], groups: Sequence[int], labels: int, part: int | None = None, grid: Any = None
  ) -> list[jax.Array]:
    rows = [jnp.zeros((self.dim,), jnp.float64 if part == WIDE else jnp.float32) for _ in range(labels)]
    for piece, group in zip(pieces, groups, strict=True):
      row = self._row(piece, part, grid)
      rows[group] = rows[group] + (row if piece.speaks is True else jnp.where(piece.speaks, row, 0))
    return rows

  def _row(self, piece: Piece, part: int | None, grid: Any) -> jax.Array:
    piece = piece.placed()
    x = part_of(piece.array, part, grid)
    key = path_key(piece.path, self.seed) if piece.hashes is None else piece.hashes.key
    chunk = max(1, min(self.dim, 2**20 // x.size))
    row_keys = index_hash(piece.row_index(), ~key)
    index_keys = mix(row_keys[..., None] ^ index_hash(piece.column_index(), key))

    def outputs(i: Any) -> jax.Array:
      output_keys = index_hash(jnp.arange(chunk, dtype=jnp.uint32) + i * np.uint32(chunk), np.uint32(0x5851F42D))
      bits = mix(index_keys ^ output_keys.reshape(chunk, *(1,) * x.ndim))
      # 23 bits, centred in their cells, so that the quantile function never sees -1 or 1.
      uniform = (bits >> 9).astype(jnp.float32) * np.float32(2**-22) + np.float32(2**-23 - 1)
      normal = np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)
      return jnp.tensordot(normal.astype(x.dtype), x, x.ndim, precision=jax.lax.Precision.HIGHEST)

    values = jax.lax.map(outputs, jnp.arange(-(-self.dim // chunk), dtype=jnp.uint32))
    return values.reshape(-1)[: self.dim] / np.float32(math.sqrt(self.dim))


class Exact(_Sketch):
  """See `exact`."""

  def __init__(self) -> None:
    object.__setattr__(self, "dim", 0)
    object.__setattr__(self, "seed", 0)

  def apply(self, path: str, leaf: jax.Array) -> jax.Array:
    del path, leaf
    raise ValueError("sedjax.sketch.exact: there is no sketch, so that apply has nothing to do; keep the leaf itself.")


_KINDS = (Count, Gaussian, Exact)


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
    ValueError: `dim` or `seed` is not an int in its range; when it is used, a leaf has more than 2**32 rows or columns.

  Cost: one read of the updates and `dim` float32 numbers of output.
  Source: Charikar, Chen and Farach-Colton (2002). Departure: 32 rows of a leaf share a hash, and buckets follow the
    leaf's layout, in pairs that tell how much collides. An odd `dim` has one number that is always 0.

  Example:
    >>> import sedjax
    >>> sedjax.sketch.count(1024).dim
    1024
  """
  return Count(dim, seed)


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
  return Gaussian(dim, seed)


def exact() -> Exact:
  """No sketch: the window keeps the W + 1 updates themselves, in float32.

  The rows of a leaf have its structure, one axis more and its sharding; `optax.tree.map_params` takes them for
  parameters, so that a function of PartitionSpecs has to put `None` before the spec of a leaf with an axis more.

  Returns:
    A hashable sketch object with `dim` 0.

  Raises:
    ValueError: when it is used, a leaf (of a sharded one, a device's block) has more than 2**26 numbers.

  Cost: memory of W + 1 copies of the parameters, and each row that is pushed reads all of them, with
    temporaries several times as large on a CPU; `sedjax.check_cost` says how large.

  Example:
    >>> import sedjax
    >>> sedjax.sketch.exact().dim
    0
  """
  return Exact()
