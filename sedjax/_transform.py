"""The optax transformation: a thin caller of the core."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import optax

from sedjax import _keep, _placement, core
from sedjax._layout import is_inexact, layout_of, shapes_by_path, tracked_shapes, tree_id
from sedjax._types import Report


class SpectralEdgeState(NamedTuple):
  """State of `track_spectral_edge`: the core's state under the tracker's name."""

  trackers: dict[str, core.TrackerState]


def _with_integers_of(updates: Any, params: Any) -> Any:
  """Updates, but integers where the parameters are: optimizers make floats even of those, which are not tracked."""
  if jax.tree.structure(updates) != jax.tree.structure(params):
    return updates
  return jax.tree.map(lambda update, leaf: update if is_inexact(leaf) else leaf, updates, params)


def _stored(watched: Any, updates: Any, tracked: list[int], state: jax.Array) -> tuple[Any, Any]:
  """What is watched and the updates, the tracked leaves of which XLA stores once; see `_keep`."""
  seen, structure = jax.tree.flatten(watched)
  passed = jax.tree.leaves(updates)
  for i, *pair in zip(tracked, *_keep.stored([passed[i] for i in tracked], state), strict=True):
    seen[i], passed[i] = pair
  return structure.unflatten(seen), jax.tree.unflatten(jax.tree.structure(updates), passed)


def _difference(before: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]], blocks: bool) -> str:
  """What to say of updates of another tree than that of init; `blocks`: the tracker has an `axis_name`."""
  path = next((path for path in [*before, *now] if before.get(path) != now.get(path)), None)
  was, is_now = ("absent" if path not in some else f"of shape {some[path]}" for some in (before, now))
  change = "their groups" if path is None else f"leaf {path!r} was {was} and is {is_now}"
  names = _placement.manual_axes()
  if names and not blocks and path is not None:
    what = f"inside the shard_map over {names} give the tracker axis_name={names} where they are blocks of parameters"
  else:
    what = "call tx.init with the parameters that these updates belong to"
    what += ", or give axis_name the PartitionSpecs of these blocks" if blocks else ""
  return f"track_spectral_edge: the updates differ in tree, shapes or groups from what init saw ({change}); {what}."


def track_spectral_edge(
  window: int | tuple[int, ...] = 10,
  *,
  every: int = 1,
  k_max: int | None = None,
  sketch: Any = None,
  groups: Callable[[str], Hashable | None] | None = None,
  source: str = "updates",
  momentum: float = 0.0,
  history: int = 0,
  axis_name: Any = None,
  name: str = "spectral_edge",
) -> optax.GradientTransformationExtraArgs:
  """Watches the updates that pass, and leaves them as they are.

  Put it last in a chain and read the report with `get_report`. Not a bit of an update changes; but a jitted step, of
  which XLA then fuses other operations, may round differently in making it than the same step without a tracker.
  Leaves of integers, booleans, float0 and PRNG keys are not tracked (the report's status says so); a complex leaf
  counts as its real and imaginary parts. Inside `optax.MultiSteps` the tracker is computed on each micro-step and kept
  on the last one; around it, the micro-steps' zero updates are skipped and counted (where the source is parameters,
  `every` counts micro-steps).

  Args:
    window: int >= 3, rows in the window, or a tuple of ints for several windows over one buffer.
    every: int >= 1, steps summed into a row. A step with NaN, Inf or numbers beyond 1e33 is left out and an exactly
      zero one does not count; a row of another number of steps says so in `Report.row_steps`.
    k_max: int in 1…W - 1, the last place where an edge is looked for; None for half of each window, since the ratios of
      a smooth trajectory's tail are large and mean nothing. W - 1 is the paper's definition, of several windows the
      largest's: none looks beyond its own.
    sketch: `sedjax.sketch.count(dim)` (None: of dim 16384), `gaussian(dim)` or `exact()`.
    groups: None, or a function from a leaf's path ("block_0/attn/kernel") to a label, None for "not tracked".
    source: "updates", or "params" for differences of the parameters, read, in three passes, once in `every` steps; the
      row of steps (k-1)n+1 … kn is seen at step kn+1, since a chain is given the parameters from before the step.
    momentum: float in [0, 0.9999], β₁ of the optimizer: noise of that correlation is what an edge must exceed.
    history: int >= 0, so many past reports are kept on the device; see `get_history`.
    axis_name: inside a `jax.shard_map` whose blocks update is given: the mesh axes over which the parameters are split,
      a name or a tuple of names (which dimensions are split is found by comparing shapes with those that tx.init saw,
      outside of the shard_map), or a tree of the parameters' PartitionSpecs, which is needed where shapes do not tell
      it all, as where one dimension is split over two axes. Elsewhere None: shardings over explicit
      mesh axes are known, and XLA cares for automatic ones.
    name: tells two trackers in one optimizer apart.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its update takes an optional `sed_step`, the number of steps before
    this one, which sets the rhythm of `every` and may be unbatched under `vmap`; other extra arguments are ignored.

  Raises:
    ValueError: an argument is out of its range; in `update`, a tree that differs from that of `init`, or
      `source="params"` without parameters. The message names what was given and what is accepted.

  Cost: one read of the updates a step, which a program that makes them also stores, once (with `source="params"` three
    of the parameters a row); (W + 3)·dim·4 + (W + 3)²·4 bytes a group; every row, a Gram column and an eigenproblem of
    W rows in each group and window (with a `momentum` two, the other for noise in rows of the same norms). What noise
    shows is simulated on the host when the tracker is first traced, once for each window, in W³ operations: seconds
    from 128 rows on.

  Source: arXiv 2603.15678. Departures: rows are steps rather than checkpoints, seen through a sketch; `k_max`; the
    phases are streaming, without hindsight.

  Example:
    >>> import jax.numpy as jnp, optax, sedjax
    >>> tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(window=3))
    >>> state = tx.init({"w": jnp.ones(3)})
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state)
    >>> int(sedjax.get_report(state).count)
    1
  """
  arguments = (window, every, k_max, sketch, groups, source, momentum, history)
  try:
    config = core.Config(*arguments)
  except ValueError as error:
    arrays = any(isinstance(argument, jax.Array) for argument in arguments)
    hint = " Inside optax.inject_hyperparams, list it in static_args." if arrays else ""
    raise ValueError(f"track_spectral_edge: {error}{hint}") from None
  if not isinstance(name, str) or not name:
    raise ValueError(f"track_spectral_edge: name must be a non-empty string, got {name!r}.")

  blocks = _placement.Blocks(axis_name) if axis_name is not None else None

  # A traced state cannot tell which tree it belongs to, so that the trees that init saw are remembered here: what they
  # track, which is nothing where optax.tree.map_params calls init with a tree of nothing.
  seen: dict[int, dict[str, tuple[int, ...]]] = {}

  def init_fn(params: Any) -> SpectralEdgeState:
    specs = blocks.specs_at_init(shapes_by_path(params)) if blocks else None
    layout = layout_of(params, groups, specs)
    seen[tree_id(layout)] = tracked_shapes(layout)
    return SpectralEdgeState({name: core.init(config, params, specs)})

  def update_fn(
    updates: Any, state: Any, params: Any = None, *, sed_step: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    del extra_args
    from_params = source == "params" and params is not None
    watched = params if from_params else _with_integers_of(updates, params)
    specs = blocks.specs(shapes_by_path(watched)) if blocks else None
    layout = layout_of(watched, groups, specs)
    if any(seen.values()) and tree_id(layout) not in seen:
      *_, before = filter(None, seen.values())
      raise ValueError(_difference(before, tracked_shapes(layout), blocks is not None))
    if not isinstance(state, SpectralEdgeState) or name not in state.trackers:
      found = (
        f"a state of trackers {list(state.trackers)}" if isinstance(state, SpectralEdgeState) else type(state).__name__
      )
      raise ValueError(
        f"track_spectral_edge: update expects the state of tracker {name!r}, got {found}; pass what tx.init or "
        "tx.update returned, or sedjax.migrate it to this optimizer."
      )
    tracker = state.trackers[name]
    tracked = [i for i, group in enumerate(layout.group) if group is not None]
    with jax.named_scope("sedjax"):
      if from_params:
        tracker = core.observe(config, tracker, watched, params, sed_step, specs)
        leaves, structure = jax.tree.flatten(updates)
        updates = structure.unflatten(_keep.later(leaves, tracker.counters))
      else:
        watched, updates = _stored(watched, updates, tracked, tracker.counters)
        tracker = core.observe(config, tracker, watched, params, sed_step, specs)
    return updates, SpectralEdgeState({name: tracker})

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_tracker(state: Any, name: str | None) -> core.TrackerState:
  """The tracker's state in an optimizer state."""
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SpectralEdgeState))
  found = [item for node in nodes if isinstance(node, SpectralEdgeState) for item in node.trackers.items()]
  names = [item[0] for item in found]
  if not found:
    raise ValueError(
      "sedjax: there is no tracker in this optimizer state; add sedjax.track_spectral_edge() to the chain and pass "
      "the state that tx.init or tx.update returned."
    )
  if len(set(names)) < len(names):
    raise ValueError(f"sedjax: two trackers have one name, got {names}; give each its own name=….")
  if name is None and len(found) > 1:
    raise ValueError(f"sedjax: several trackers, named {names}; pass name=….")
  if name is not None and name not in names:
    raise ValueError(f"sedjax: there is no tracker named {name!r}; names: {names}.")
  return dict(found)[names[0] if name is None else name]


def get_report(
  state: Any, *, group: Hashable | None = None, window: int | None = None, name: str | None = None
) -> Report:
  """Finds the newest report in an optimizer state, inside or outside `jit`.

  Args:
    state: any optax state that holds a tracker, however deep.
    group: a label that `groups` returned, or None for the whole model.
    window: one of the tracker's windows, or None for the largest.
    name: of the tracker, where there are several.

  Returns:
    A `Report` of scalars and vectors; leading axes of a vmapped state are kept.

  Raises:
    ValueError: no tracker, two of one name, or an unknown group, window or name. (Inside `jit` the groups' names are
      not known: there an unknown group gives NaN, k_star -1 and the status bit UNKNOWN_GROUP.)

  Cost: none; the report is made when a row is pushed.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> tx = sedjax.track_spectral_edge(window=(3, 5), groups=lambda path: path.split("/")[0])
    >>> state = tx.init({"head": {"w": jnp.ones(3)}, "body": {"w": jnp.ones(3)}})
    >>> sedjax.get_report(state, group="head", window=3).singular_values.shape
    (3,)
  """
  return core.report(find_tracker(state, name), group=group, window=window)


def get_reports(state: Any, *, name: str | None = None) -> Report:
  """Finds the newest reports of all groups and windows in an optimizer state, inside or outside `jit`.

  Args:
    state: any optax state that holds a tracker, however deep.
    name: of the tracker, where there are several.

  Returns:
    A `Report` of fields [..., group, window]: group 0 is the whole model, the others follow in the order in which the
    tree's leaves first name them; windows ascend, and vectors are padded with 0 to the largest.

  Raises:
    ValueError: no tracker, two of one name, or an unknown name.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> state = sedjax.track_spectral_edge(window=(3, 5)).init({"w": jnp.ones(3)})
    >>> sedjax.get_reports(state).singular_values.shape
    (1, 2, 5)
  """
  return core.reports(find_tracker(state, name))


def get_history(
  state: Any, *, group: Hashable | None = None, window: int | None = None, name: str | None = None
) -> Report:
  """Finds the last reports that a tracker with `history=H` kept, oldest first, inside or outside `jit`.

  Args:
    state, group, window, name: as for `get_report`.

  Returns:
    A `Report` of fields [..., H]; where there was no report yet, `count` is 0 and comes first.

  Raises:
    ValueError: as `get_report`, or the tracker keeps no history.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> tx = sedjax.track_spectral_edge(window=3, history=2)
    >>> params = {"w": jnp.ones(3)}
    >>> _, state = tx.update(params, tx.init(params))
    >>> sedjax.get_history(state).count.tolist()
    [0, 1]
  """
  return core.history(find_tracker(state, name), group=group, window=window)
