"""The functional core: `init`, `observe`, `report`. It knows no optax and no model.

A `Config` says what to measure; the state is a NamedTuple of arrays. The transformation `track_spectral_edge` is a
thin caller of these three functions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sedjax import _placement
from sedjax._config import Config as Config
from sedjax._keep import ranks_of
from sedjax._layout import LABEL_WORDS, Layout, encode_label, layout_of, tree_id
from sedjax._observe import observe_params, observe_updates
from sedjax._phase import init_phase
from sedjax._placement import Spec
from sedjax._primitives import with_promotion
from sedjax._reports import history as history
from sedjax._reports import report as report
from sedjax._reports import reports as reports
from sedjax._rows import zero_rows
from sedjax._spectrum import Rows, WindowState
from sedjax._state import (
  INTEGERS,
  Parts,
  expect_state,
  map_id_of,
  pack,
  pack_counters,
  pack_report,
  unpack,
)
from sedjax._state import TrackerState as TrackerState
from sedjax._state import window_sizes as window_sizes
from sedjax._types import VECTOR_FIELDS, Report, Status

__all__ = ["Config", "TrackerState", "history", "init", "observe", "report", "reports", "window_sizes"]

TREE_CHANGED = (
  "track_spectral_edge: the updates differ in tree, shapes or groups from what init saw; call tx.init with the "
  "parameters that these updates belong to."
)
_STATE_CHANGED = (
  "track_spectral_edge: the state was made by a tracker of other arguments (window, sketch, groups, source, history) "
  "or for other parameters; carry it over with sedjax.migrate(state, tx.init(params)), or go on with tx.init(params)."
)
_NOT_SHARDED = (
  "track_spectral_edge: the exact rows in the state are not sharded as the parameters are; make the state with "
  "tx.init(params) of parameters that are sharded as in update, or give jax.shard_map the spec P(None, *spec) for each."
)
_OTHER_MESH = (
  "track_spectral_edge: the state lies on the explicit mesh {}, what is observed on {}; put the state on the "
  "other mesh by jax.device_put, or make it by tx.init of parameters that lie there."
)
_INT_MAX = np.iinfo(np.int32).max


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  return jnp.zeros(shape, dtype)


def _empty_report(window: int, lead: tuple[int, ...]) -> Report:
  vectors = {"singular_values": window, "ratios": window - 1}
  fields = {}
  for name in Report._fields:
    shape = (*lead, vectors[name]) if name in VECTOR_FIELDS else lead
    dtype = jnp.bool_ if name == "edge_ambiguous" else jnp.int32 if name in INTEGERS else jnp.float32
    fields[name] = _zeros(shape, dtype)
  return Report(**fields)._replace(status=jnp.full(lead, int(Status.WINDOW_FILLING), jnp.int32))


def _map_id(config: Config, layout: Layout) -> tuple[int, ...]:
  return (*config.sketch.sketch_id, tree_id(layout))


def _expect_config(config: Any) -> None:
  if not isinstance(config, Config):
    raise TypeError(f"sedjax.core: expected a core.Config as the first argument, got {type(config).__name__}.")


@with_promotion
def init(config: Config, params: Any, specs: Mapping[str, Spec] | None = None) -> TrackerState:
  """The state before the first update.

  Args:
    config: what to measure.
    params: tree of arrays or of `jax.ShapeDtypeStruct`; only paths, shapes, dtypes and shardings are used.
    specs: see `observe`; None also where the whole parameters are given, outside of the `jax.shard_map`.

  Returns:
    A `TrackerState` without rows.

  Raises:
    ValueError: `config.groups` fails on a path, or two leaves share a path.
    TypeError: `config` is no `Config`.

  Cost: the state's memory, (W + 3)·dim·4 + (W + 3)²·4 bytes a group.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax
    >>> config = sedjax.core.Config(window=(3, 5), sketch=sedjax.sketch.count(1024))
    >>> state = sedjax.core.init(config, {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)})
    >>> state.rows.shape, sedjax.core.window_sizes(state)
    ((6, 1, 1024), (3, 5))
  """
  _expect_config(config)
  layout = layout_of(params, config.groups, specs)
  named = layout.labels if config.groups is not None else ()
  flags = int(Status.UNTRACKED) if None in layout.group else 0
  labels = tuple(tuple(encode_label(name).tolist()) for name in ("", *named))
  state = _first_state(config.windows, config.history, config.exact, labels, flags, _map_id(config, layout))
  state = state._replace(
    rows=zero_rows(config, layout, params, config.slots),
    base=zero_rows(config, layout, params, 1 if config.exact else 2) if config.source == "params" else (),
  )
  if specs is None:
    state = _placement.varying_as(state, layout.leaves)
  return _placement.on_mesh(state, _placement.explicit_mesh(layout.leaves))


# Compiled as a whole: outside of jit, the thirty small operations are compiled one by one for every mesh.
@functools.partial(jax.jit, static_argnums=range(6))
def _first_state(
  windows: tuple[int, ...],
  history: int,
  exact: bool,
  labels: tuple[tuple[int, ...], ...],
  flags: int,
  map_id: tuple[int, ...],
) -> TrackerState:
  """A state without rows."""
  slots, groups = max(windows) + 1, len(labels)
  zero = functools.partial(_zeros, (), jnp.int32)
  parts = Parts(
    rows=(),
    base=(),
    facts=Rows(
      _zeros((2 if exact else 1, groups, slots, slots)),
      _zeros((groups, slots)),
      _zeros((groups, slots)),
      _zeros((groups, slots)),
      _zeros((slots,), jnp.int32),
    ),
    **dict.fromkeys(("cursor", "pushed", "filled", "elapsed", "nonfinite", "zero"), zero()),
    flags=zero() + flags,
    windows=tuple(WindowState(init_phase(groups), _zeros((groups, slots))) for _ in windows),
    history=tuple(pack_report(_empty_report(w, (history, groups))) for w in windows if history),
    labels=_zeros((groups, LABEL_WORDS), jnp.int32) + np.asarray(labels, np.int32),
    map_id=zero() + np.asarray(map_id, np.int32),
  )
  return pack(parts, [_empty_report(w, (groups,)) for w in windows])


def _check_step(step: Any) -> None:
  dtype, shape = getattr(step, "dtype", None), getattr(step, "shape", None)
  if isinstance(step, int) and not isinstance(step, bool):
    fits = abs(step) <= _INT_MAX
  else:
    fits = dtype is not None and shape == () and jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4
    fits = fits and (not isinstance(step, np.generic) or abs(int(step)) <= _INT_MAX)
  if not fits:
    given = repr(step) if dtype is None else f"{dtype}{list(shape or ())}"
    raise ValueError(
      f"track_spectral_edge: sed_step must be an integer scalar of 32 bits or more, and below 2**31, got {given}; pass "
      "the number of steps before this one, a single one under vmap, too."
    )


@with_promotion
def observe(
  config: Config,
  state: TrackerState,
  updates: Any,
  params: Any = None,
  step: Any = None,
  specs: Mapping[str, Spec] | None = None,
) -> TrackerState:
  """Takes in one step.

  Args:
    config: what to measure.
    state: from `init` or the last `observe`.
    updates: tree of arrays of any float dtype; not read where `config.source` is "params".
    params: tree of the parameters *before* this step; needed where `config.source` is "params".
    step: None, or an int32 scalar: how many steps came before this one. It sets the rhythm of `every` instead of the
      state's own counter; unbatched under `vmap`, it lets the work between rows be skipped.
    specs: inside a `jax.shard_map`, how the leaves are split, by path: a tuple of mesh axes for each dimension.

  Returns:
    The new state; its reports are new where a row was completed.

  Raises:
    ValueError: params are needed and absent, `step` is no integer scalar, or the state is of another tree or tracker.
    TypeError: `config` is no `Config`, or `state` no `TrackerState`.

  Cost: one read of the updates (of parameters three, once a row), and once a row a Gram column and an eigenproblem of W
    rows, with a momentum two.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax
    >>> config = sedjax.core.Config(window=3)
    >>> state = sedjax.core.init(config, {"w": jnp.zeros((8, 4))})
    >>> step = jax.jit(lambda state, update: sedjax.core.observe(config, state, update))
    >>> for key in jax.random.split(jax.random.key(0), 4):
    ...   state = step(state, {"w": jax.random.normal(key, (8, 4))})
    >>> report = sedjax.core.report(state)
    >>> report.singular_values.shape, int(report.count), int(report.k_star) > 0
    ((3,), 4, True)
  """
  _expect_config(config)
  if config.source == "params" and params is None:
    raise ValueError(
      "track_spectral_edge: source='params' needs the parameters, got None; call tx.update(updates, state, params)."
    )
  expect_state(state)
  if step is not None:
    _check_step(step)
  from_params = config.source == "params"
  tree = params if from_params else updates
  layout = layout_of(tree, config.groups, specs)
  for path, leaf, group in zip(layout.paths, layout.leaves, layout.group, strict=True):
    if group is not None and _placement.reduced_axes(leaf):
      raise ValueError(
        f"track_spectral_edge: the type of leaf {path!r} is {jax.typeof(leaf)}, reduced or unreduced over a mesh axis, "
        "which cannot be observed; give it the sharding of a PartitionSpec without these by jax.sharding.reshard."
      )
  _check_mesh(layout, state)
  state = _placement.on_mesh(state, _placement.explicit_mesh(layout.leaves))
  state = _check_state(config, layout, tree, state, blocks=specs is not None)
  leaves = tuple(leaf if group is not None else None for leaf, group in zip(layout.leaves, layout.group, strict=True))
  if from_params:
    return observe_params(config, layout._replace(leaves=()), leaves, state, step)
  layout = layout._replace(leaves=(), ranks=ranks_of(leaves))
  return observe_updates(config, layout, leaves, state, step)


def _check_mesh(layout: Layout, state: TrackerState) -> None:
  """Refuses a state over explicit axes of another mesh than the leaves'; what is on no mesh fits to all."""
  of_state = _placement.explicit_mesh(jax.tree.leaves(state))
  if of_state is None:
    return
  of_state = getattr(of_state, "abstract_mesh", of_state)
  for mesh in map(_placement.mesh_of, layout.leaves):
    if not mesh.empty and mesh != of_state:
      kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
      other = {name: (size, kind.name) for (name, size), kind in kinds}
      raise ValueError(_OTHER_MESH.format(dict(of_state.shape), other))


def _shapes(tree: Any) -> list[tuple[int, ...]]:
  return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _are_blocks(layout: Layout, rows: Any) -> bool:
  """Whether exact rows could be blocks of the leaves that those of `layout` are blocks of."""
  rings = jax.tree.leaves(rows)
  if len(rings) != len(layout.shapes):
    return False
  for ring, whole, group in zip(rings, layout.shapes, layout.group, strict=True):
    block = jnp.shape(ring)[ring.ndim - len(whole) :]
    if group is not None and (len(block) < len(whole) or any(w % max(b, 1) for b, w in zip(block, whole, strict=True))):
      return False
  return True


def _check_state(config: Config, layout: Layout, tree: Any, state: TrackerState, blocks: bool) -> TrackerState:
  """Refuses a state that another sketch, tree or configuration made; flags what cannot be known while tracing.

  `blocks`: each device sees blocks of the leaves and of exact rows, as inside a `shard_map`.
  """
  expected, traced = np.asarray(_map_id(config, layout), np.int32), isinstance(state.counters, Tracer)
  if not traced:
    # In NumPy, since inside jit what is made of a state that was not traced is traced.
    found = map_id_of(state._replace(counters=np.asarray(state.counters)))  # pyright: ignore[reportArgumentType]
    alone = found.ndim == 1  # those of seeds fail below
    if alone and found[4] != expected[4]:
      raise ValueError(TREE_CHANGED)
    if alone and np.any(found != expected):
      raise ValueError(
        "track_spectral_edge: the state's rows were made with sketch (kind, version, seed, dim) = "
        f"{tuple(map(int, found[:4]))}, this tracker's sketch is {tuple(map(int, expected[:4]))}; build the tracker "
        "with the former sketch, or call tx.init for a new state."
      )
  expected_state = jax.eval_shape(functools.partial(init, config), tree)
  if _shapes(state) != _shapes(expected_state):
    alike = [_shapes(each._replace(rows=(), base=())) for each in (state, expected_state)]
    split = config.exact and layout.axes and alike[0] == alike[1] and _are_blocks(layout, state.rows)
    raise ValueError(_NOT_SHARDED if split else _STATE_CHANGED)
  if config.exact and not blocks:
    for rings in filter(None, map(jax.tree.leaves, (state.rows, state.base))):
      for ring, spec, group in zip(rings, layout.specs, layout.group, strict=True):
        wanted = spec and ((),) * (ring.ndim - len(spec)) + spec
        if group is not None and _placement.explicit_spec(ring)[0] != wanted:
          raise ValueError(_NOT_SHARDED)
  if not traced:
    return state
  parts = unpack(state)
  changed = jnp.any(parts.map_id != expected)
  flags = parts.flags | jnp.where(changed, int(Status.MAP_CHANGED), 0)
  return state._replace(counters=pack_counters(parts._replace(flags=flags)))
