"""Where the blocks of sharded leaves lie, and computing on them without moving them.

Shardings are known while tracing in two cases: over mesh axes of *explicit* type, which arrays carry in their types,
and inside the user's own `jax.shard_map`, of which the user gives the axes (`axis_name`). Then each device works on its
blocks, and what they give is summed over the mesh once. Over *automatic* axes nothing is known, and XLA's partitioner
does what it finds best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Spec = tuple[tuple[str, ...], ...]  # by dimension, the mesh axes over which it is split


def normalised(spec: Any, ndim: int) -> Spec:
  """A `PartitionSpec` with a tuple of names for each of `ndim` dimensions."""
  entries = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
  return tuple(entries + [()] * (ndim - len(entries)))


def explicit_spec(leaf: Any) -> tuple[Spec, Any]:
  """How a leaf is split over explicit mesh axes, and their abstract mesh; ((), None) where it is not."""
  kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  sharding = getattr(kind, "sharding", None)
  if not isinstance(sharding, jax.NamedSharding):
    return (), None
  mesh = sharding.mesh.abstract_mesh
  explicit = {
    name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == jax.sharding.AxisType.Explicit
  }
  spec = normalised(sharding.spec, len(leaf.shape))
  if not any(explicit.intersection(names) for names in spec):
    return (), None
  return spec, mesh


def axis_sizes(names: Sequence[str]) -> dict[str, int]:
  """Sizes of mesh axes.

  Raises:
    ValueError: a name is not an axis of a surrounding `jax.shard_map`.
  """
  sizes = {}
  for name in names:
    try:
      sizes[name] = jax.lax.axis_size(name)
    except NameError as error:
      raise ValueError(
        f"track_spectral_edge: axis_name={name!r} is not a mesh axis here; call update inside a jax.shard_map over a "
        "mesh with that axis, or leave axis_name out."
      ) from error
  return sizes


def whole_shape(shape: tuple[int, ...], spec: Spec) -> tuple[int, ...]:
  """The shape of the leaf of which a block of this shape is a device's share."""
  return tuple(
    size * math.prod(axis_sizes(names).values()) for size, names in zip(shape, spec or ((),) * len(shape), strict=True)
  )


def infer_specs(blocks: Mapping[str, tuple[int, ...]], wholes: Mapping[str, tuple[int, ...]], names: Sequence[str]):
  """Finds which dimensions of which leaves are split over which axes from the shapes of blocks and of whole leaves.

  Args:
    blocks, wholes: shapes by path.
    names: the mesh axes.

  Returns:
    dict from path to `Spec`.

  Raises:
    ValueError: the shapes fit no split or several different ones.
  """
  sizes = axis_sizes(names)

  def splits(factors: tuple[int, ...], left: tuple[str, ...]) -> list[Spec]:
    """All ways to write each factor as a product of the sizes of different axes, in the axes' order."""
    if not factors:
      return [()]
    found = []
    for chosen in range(2 ** len(left)):
      part = tuple(name for i, name in enumerate(left) if chosen >> i & 1)
      if math.prod(sizes[name] for name in part) == factors[0] and all(sizes[name] > 1 for name in part):
        rest = tuple(name for name in left if name not in part)
        found += [(part, *more) for more in splits(factors[1:], rest)]
    return found

  specs = {}
  for path, block in blocks.items():
    whole = wholes[path]
    fits = len(block) == len(whole) and all(b > 0 and w % b == 0 for b, w in zip(block, whole, strict=True) if w)
    factors = tuple(w // b if b else 1 for b, w in zip(block, whole, strict=True)) if fits else ()
    found = splits(factors, tuple(names)) if fits else []
    if len(found) != 1:
      reason = "fit no split" if not found else f"fit {len(found)} different splits"
      raise ValueError(
        f"track_spectral_edge: the block {block} of leaf {path!r} of shape {whole} (as tx.init saw it) {reason} over "
        f"the mesh axes {sizes}; give axis_name=specs, the tree of PartitionSpecs of the parameters."
      )
    specs[path] = found[0]
  return specs


def block_start(shape: tuple[int, ...], spec: Spec) -> tuple[Any, ...]:
  """Index in the whole leaf of the first number of this device's block of `shape`, by dimension."""
  return tuple(
    jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(size) if names else 0
    for size, names in zip(shape, spec or ((),) * len(shape), strict=True)
  )


def is_first(axes: Sequence[str]) -> Any:
  """bool[]: whether this device is the first along all of `axes`; one that speaks for all that hold the same."""
  first: Any = True
  for axis in axes:
    first = first & (jax.lax.axis_index(axis) == 0)
  return first


def psum(x: Any, axes: Sequence[str]) -> Any:
  return jax.lax.psum(x, tuple(axes)) if axes else x


def pmax(x: Any, axes: Sequence[str]) -> Any:
  return jax.lax.pmax(x, tuple(axes)) if axes else x


def locally(function: Callable[..., Any], mesh: Any, axes: Sequence[str], arrays: Any, specs: Any, *others: Any) -> Any:
  """function(*lists of blocks, *others), on each device, for a function whose result is equal on all of them.

  Args:
    function: takes as many lists of blocks as `arrays` has lists, and others.
    mesh: the abstract mesh of explicit axes; None where blocks is what `arrays` are.
    axes: the axes over which any array is split.
    arrays, specs: lists of lists of the same lengths.
    others: arrays that are the same on all devices.
  """
  if mesh is None or not axes:
    return function(*arrays, *others)
  split = [[jax.P(*(names or None for names in spec)) for spec in one] for one in specs]
  in_specs = (*split, *(jax.P() for _ in others))
  return jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=jax.P(), axis_names=set(axes), check_vma=False
  )(*arrays, *others)
