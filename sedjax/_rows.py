"""From a tree to a row, and from the ring of rows to a column of the Gram matrix.

A row is float32[labels, dim]; for exact sketches it is the tree itself in float32, in the parameters' own structure, so
that `optax.tree.map_params` and partitioners see what they know.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedjax import _gram, sketch
from sedjax._config import Config
from sedjax._layout import Layout


def _replicated(leaf: Any) -> Any:
  """Gathers a leaf that is sharded over *explicit* mesh axes, whose types forbid the reshapes of the sketches."""
  sharding = jax.typeof(leaf).sharding
  if all(axis is None for axis in sharding.spec):
    return leaf
  return jax.sharding.reshard(leaf, jax.NamedSharding(sharding.mesh, jax.P()))


def _real(leaf: Any, group: int | None) -> jax.Array:
  """A tracked leaf as a real array of at least float32; an untracked one as one 0 (orbax saves no empty arrays)."""
  if group is None:
    return jnp.zeros((1,), jnp.float32)
  leaf = sketch.as_real(_replicated(leaf))
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _sketch_row(config: Config, layout: Layout, leaves: list[jax.Array]) -> jax.Array:
  """float32[labels, dim]: the sketches of the leaves, summed within each group."""
  rows = [jnp.zeros((config.sketch.dim,), jnp.float32) for _ in layout.labels]
  for path, leaf, group in zip(layout.paths, leaves, layout.group, strict=True):
    if group is not None:
      rows[group] = rows[group] + config.sketch.apply(path, leaf)
  return jnp.stack(rows) if rows else jnp.zeros((0, config.sketch.dim), jnp.float32)


def make_row(config: Config, layout: Layout, rows: Any) -> Any:
  """The row of one tree, built like one slot of `rows`: a sketch, or the leaves themselves in float32."""
  leaves = [_real(leaf, group) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  if not config.exact:
    return _sketch_row(config, layout, leaves)
  return jax.tree.unflatten(jax.tree.structure(rows), [leaf.astype(jnp.float32) for leaf in leaves])


def empty_row(config: Config, layout: Layout, params: Any) -> Any:
  """The shapes of a row of this tree, as `jax.ShapeDtypeStruct`."""
  if not config.exact:
    return jax.ShapeDtypeStruct((len(layout.labels), config.sketch.dim), jnp.float32)
  shapes = [
    jax.eval_shape(lambda x, g=g: _real(x, g), x).shape for x, g in zip(layout.leaves, layout.group, strict=True)
  ]
  rows = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.tree.unflatten(jax.tree.structure(params), rows)


def largest(row: Any) -> jax.Array:
  """float32[]: the largest magnitude in a tree; NaN where it holds one, 0 where it is empty."""
  peaks = (jnp.max(jnp.abs(leaf), initial=0).astype(jnp.float32) for leaf in jax.tree.leaves(row))
  return functools.reduce(jnp.maximum, peaks, jnp.float32(0))


def _norm(x: jax.Array) -> jax.Array:
  peak = largest(x)
  unit = jnp.where(peak > 0, peak, 1)
  return jnp.sqrt(jnp.sum((x / unit) ** 2)) * unit


def _split_parameters(layout: Layout) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
  """Parameters as coarse + fine parts, and the grid of the coarse ones.

  The coarse parts are multiples of one power of two, so that float32 sums of thousands of them are exact and
  differences of two sketches lose nothing; the fine parts are 2⁻¹⁷ of the largest parameter at most.
  """
  leaves = [_real(leaf, group) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  grid = _gram.power_of_two(largest(leaves)) * np.float32(2.0**-16)
  grid = jnp.where(grid > 0, grid, 1)
  coarse = [jnp.round(leaf / grid.astype(leaf.dtype)) * grid.astype(leaf.dtype) for leaf in leaves]
  fine = [(leaf - part).astype(jnp.float32) for leaf, part in zip(leaves, coarse, strict=True)]
  return [part.astype(jnp.float32) for part in coarse], fine, grid


def read_parameters(config: Config, layout: Layout, rows: Any, base: Any) -> tuple[Any, Any, jax.Array]:
  """The new base, the row of the change since the old one, and whether rounding may exceed 1 % of that row."""
  if config.exact:
    now = make_row(config, layout, rows)
    row = jax.tree.map(lambda new, old: new - old[0], now, base)
    doubles = any(_real(leaf, g).dtype == jnp.float64 for leaf, g in zip(layout.leaves, layout.group, strict=True))
    # float64 parameters are kept in float32, whose rounding is relative to the parameters.
    lossy = largest(row) < largest(now) * np.float32(100 * 2.0**-24) if doubles else jnp.array(False)
    return jax.tree.map(lambda new: new[None], now), row, lossy
  coarse, fine, grid = _split_parameters(layout)
  coarse, fine = _sketch_row(config, layout, coarse), _sketch_row(config, layout, fine)
  row = (coarse - base[0]) + (fine - base[1])
  # Gaussian weights are no multiples of the grid, and huge sums outgrow it: then float32 rounds the coarse part too.
  rounds = isinstance(config.sketch, sketch.Gaussian) | (largest(coarse) > grid * np.float32(2.0**23))
  error = _norm(fine) * np.float32(2.0**-22) + jnp.where(rounds, _norm(coarse) * np.float32(2.0**-21), 0)
  return jnp.stack([coarse, fine]), row, error > np.float32(0.01) * _norm(row)


def gram_column(config: Config, layout: Layout, rows: Any, slot: jax.Array, scales: jax.Array) -> tuple[Any, Any, Any]:
  """Gram column of the row in `slot`: float32[parts, G, n], its scales [G] and its effective dimensions [G]."""
  if config.exact:
    return _exact_column(config, layout, rows, slot, scales)
  if config.groups is not None:
    rows = jnp.concatenate([rows.sum(1, keepdims=True), rows], 1)
  row = rows[slot]
  scale = _gram.power_of_two(jnp.max(jnp.abs(row), -1, initial=0))
  scales = scales.at[:, slot].set(scale)
  unit = jnp.where(scales > 0, scales, 1)
  scaled = jnp.where(scales.T[:, :, None] > 0, rows / unit.T[:, :, None], 0)
  new = scaled[slot]
  squares = new * new
  dims = 3 * squares.sum(-1) ** 2 / jnp.maximum((squares * squares).sum(-1), 1e-30)
  return _gram.plain_dot(scaled, new)[None], scale, dims


def _exact_column(
  config: Config, layout: Layout, rows: Any, slot: jax.Array, scales: jax.Array
) -> tuple[Any, Any, Any]:
  zero = jnp.zeros((config.slots,), jnp.float32)
  tracked = [
    (leaf, group) for leaf, group in zip(jax.tree.leaves(rows), layout.group, strict=True) if group is not None
  ]
  # Members of each group, the whole model first.
  members = [[leaf for leaf, _ in tracked]]
  if config.groups is not None:
    members += [[leaf for leaf, group in tracked if group == g] for g in range(len(layout.labels))]
  # Twice the power of two at or below the largest number: scaled rows lie within [-1, 1].
  scale = 2 * _gram.power_of_two(jnp.stack([largest([leaf[slot] for leaf in group]) for group in members]))
  scales = scales.at[:, slot].set(scale)
  columns, dims = [], []
  for g, group in enumerate(members):
    unit = jnp.where(scales[g] > 0, scales[g], 1)
    pair, square, fourth = (zero, zero), jnp.float32(0), jnp.float32(0)
    for leaf in group:
      axes = tuple(range(1, leaf.ndim))
      lead = (slice(None), *(None for _ in axes))
      scaled = jnp.where(scales[g][lead] > 0, leaf / unit[lead], 0)
      new = scaled[slot][None]
      pair = _gram.add_pairs(pair, _gram.precise_dot(scaled, new, axes))
      square = square + (new * new).sum()
      fourth = fourth + (new**4).sum()
    columns.append(jnp.stack(pair))
    dims.append(3 * square**2 / jnp.maximum(fourth, 1e-30))
  return jnp.stack(columns, 1), scale, jnp.stack(dims)
