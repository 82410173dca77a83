"""The indexed form of the count sketch: leaves and blocks, wherever partitioners put them. See `_count`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from sedjax import _placement
from sedjax._count import (
  HASH_ROWS,
  TABLE,
  Piece,
  Plan,
  flip,
  folded_sum,
  index_hash,
  part_of,
  plan_of,
  sign_bits,
  sign_shift,
  slice_of,
  sum_dtype,
  vector_bits,
)
from sedjax._order import shared_zero_of
from sedjax._strided import aligned, block_sums
from sedjax._terms import MOST_LAPS, Term, Vector, placed_at, sum_terms, sum_terms_elsewhere, sum_terms_on_tpu

# On CPU: numbers of a block that are signed at a time, since CPU contractions store their operands.
_CHUNK = 2**20
# Numbers of a row's bucket sums that are alive at a time where leaves come in blocks: 2 MiB, and as much to place them.
_ALIVE = 2**19
# Columns that a contraction of narrow leaves has, and of how many leaves' columns these are at least.
_WIDTH, _NARROW = 128, 8


def _bucket_sums(piece: Piece, plan: Plan, most: int, part: Any, grid: Any, stores: bool = False) -> jax.Array:
  """float32[g, n]: bucket sums of a leaf or block; one contraction gives at most `most` of the g.

  `stores`: contractions store their operands, as those of CPUs and GPUs do.
  """
  if plan.rows == 1 and piece.start is None:
    return _signed_vector(piece.array, plan.key, grid, part=part)
  row = piece.row_index()
  keys, columns = index_hash(row // np.uint32(HASH_ROWS), ~plan.key), index_hash(piece.column_index(), plan.key)
  shift = sign_shift(row)
  hashes = keys, columns, shift, plan.bucket(row)
  few = _few(plan) if stores else 1
  return _hashed_bucket_sums(piece.array, hashes, grid, buckets=plan.buckets, few=few, most=most, part=part)


def _few(plan: Plan) -> int:
  """Into how many places rows of a narrow leaf are put before they are contracted; 1 for leaves that are not narrow."""
  few = _WIDTH // plan.columns
  return few if _NARROW <= few <= plan.buckets else 1


@functools.partial(jax.jit, static_argnames="part")  # vectors of one length are traced once
def _signed_vector(x: jax.Array, key: Any, grid: Any, *, part: int | None) -> jax.Array:
  bits = vector_bits(lax.iota(jnp.uint32, x.shape[-1]), key)
  return flip(part_of(x, part, grid), bits).sum(tuple(range(x.ndim - 1)))[None]


@functools.partial(jax.jit, static_argnames=("buckets", "few", "most", "part"))  # leaves of one shape are traced once
def _hashed_bucket_sums(
  x: jax.Array, hashes: tuple[Any, ...], grid: Any, *, buckets: int, few: int, most: int, part: int | None
) -> jax.Array:
  keys, columns, shift, bucket = hashes
  signed = flip(part_of(x, part, grid), sign_bits(keys, columns, shift))
  leading = tuple(range(x.ndim - 1))
  if buckets == 1:
    return signed.sum(leading)[None]

  def contracted(bucket: jax.Array, signed: jax.Array, first: int, last: int) -> jax.Array:
    one_hot = (bucket[..., None] == np.arange(first, last, dtype=np.uint32)).astype(signed.dtype)
    return lax.dot_general(one_hot, signed, ((leading, leading), ((), ())), lax.Precision.HIGHEST)

  sums, done = [], 0
  if few > 1:
    # In two steps, of which neither has a number for each row and each of many buckets.
    place = bucket[..., None] % np.uint32(few) == np.arange(few, dtype=np.uint32)
    wide = jnp.where(place[..., None], signed[..., None, :], 0)
    sums.append(contracted(bucket // np.uint32(few), wide, 0, buckets // few).reshape(-1, x.shape[-1]))
    done = buckets // few * few
  sums += [contracted(bucket, signed, first, min(first + most, buckets)) for first in range(done, buckets, most)]
  return jnp.concatenate(sums)


def _sum_of_parts(sums: Callable[[Any, int], jax.Array], length: int, size: int) -> jax.Array:
  """The sum of sums(first, count) over parts of `length` places: `size` at a time, and what they leave."""
  whole, rest = divmod(length, size)
  # It begins with sums, not with zeros, which inside a shard_map would be of another type: alike on all devices.
  total = sums(whole * size, rest) if rest else sums(0, size)
  first, last = np.uint32(0 if rest else 1), np.uint32(whole)  # of 2³¹ places and more
  return lax.fori_loop(first, last, lambda i, total: total + sums(i * np.uint32(size), size), total)


def _chunked_bucket_sums(piece: Piece, plan: Plan, part: Any, grid: Any) -> jax.Array:
  """`_bucket_sums` by parts of the first axis, for CPU, whose contractions store their operands."""
  x, start = piece.array, piece.start or (0,)
  width = max(x.shape[-1], 2 * _WIDTH)
  size = max(1, _CHUNK // (width * math.prod(x.shape[1:-1]))) if x.ndim > 1 else x.shape[0]

  def sums(first: Any, count: int) -> jax.Array:
    start_of_chunk = (start[0] + jnp.asarray(first, jnp.uint32), *start[1:])
    chunk = piece._replace(array=slice_of(x, first, count, 0), start=start_of_chunk)
    return _bucket_sums(chunk, plan, plan.buckets, part, grid, stores=True)

  if x.shape[0] < 2 * size:
    return _bucket_sums(piece, plan, plan.buckets, part, grid, stores=True)
  return _sum_of_parts(sums, x.shape[0], size)


def _is_folded(plan: Plan, dim: int, laps: int = MOST_LAPS) -> bool:
  """Whether the sums of a block are folded at once: else there would be the whole leaf's columns on each device."""
  return plan.pairs == 1 and plan.columns > laps * dim


def _folded_rows(sums: jax.Array, dim: int) -> jax.Array:
  """float32[g, dim]: each row of sums [g, n] around a sketch as often as need be."""
  laps = [folded_sum(row, dim) for row in sums]
  return jnp.stack([jnp.pad(row, (0, dim - row.size)) for row in laps])


def _sums_on_cpu(piece: Piece, plan: Plan, dim: int, part: Any, grid: Any) -> jax.Array:
  """`_bucket_sums` a part at a time: of rows, and where those are long and folded, of their columns."""
  x, start = piece.array, piece.start or (0,)
  if not _is_folded(plan, dim) or x.shape[-1] <= _CHUNK:
    return _chunked_bucket_sums(piece, plan, part, grid)
  size = dim * max(1, _CHUNK // (dim * math.prod(x.shape[:-1])))

  def sums(first: Any, count: int) -> jax.Array:
    start_of_chunk = (*start[:-1], start[-1] + jnp.asarray(first, jnp.uint32))
    chunk = piece._replace(array=slice_of(x, first, count, x.ndim - 1), start=start_of_chunk)
    return _folded_rows(_chunked_bucket_sums(chunk, plan, part, grid), dim)

  return _sum_of_parts(sums, x.shape[-1], size)


def may_be_split(x: jax.Array) -> bool:
  """Whether an array may be sharded; older contexts of a mesh do not show while tracing."""
  return jax.device_count() > 1 or _placement.mesh_of(x).size > 1


def _is_automatic(mesh: Any) -> bool:
  """Whether all axes of a mesh, if any, are left to the partitioner."""
  return all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def gathered(x: jax.Array) -> jax.Array:
  """Returns the array, whole on every device of an automatic mesh: its pieces would be sent around one by one."""
  mesh = _placement.mesh_of(x)
  if mesh.empty or not _is_automatic(mesh):
    return x
  return lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P()))


def _turned(sums: jax.Array, shift: Any, columns: int) -> jax.Array:
  """[g, columns]: bucket sums [g, at most columns], which begin in the column `shift` and go around."""
  mesh = _placement.mesh_of(sums)
  if sums.shape[1] == columns and not mesh.empty and _is_automatic(mesh):  # of what partitioners would gather
    return jnp.roll(sums, shift, 1)
  size = 2 * columns
  padded = lax.pad(sums, sums.dtype.type(0), ((0, 0, 0), (size, size - sums.shape[1], 0)))
  around = lax.dynamic_slice_in_dim(padded, size - jnp.asarray(shift, jnp.int32), size, 1)
  return around[:, :columns] + around[:, columns:]


def _placed_sums(piece: Piece, plan: Plan, sums: jax.Array, dim: int, laps: int = MOST_LAPS) -> Term:
  """What bucket sums [g, n] of a leaf or block add; what is more than so many laps is folded into one."""
  start = 0 if piece.start is None or sums.shape[1] == plan.columns else piece.start[-1]
  if plan.shared:
    return Term(plan.offset, _turned(sums, plan.shift, plan.columns), plan.pairs, start)
  if isinstance(start, int) and sums.shape[1] == plan.columns:
    placed = sums
  elif _is_folded(plan, dim, laps):
    first = jnp.asarray(start, jnp.uint32) % np.uint32(dim)
    placed = jnp.roll(_folded_rows(sums, dim), first.astype(jnp.int32), 1)
  else:
    placed = placed_at(sums, start, plan.columns)
  if not isinstance(plan.offset, int):  # of hashes that are traced
    row = sum_terms([Term(0, placed, plan.pairs)], dim, laps)
    return Term(0, jnp.roll(row, plan.offset.astype(jnp.int32))[None])
  return Term(plan.offset, placed, plan.pairs)


def _folding_rule(piece: Piece, plan: Plan, dim: int, sums_of: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A function of a leaf and `grid` that gives what the leaf adds, float32[dim], for bucket sums of more numbers.

  Partitioners would send all of them between devices, and then fold them. So it brings a rule of its own, by which each
  device folds those of its block, which `sums_of` makes of it. Such rules know no vmap, which does without, and no
  export; nor does libtpu.
  """

  def folded(x: jax.Array, grid: Any, start: tuple[Any, ...]) -> jax.Array:
    block = piece._replace(array=x, start=start)
    return sum_terms([_placed_sums(block, plan, sums_of(block, grid), dim, laps=1)], dim, laps=1)

  def whole(x: jax.Array, grid: Any) -> jax.Array:
    return folded(x, grid, (np.uint32(0),) * x.ndim)  # known ones would make constants, which rules must not have

  def partition(mesh: Any, args: Any, result: Any) -> Any:
    del result
    if not isinstance(args[0].sharding, jax.NamedSharding):  # of a mesh without names, where all arguments were on none
      mesh = jax.sharding.Mesh(np.asarray(sorted(args[0].sharding.device_set, key=lambda one: one.id)), ("devices",))
      everywhere = jax.NamedSharding(mesh, jax.P())
      return mesh, whole, everywhere, (everywhere, everywhere)
    spec = _placement.normalised(args[0].sharding.spec, len(piece.shape))

    def local(x: jax.Array, grid: Any) -> jax.Array:
      (start,) = _placement.block_starts([x.shape], [spec])
      for axis, (first, size) in enumerate(zip(start, piece.shape, strict=True)):
        if x.shape[axis] * math.prod(mesh.shape[name] for name in spec[axis]) > size:  # the last block is padded
          size = np.uint32(size)
          kept = jnp.where(first < size, size - first, 0)  # of a block that begins beyond the leaf, nothing
          x = jnp.where(lax.broadcasted_iota(jnp.uint32, x.shape, axis) < kept, x, 0)
      return _placement.psum(folded(x, grid, start), [name for names in spec for name in names])

    everywhere = jax.NamedSharding(mesh, jax.P())
    return mesh, local, everywhere, (args[0].sharding, everywhere)

  def without(size: int, batched: Any, *args: Any) -> Any:
    return jax.vmap(whole, [0 if each else None for each in batched], axis_size=size)(*args), True

  rule = custom_partitioning(whole)
  axes = " ".join(f"i{axis}" for axis in range(len(piece.shape)))
  rule.def_partition(partition, lambda mesh, *_: jax.NamedSharding(mesh, jax.P()), sharding_rule=f"{axes}, -> d")
  by_hand = jax.custom_batching.custom_vmap(rule)
  by_hand.def_vmap(without)
  return by_hand


def indexed_terms(
  piece: Piece, dim: int, seed: int, part: Any, grid: Any, alone: bool, wait: Any = 0
) -> tuple[Term | Vector, jax.Array | None]:
  """What a leaf or block adds, and what that is made of, if that is more than the leaf.

  Args:
    piece, dim, seed, part, grid: see `sedjax.sketch`.
    alone: no partitioner will see it.
    wait: a 0 as uint32[]; on CPU a block waits for what it is made of.
  """
  piece = piece.placed()
  plan = plan_of(piece.path, piece.hashes, piece.shape, dim, seed)
  if (piece.start is not None or alone) and piece.hashes is None and plan.rows == 1 and plan.columns <= dim <= TABLE:
    start = 0 if piece.start is None else piece.start[-1]
    return Vector(plan.offset, piece.array.reshape(-1), plan.key, plan.columns, start), None
  if piece.start is None:
    # Partitioners sum what each contraction gives: no more than dim numbers, where a leaf is no wider. But each
    # contraction reads the leaf.
    most = plan.buckets if alone else max(1, dim // plan.columns)
    automatic = not alone and _is_automatic(_placement.mesh_of(piece.array))
    countable = max(piece.shape) < 2**31  # by partitioners, in a rule
    if plan.buckets * plan.columns > dim and may_be_split(piece.array) and automatic and countable:

      def plain(array: jax.Array, grid: Any) -> jax.Array:
        sums = _bucket_sums(piece._replace(array=array), plan, most, part, grid)
        return sum_terms([_placed_sums(piece, plan, sums, dim, laps=1)], dim, laps=1)

      on_cpu = _folding_rule(piece, plan, dim, lambda block, grid: _sums_on_cpu(block, plan, dim, part, grid))
      on_gpu = _folding_rule(piece, plan, dim, lambda block, grid: _bucket_sums(block, plan, plan.buckets, part, grid))
      array = lax.stop_gradient(piece.array)
      row = lax.platform_dependent(array, jnp.asarray(grid), cpu=on_cpu, cuda=on_gpu, default=plain)
      return Term(0, row[None]), row
    if plan.rows == 1:
      piece = piece._replace(array=gathered(piece.array))

    def sums_of(stores: bool) -> Callable[..., jax.Array]:
      return lambda array, grid: _bucket_sums(piece._replace(array=array), plan, most, part, grid, stores)

    if alone or _few(plan) == 1:
      sums = sums_of(False)(piece.array, grid)
    else:
      sums = lax.platform_dependent(piece.array, grid, tpu=sums_of(False), default=sums_of(True))
  else:

    def folded(sums: jax.Array) -> jax.Array:
      return _folded_rows(sums, dim) if _is_folded(plan, dim) else sums

    def chunked(array: jax.Array, start: Any, grid: Any, wait: Any) -> jax.Array:
      start = (start[0] + jnp.asarray(wait, jnp.uint32), *start[1:])
      return folded(_sums_on_cpu(piece._replace(array=array, start=start), plan, dim, part, grid))

    def direct(array: jax.Array, start: Any, grid: Any, _: Any) -> jax.Array:
      # What is made of known indices is a constant.
      start = tuple(at if isinstance(at, int) else given for at, given in zip(piece.start or (), start, strict=True))
      return folded(_bucket_sums(piece._replace(array=array, start=start), plan, plan.buckets, part, grid))

    def strided(array: jax.Array, start: Any, grid: Any, _: Any) -> jax.Array:
      return folded(block_sums(piece._replace(array=array, start=start), plan, part, grid))

    on_gpu = strided if jax.default_backend() == "gpu" and plan.lot > 1 and aligned(piece) else chunked
    sums = lax.platform_dependent(piece.array, piece.start, grid, wait, cpu=chunked, cuda=on_gpu, default=direct)
  return _placed_sums(piece, plan, sums, dim), sums


def indexed_rows(
  pieces: Sequence[Piece],
  groups: Sequence[int],
  labels: int,
  dim: int,
  seed: int,
  part: Any,
  grid: Any,
  alone: bool = False,
) -> list[jax.Array]:
  """float32[dim] for each label: the count sketches of leaves or blocks, wherever they lie.

  `alone`: no partitioner will see them, and the device is a TPU.
  """
  blocks = any(piece.start is not None for piece in pieces)
  terms: list[list[Term | Vector]] = [[] for _ in range(labels)]
  alive = [0] * labels
  waits: dict[Any, Any] = {}  # only what varies along the same axes can wait without a change of types

  def total(terms: list[Term | Vector]) -> jax.Array:
    on_tpu = functools.partial(sum_terms_on_tpu, terms, dim, part, grid)
    elsewhere = functools.partial(sum_terms_elsewhere, terms, dim, part, grid)
    if alone:
      return on_tpu()
    return lax.platform_dependent(tpu=on_tpu, default=elsewhere) if blocks else elsewhere()

  for piece, group in zip(pieces, groups, strict=True):
    varying = _placement.varying_axes(piece.array, *(piece.start or ()))
    added, sums = indexed_terms(piece, dim, seed, part, grid, alone, waits.get(varying, 0))
    terms[group].append(added.where(piece.speaks))
    if piece.start is not None and sums is not None:
      waits[varying] = shared_zero_of(sums.astype(jnp.float32))
      alive[group] += sums.size
      if alive[group] > _ALIVE:
        terms[group], alive[group] = [Term(0, total(terms[group])[None])], 0
  rows = [total(some) if some else jnp.zeros((dim,), sum_dtype(part)) for some in terms]
  return lax.optimization_barrier([gathered(row) for row in rows])
