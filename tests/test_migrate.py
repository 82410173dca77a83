"""Attaching, detaching and resizing trackers of a state that training goes on from."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import slow
from contract import assert_identical, stacked, train, tree

import sedjax

COUNT = sedjax.sketch.count(64)


def adamw_with(*trackers):
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), *trackers)


def moments(state):
  """All arrays outside trackers, by name."""
  is_tracker = lambda x: isinstance(x, sedjax.SpectralEdgeState)  # noqa: E731
  leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_tracker)
  return [leaf for _, leaf in leaves if not is_tracker(leaf)]


def test_attach_and_detach(tmp_path):
  """On a state restored from a checkpoint that knew no tracker, and back; the moments keep their bits."""
  params, updates = tree(), stacked()
  plain, watched = adamw_with(), adamw_with(sedjax.track_spectral_edge(3, sketch=COUNT))
  saved = train(plain, plain.init(params), params, updates)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "state", saved)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: (plain.init(params), params)))
  attached = sedjax.migrate(restored[0], watched.init(params))
  assert_identical(moments(attached), moments(saved[0]))
  assert int(sedjax.get_report(attached).status) & sedjax.Status.WINDOW_FILLING
  state, after = train(watched, attached, restored[1], updates)
  expected = train(plain, *saved, updates)
  assert_identical(after, expected[1])
  assert int(sedjax.get_report(state).k_star) == 1
  assert_identical(sedjax.migrate(state, plain.init(params)), expected[0])


def test_attach_where_the_nesting_changes():
  params = tree()
  alone = optax.adam(1e-3).init(params)
  wrapped = optax.MultiSteps(optax.chain(optax.adam(1e-3), sedjax.track_spectral_edge(3, sketch=COUNT)), 2)
  with pytest.raises(ValueError, match="the old state has no array for 'mini_step'"):
    sedjax.migrate(alone, wrapped.init(params))
  chained = optax.chain(optax.chain(optax.adam(1e-3)), sedjax.track_spectral_edge(3, sketch=COUNT))
  assert_identical(moments(sedjax.migrate(alone, chained.init(params))), moments(alone))


EXACT, EVERY, PARAMS = {"sketch": sedjax.sketch.exact()}, {"every": 4, "history": 3}, {"source": "params"}


def in_chunks(tx, state, params, updates):
  """As `train`, compiled for 6 steps only."""
  for chunk in range(0, updates["w"].shape[0], 6):
    state, params = train(tx, state, params, {"w": updates["w"][chunk : chunk + 6]})
  return state, params


@pytest.mark.parametrize(
  ("before", "after", "options"),
  [
    # What the others hold, too, takes a minute more.
    slow(3, 5, {}),
    (5, 3, {}),
    slow((3, 5), (4, 3), {}),
    slow((4, 6), 6, {}),
    (3, 5, EVERY),
    slow(5, 3, EVERY),
    ((3, 5), (4, 3), PARAMS),
    slow(3, 5, EXACT),
    ((3, 5), (4, 3), EXACT | EVERY),
    slow(5, 3, EXACT | PARAMS),
  ],
  ids=str,
)
def test_resize(before, after, options):
  """After a resize the reports are those of a tracker that had the new size all along, once its window is full."""
  params = {"w": jnp.ones((3, 4))}
  rng = np.random.default_rng(0)
  updates = {"w": jnp.asarray(rng.normal(size=(42, 3, 4)), jnp.float32)}
  small, large = (sedjax.track_spectral_edge(w, **{"sketch": COUNT, **options}) for w in (before, after))
  first, rest = ({"w": updates["w"][s]} for s in (slice(0, 18), slice(18, 42)))  # 18: in the middle of a row of 4
  state, moved = in_chunks(small, small.init(params), params, first)
  migrated = sedjax.migrate(state, large.init(params))
  assert contract.signature(migrated) == contract.signature(large.init(params))
  resized, _ = in_chunks(large, migrated, moved, rest)
  unbroken, _ = in_chunks(large, large.init(params), params, updates)
  for window in sedjax.core.window_sizes(resized.trackers["spectral_edge"]):
    got, expected = (sedjax.get_report(s, window=window) for s in (resized, unbroken))
    # A window that had to refill has seen other ratios than one that did not, so its phase may differ.
    contract.assert_near(got._replace(phase=0), expected._replace(phase=0), 1e-4)
    if "history" in options:
      numbers = sedjax.get_history(resized, window=window).count
      assert numbers.tolist() == sedjax.get_history(unbroken, window=window).count.tolist()


def test_the_same_size_changes_nothing():
  params, updates = tree(), stacked()
  tx = sedjax.track_spectral_edge(3, sketch=COUNT, history=2)
  state, moved = train(tx, tx.init(params), params, updates)
  again = sedjax.migrate(state, tx.init(params))
  assert_identical(sedjax.get_reports(again), sedjax.get_reports(state))
  assert_identical(sedjax.get_history(again), sedjax.get_history(state))
  a, b = (sedjax.get_reports(train(tx, s, moved, updates)[0]) for s in (state, again))
  contract.assert_near(a, b)


def test_vmapped_states():
  seeds = 3
  params = {"w": jnp.ones((seeds, 3, 4))}
  small, large = (sedjax.track_spectral_edge(w, sketch=COUNT) for w in (3, 5))
  state = jax.vmap(small.init)(params)
  step = jax.jit(jax.vmap(lambda s, p: small.update(p, s)[1]))
  for i in range(5):
    state = step(state, {"w": (1.0 + i) * params["w"]})
  migrated = sedjax.migrate(state, jax.vmap(large.init)(params))
  migrated = jax.vmap(lambda s, p: large.update(p, s)[1])(migrated, params)
  assert sedjax.get_report(migrated).count.tolist() == [6] * seeds
  norms = np.sqrt(12) * np.array([2, 3, 4, 5, 1])  # three rows were kept by the old window of 3, and one more slot
  sigma = sedjax.get_report(migrated).singular_values[:, 0]
  np.testing.assert_allclose(sigma, np.full(seeds, np.linalg.norm(norms[1:])), rtol=1e-4)


def test_what_cannot_be_carried():
  params = tree()
  tx = adamw_with(sedjax.track_spectral_edge(3, sketch=COUNT))
  state = tx.init(params)
  for other in (
    sedjax.track_spectral_edge(3, sketch=sedjax.sketch.count(64, seed=1)),
    sedjax.track_spectral_edge(3, sketch=sedjax.sketch.exact()),
    sedjax.track_spectral_edge(3, sketch=COUNT, source="params"),
    sedjax.track_spectral_edge(3, sketch=COUNT, groups=lambda path: path),
  ):
    with pytest.raises(ValueError, match="tracker 'spectral_edge' changed its sketch, tree, groups or source"):
      sedjax.migrate(state, adamw_with(other).init(params))
  with pytest.raises(ValueError, match="the new state has no place for 'count'"):
    sedjax.migrate(state, optax.sgd(1.0).init(params))
  wider = {**params, "gain": jnp.ones(3)}
  with pytest.raises(ValueError, match=r"'mu/gain' is float32\[\] in the old state and float32\[3\] in the new one"):
    sedjax.migrate(state, tx.init(wider))
  twins = optax.chain(sedjax.track_spectral_edge(3, sketch=COUNT), sedjax.track_spectral_edge(3, sketch=COUNT))
  with pytest.raises(ValueError, match="two trackers of the old state have one name, 'spectral_edge'"):
    sedjax.migrate(twins.init(params), state[-1:])
  with pytest.raises(ValueError, match="the states are traced"):
    jax.jit(sedjax.migrate)(state, state)
  with pytest.raises(ValueError, match="the new state is an optimizer; give its state"):
    sedjax.migrate(state, tx)
  small, large = (sedjax.track_spectral_edge(w, sketch=COUNT) for w in (3, 5))
  seeds = [{"w": jnp.ones((count, 3, 4))} for count in (2, 3)]
  with pytest.raises(ValueError, match=r"has vmapped axes \(2,\), the new one \(3,\)"):
    sedjax.migrate(jax.vmap(small.init)(seeds[0]), jax.vmap(large.init)(seeds[1]))


def test_optimizers_in_another_order_are_refused():
  """All of their arrays have a place, but training would go on with other updates."""
  old = optax.chain(optax.trace(0.9), optax.scale_by_adam()).init(tree())
  new = optax.chain(optax.scale_by_adam(), optax.trace(0.9), sedjax.track_spectral_edge(3, sketch=COUNT)).init(tree())
  with pytest.raises(ValueError, match=r"comes at another place .* with all else in the same order"):
    sedjax.migrate(old, new)
