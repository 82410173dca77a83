"""From a tree to a row, and from the ring of rows to a column of the Gram matrix.

A row is float32[labels, dim]; for exact sketches it is the tree itself in float32, in the parameters' own structure, so
that `optax.tree.map_params` and partitioners see what they know.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedjax import _gram, _placement, _small, sketch
from sedjax._config import Config
from sedjax._count import Piece
from sedjax._indexed import may_be_split
from sedjax._layout import Layout
from sedjax._order import later_than

# Rows of larger numbers are left out as infinite ones are: their norms come near to the largest float32.
LARGEST = np.float32(2.0**110)


def _real(leaf: Any, group: int | None) -> jax.Array:
  """A tracked leaf as a real array; an untracked one as one 0 (see `_height`)."""
  return jnp.zeros((1,), jnp.float32) if group is None else sketch.as_real(leaf)


def _tracked(layout: Layout) -> list[int]:
  """Indices of the tracked leaves that hold any numbers."""
  return [
    i
    for i, (shape, group) in enumerate(zip(layout.shapes, layout.group, strict=True))
    if group is not None and all(shape)
  ]


def _locally(layout: Layout, function: Any, arrays: list[list[Any]], *others: Any) -> Any:
  """`_placement.locally` for lists of arrays that are split as the tracked leaves are, behind other axes that are not.

  The function is given the lists of blocks, then the others.
  """
  split = [layout.specs[i] for i in _tracked(layout)]
  specs = [[((),) * (np.ndim(x) - len(spec)) + spec for x, spec in zip(xs, split, strict=True)] for xs in arrays]
  return _placement.locally(function, layout.mesh, layout.axes, arrays, specs, *others)


def _speaks(layout: Layout, i: int) -> tuple[str, ...]:
  """The axes over which leaf i is not split: of the devices along them, one speaks for all."""
  own = {name for names in layout.specs[i] for name in names}
  return tuple(name for name in layout.axes if name not in own)


def _height(layout: Layout) -> int:
  """Labels in a row; one where nothing is tracked, since orbax saves no empty arrays."""
  return max(1, len(layout.labels))


def _sketch_row(config: Config, layout: Layout, part: int | None = None, grid: Any = None) -> jax.Array:
  """float32[labels, dim]: the sketches of the leaves (of a part of them, see `part_of`), summed within each group."""
  tracked = _tracked(layout)
  if not tracked:
    return jnp.zeros((_height(layout), config.sketch.dim), jnp.float32)
  groups = [int(layout.group[i] or 0) for i in tracked]

  def local(blocks: list[jax.Array], grid: Any) -> jax.Array:
    pieces = []
    speaks = {axes: _placement.is_first(axes) for axes in {_speaks(layout, i): None for i in tracked}}
    starts = _placement.block_starts([block.shape for block in blocks], [layout.specs[i] for i in tracked])
    for i, block, start in zip(tracked, blocks, starts, strict=True):
      piece = Piece(layout.paths[i], sketch.as_real(block), rank=layout.ranks[i] if layout.ranks else 0)
      if layout.axes:
        extra = piece.array.ndim - block.ndim  # complex leaves have one more axis
        speaking = speaks[_speaks(layout, i)]
        piece = piece._replace(start=(0,) * extra + start, shape=(2,) * extra + layout.shapes[i], speaks=speaking)
      pieces.append(piece)
    rows = config.sketch.rows(pieces, groups, len(layout.labels), part, grid)
    return jnp.stack(_placement.psum(rows, layout.axes))

  grid = jnp.float32(1) if grid is None else grid
  return _locally(layout, local, [[layout.leaves[i] for i in tracked]], grid)


def make_row(config: Config, layout: Layout, rows: Any) -> Any:
  """The row of one tree, built like one slot of `rows`: a sketch, or the leaves themselves in float32."""
  if not config.exact:
    return _sketch_row(config, layout)
  leaves = [_real(leaf, group).astype(jnp.float32) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(rows), leaves)


def zero_rows(config: Config, layout: Layout, params: Any, lead: int) -> Any:
  """`lead` rows of zeros, sharded as the leaves are where they hold the leaves themselves."""
  if not config.exact:
    return jnp.zeros((lead, _height(layout), config.sketch.dim), jnp.float32)

  def zeros(leaf: Any, group: int | None) -> jax.Array:
    if group is None:
      return jnp.zeros((lead, *_real(leaf, group).shape), jnp.float32)
    zero = jnp.zeros_like(leaf, dtype=jnp.float32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      zero = jnp.broadcast_to(zero, (2, *zero.shape))
    return jnp.broadcast_to(zero, (lead, *zero.shape))

  leaves = [zeros(leaf, group) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _peak(leaves: Any, nan: bool = True) -> jax.Array:
  # Small leaves as one, unless they may lie on several devices.
  alone, together = [], []
  for leaf in leaves:
    if leaf.size <= _small.MOST and not may_be_split(leaf):
      together.append(leaf.reshape(-1).astype(jnp.float32))
    else:
      alone.append(leaf)
  arrays = [*alone, jnp.concatenate(together)] if together else alone
  sizes = [jnp.abs(array).astype(jnp.float32) for array in arrays]
  if nan:  # XLA's maximum on CPU leaves NaN out where numbers are many, and for this stores them all again
    sizes = [jnp.where(jnp.isnan(size), jnp.inf, size) for size in sizes]
  peaks = [jnp.max(size, initial=0) for size in sizes]
  if len(peaks) <= 1:
    return peaks[0] if peaks else jnp.float32(0)
  # A sort is not computed again in each kernel that needs the result, as a chain of maxima would be.
  return jax.lax.sort(jnp.stack(peaks))[-1]


def _of_groups(row: jax.Array, grouped: bool) -> jax.Array:
  """float32[G, dim]: the whole model's row and, where there are groups, theirs."""
  return jnp.concatenate([row.sum(0, keepdims=True), row]) if grouped else row


def _peaks(row: jax.Array) -> jax.Array:
  """float32[G]: the largest magnitudes in the rows of all groups; infinite for NaN."""
  size = jnp.abs(row)
  return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), -1, initial=0)


def largest(config: Config, layout: Layout, row: Any) -> jax.Array:
  """float32[]: the largest magnitude in a row and its sum over groups; infinite for NaN, 0 where it is empty."""
  if not config.exact:
    return jnp.max(_peaks(_of_groups(row, config.groups is not None)))
  return largest_leaf(layout, jax.tree.leaves(row))


def largest_leaf(layout: Layout, leaves: list[Any], nan: bool = True) -> jax.Array:
  """float32[]: the largest magnitude in tracked leaves; infinite where one holds NaN, if `nan` says so."""

  def local(blocks: list[jax.Array]) -> jax.Array:
    return _placement.pmax(_peak([sketch.as_real(block) for block in blocks], nan), layout.axes)

  return _locally(layout, local, [[leaves[i] for i in _tracked(layout)]])


def _norm(x: jax.Array) -> jax.Array:
  peak = _peak([x])
  unit = jnp.where(peak > 0, peak, 1)
  return jnp.sqrt(jnp.sum((x / unit) ** 2)) * unit


def read_parameters(config: Config, layout: Layout, rows: Any, base: Any) -> tuple[Any, Any, jax.Array]:
  """The new base, the row of the change since the old one, and whether rounding may exceed 1 % of that row."""
  if config.exact:
    now = make_row(config, layout, rows)
    row = jax.tree.map(lambda new, old: new - old[0], now, base)
    doubles = any(jnp.asarray(layout.leaves[i]).dtype in (jnp.float64, jnp.complex128) for i in _tracked(layout))
    # float64 parameters are kept in float32, whose rounding is relative to the parameters.
    small = largest(config, layout, row) < largest(config, layout, now) * np.float32(100 * 2.0**-24)
    return jax.tree.map(lambda new: new[None], now), row, small if doubles else jnp.array(False)
  # The coarse parts of the parameters are multiples of one power of two, so that float32 sums of thousands of them are
  # exact and differences of two sketches lose nothing; the fine parts are 2⁻¹⁷ of the largest parameter at most.
  # Where they hold NaN so do the sketches, whatever the grid.
  grid = _gram.power_of_two(largest_leaf(layout, list(layout.leaves), nan=False)) * np.float32(2.0**-16)
  grid = jnp.where(grid > 0, grid, 1)
  coarse = _sketch_row(config, layout, 0, grid)
  fine = _sketch_row(config, layout, 1, later_than(grid, coarse))  # one after the other takes half the memory
  # TPUs would make it anew for whatever is made of it.
  row = jax.lax.optimization_barrier((coarse - base[0]) + (fine - base[1]))
  # Gaussian weights are no multiples of the grid, and huge sums outgrow it: then float32 rounds the coarse part too.
  rounds = isinstance(config.sketch, sketch.Gaussian) | (_peak([coarse]) > grid * np.float32(2.0**23))
  error = _norm(fine) * np.float32(2.0**-22) + jnp.where(rounds, _norm(coarse) * np.float32(2.0**-21), 0)
  return jnp.stack([coarse, fine]), row, error > np.float32(0.01) * _norm(row)


def _members(config: Config, layout: Layout) -> list[list[int]]:
  """The tracked leaves of each group, by their number among these; of the whole model first."""
  tracked = _tracked(layout)
  members = [list(range(len(tracked)))]
  if config.groups is not None:
    members += [[i for i, t in enumerate(tracked) if layout.group[t] == g] for g in range(len(layout.labels))]
  return members


def most_dims(sizes: Any) -> np.ndarray:
  """Of rows of so many numbers, in NumPy: numbers of one size, as signs are, seem to be three times as many.

  What is guessed from few numbers may exceed them a little.
  """
  return np.asarray(sizes) + 3 * np.sqrt(sizes)


# Under jit, so that the sizes are no operand of a `cond` (see `_gram`).
@functools.partial(jax.jit, static_argnums=1)
def _at_most(dims: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
  return jnp.minimum(dims, most_dims(sizes).astype(np.float32))


def _sizes(config: Config, layout: Layout) -> tuple[int, ...]:
  """How many numbers the rows of each group have; a complex one is two."""
  counts = [
    math.prod(layout.shapes[i]) * (1 + jnp.issubdtype(layout.leaves[i].dtype, jnp.complexfloating))
    for i in _tracked(layout)
  ]
  return tuple(sum(counts[i] for i in group) for group in _members(config, layout))


def gram_column(
  config: Config, layout: Layout, rows: Any, row: Any, slot: jax.Array, scales: jax.Array
) -> tuple[Any, Any, Any]:
  """Gram column of `row`, to be written into `slot` of `rows`: float32[parts, G, n]; its scales [G], dimensions [2, G].

  The dimensions are those of the sketch's error, and of noise.
  """
  if config.exact:
    column, scale, dims = _exact_column(config, layout, rows, row, slot, scales)
    dims = jnp.stack([dims, dims])
  else:
    column, scale, dims = sketch_column(rows, row, slot, scales)
  return column, scale, _at_most(dims, _sizes(config, layout))


def _inverse(x: jax.Array, where: jax.Array) -> jax.Array:
  return jnp.where(where, 1 / jnp.where(where, x, 1), 0)


def _effective_dim(squares: jax.Array, energy: jax.Array) -> jax.Array:
  """float32[G]: of rows whose numbers have these squares [G, dim] and sums of squares [G], the sketch's dimension.

  Two numbers a, b of a pair of buckets are sums of as many updates with signs of their own, of which a²b² is on average
  what the energies are whose product makes the error: 1/d is 2Σa²b²/(Σs²)². Buckets that have one update each add
  nothing to it. Where few pairs outweigh the others each is held against what the others have, since it is a good part
  of the sum itself: then, too, the mean over draws is right within 15 %, however many pairs share however much of the
  energy (tested).
  """
  half = squares.shape[-1] // 2
  first, second = (squares[:, :half], squares[:, half : 2 * half]) if half else (squares, squares)
  both = first + second
  # A pair's share of e = a² + b² is 2a²b² / ((E - e)² + e(E - e)/4 + e²/2 + 3(Σe² - e²)).
  total = energy * energy + 3 * (both * both).sum(-1)
  whole = total[:, None] - np.float32(1.75) * both * (energy[:, None] + both)
  shares = jnp.where(whole > 0, 2 * first * second / jnp.where(whole > 0, whole, 1), 0).sum(-1)
  return jnp.where(energy > 0, jnp.where(shares > 0, _inverse(shares, shares > 0), jnp.inf), 0)


def _noise_dim(squares: jax.Array, energy: jax.Array) -> jax.Array:
  """float32[G]: of the same, the dimension of noise whose energy is spread as theirs, seen through the sketch.

  Among many buckets alike the shares are s⁴/3(Σs²)², which add up to one over the dimension. Where few buckets outweigh
  the others each is held against what the others have, as above: then, too, the mean over draws is right within 40 %,
  however many buckets share however much of the energy (tested).
  """
  fourth = squares * squares
  total = 3 * energy * energy + 10 * fourth.sum(-1)
  # A bucket's share is s⁴ / (3(E - s²)² + 10(Σs⁴ - s⁴) + s⁴). The choices keep XLA on CPU from handing a library more
  # than a sum, with which it takes ten times as long.
  whole = jnp.where(total > 0, total, 1)[:, None] - 6 * squares * (energy[:, None] + squares)
  shares = jnp.where(whole > 0, fourth / jnp.where(whole > 0, whole, 1), 0).sum(-1)
  return _inverse(shares, shares > 0)


def sketch_column(rows: Any, row: Any, slot: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`gram_column` for random sketches, of dimensions without bound; what is not finite counts as 0."""
  grouped = scales.shape[0] > row.shape[0]
  row = _of_groups(row, grouped)
  peaks = _peaks(row)
  scale = _gram.power_of_two(jnp.where(peaks < jnp.inf, peaks, 0))
  here = jnp.arange(scales.shape[-1], dtype=jnp.int32) == slot
  scales = jnp.where(here, scale[:, None], scales)
  new = jnp.where(scale[:, None] > 0, row / jnp.where(scale > 0, scale, 1)[:, None], 0)
  squares = new * new
  energy = squares.sum(-1)
  dims = jnp.stack([_effective_dim(squares, energy), _noise_dim(squares, energy)])
  # The rows are scaled after the product, which spares a copy of them. So that it neither overflows nor loses rows down
  # to 1e-38, the new row is as large as the largest of the others allows.
  top = jnp.max(scales, -1)
  shift = jnp.minimum(np.float32(2.0**96) / jnp.maximum(top, np.float32(2.0**34)), np.float32(2.0**62))
  shifted = new * shift[:, None]
  if grouped:
    whole = _gram.plain_dot(rows.sum(1, keepdims=True), shifted[:1])
    column = jnp.concatenate([whole, _gram.plain_dot(rows, shifted[1:])])
  else:
    column = _gram.plain_dot(rows, shifted)
  # By one after the other, since their product may be too small for a float.
  column = jnp.where(scales > 0, column / jnp.where(scales > 0, scales, 1) / shift[:, None], 0)
  return jnp.where(here, energy[:, None], column)[None], scale, dims


def exact_dim(energy: Any, fourth: Any) -> Any:
  """The dimension that rows have of which all numbers are known, from the sums of their squares and fourth powers.

  Of n normal numbers of one variance it is about n, of one that outweighs the others 1, of zeros 0. Of n signs it is
  3n (see `most_dims`).
  """
  return 3 * energy**2 / (fourth + (fourth == 0)) - 2 * (fourth > 0)


def _exact_column(
  config: Config, layout: Layout, rows: Any, row: Any, slot: jax.Array, scales: jax.Array
) -> tuple[Any, Any, Any]:
  tracked, members = _tracked(layout), _members(config, layout)

  def local(blocks: list[jax.Array], row: list[jax.Array], slot: jax.Array, scales: jax.Array) -> tuple[Any, Any, Any]:
    # Twice the power of two at or below the largest number: scaled rows lie within [-1, 1].
    peaks = jnp.stack([_peak([row[i] for i in group]) for group in members])
    scale = 2 * _gram.power_of_two(_placement.pmax(peaks, layout.axes))
    scales = scales.at[:, slot].set(scale)
    zero = jnp.zeros((config.slots + 1,), jnp.float32)
    highs, lows, sums = [], [], []
    for g, group in enumerate(members):
      unit = jnp.where(scales[g] > 0, scales[g], 1)
      pairs, fourth = [] if group else [(zero, zero)], jnp.float32(0)  # products with all slots, and with itself
      for i in group:
        axes = tuple(range(1, blocks[i].ndim))
        lead = (slice(None), *(None for _ in axes))
        mine = _placement.is_first(_speaks(layout, tracked[i]))
        new = jnp.where(mine & (scale[g] > 0), row[i] / jnp.where(scale[g] > 0, scale[g], 1), 0)[None]
        scaled = jnp.where(scales[g][lead] > 0, blocks[i] / unit[lead], 0)
        with_all, with_itself = _gram.precise_dot(scaled, new, axes), _gram.precise_dot(new, new, axes)
        high, low = map(jnp.append, with_all, with_itself)
        pairs.append((high, low))
        fourth = fourth + (new**4).sum()
      high, low = _gram.sum_pairs(pairs)
      highs.append(high[:-1].at[slot].set(high[-1]))
      lows.append(low[:-1].at[slot].set(low[-1]))
      sums.append(jnp.stack([high[-1], fourth]))
    column, sums = jnp.stack([jnp.stack(highs), jnp.stack(lows)]), jnp.stack(sums)
    if layout.axes:
      column, sums = _gram.psum_pairs(column, sums, layout.axes)
    return column, scale, exact_dim(sums[:, 0], sums[:, 1])

  ring, new = ([leaves[i] for i in tracked] for leaves in map(jax.tree.leaves, (rows, row)))
  return _locally(layout, local, [ring, new], slot, scales)
