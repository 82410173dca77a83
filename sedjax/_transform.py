"""The optax transformation: a thin caller of the core."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import optax

from sedjax import core
from sedjax._types import Report


class SpectralEdgeState(NamedTuple):
  """State of `track_spectral_edge`: the core's state under the tracker's name."""

  trackers: dict[str, core.TrackerState]


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
  name: str = "spectral_edge",
) -> optax.GradientTransformationExtraArgs:
  """Watches the updates that pass, and leaves them as they are.

  Put it last in a chain and read the report with `get_report`.

  Args:
    window: int >= 3, rows in the window, or a tuple of ints for several windows over one buffer.
    every: int >= 1, steps summed into a row.
    k_max: int, the last place where an edge is looked for; None for half of each window.
    sketch: `sedjax.sketch.count(dim)` (None: of dim 16384), `gaussian(dim)` or `exact()`.
    groups: None, or a function from a leaf's path ("block_0/attn/kernel") to a label, None for "not tracked".
    source: "updates", or "params" for differences of the parameters.
    momentum: float in [0, 1), β₁ of the optimizer: noise of that correlation is what an edge must exceed.
    history: int, so many past reports are kept on the device.
    name: tells two trackers in one optimizer apart.

  Returns:
    An `optax.GradientTransformationExtraArgs`; its update takes an optional `sed_step`, the number of steps before
    this one, which sets the rhythm of `every` and may be unbatched under `vmap`.

  Raises:
    ValueError: an argument is out of its range; the message names it.

  Source: arXiv 2603.15678.

  Example:
    >>> import jax.numpy as jnp, optax, sedjax
    >>> tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(window=3))
    >>> state = tx.init({"w": jnp.ones(3)})
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state)
    >>> int(sedjax.get_report(state).count)
    1
  """
  config = core.Config(window, every, k_max, sketch, groups, source, momentum, history)
  if not isinstance(name, str) or not name:
    raise ValueError(f"track_spectral_edge: name must be a non-empty string, got {name!r}.")

  def init_fn(params: Any) -> SpectralEdgeState:
    return SpectralEdgeState({name: core.init(config, params)})

  def update_fn(
    updates: Any, state: Any, params: Any = None, *, sed_step: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    del extra_args
    with jax.named_scope("sedjax"):
      tracker = core.observe(config, state.trackers[name], updates, params, sed_step)
    return updates, SpectralEdgeState({name: tracker})

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _find(state: Any, name: str | None) -> core.TrackerState:
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
    A `Report`; leading axes of a vmapped state are kept.

  Raises:
    ValueError: no tracker, two of one name, or an unknown group, window or name.
  """
  return core.report(_find(state, name), group=group, window=window)
