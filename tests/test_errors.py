"""Bad input: one sentence that names the argument, what was given, what is accepted and what to do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sedjax
from sedjax import _reports

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
track = sedjax.track_spectral_edge


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"window": 2}, r"window must be an int >= 3 .* got 2"),
    ({"window": 10.0}, r"window must be an int >= 3 .* got 10.0"),
    ({"window": True}, r"window must be an int >= 3 .* got True"),
    ({"window": "10"}, r"window must be an int >= 3 .* got '10'"),
    ({"window": ()}, r"window must be an int >= 3 .* got \(\)"),
    ({"window": (5, 5)}, r"tuple of different ints >= 3, got \(5, 5\)"),
    ({"window": (5, 2)}, r"got \(5, 2\)"),
    ({"every": 0}, r"every must be an int >= 1 .* got 0"),
    ({"every": 2**31}, r"every must be an int >= 1 and < 2\*\*31, got 2147483648"),
    ({"every": 1.5}, r"every must be an int >= 1 .* got 1.5"),
    ({"k_max": 0}, r"k_max must be None or an int in 1…9 .* got 0"),
    ({"k_max": 10}, r"k_max must be None or an int in 1…9 .* got 10"),
    ({"k_max": 10, "window": (5, 10)}, r"k_max must be None or an int in 1…9 \(the largest window less one\), got 10"),
    ({"sketch": "count"}, r"sketch must be sedjax.sketch.count\(…\), gaussian\(…\) or exact\(\), got 'count'"),
    ({"sketch": sedjax.sketch.count(19)}, r"dim must be at least twice the window, got dim=19 .* use dim >= 100"),
    ({"groups": "layer"}, r"groups must be None or a function from a path string to a label, got 'layer'"),
    ({"source": "gradients"}, r"source must be 'updates' or 'params', got 'gradients'"),
    ({"momentum": 1.0}, r"momentum must be a float in \[0, 0.9999\], the optimizer's β₁, got 1.0"),
    ({"momentum": -0.1}, r"momentum must be a float in \[0, 0.9999\].* got -0.1"),
    ({"history": -1}, r"history must be an int >= 0 .* got -1"),
    ({"name": ""}, r"name must be a non-empty string, got ''"),
  ],
)
def test_construction(options, words):
  with pytest.raises(ValueError, match=words):
    track(**options)


def test_numpy_scalars_become_pythons_own():
  """Whatever writes them into a file need not know others."""
  options = {"window": 4, "every": 2, "k_max": 3, "momentum": 0.5, "history": 1}
  kinds = {"momentum": np.float32}
  config = sedjax.core.Config(**{name: kinds.get(name, np.int64)(value) for name, value in options.items()})
  assert config == sedjax.core.Config(**options)
  assert {name: type(getattr(config, name)) for name in options} == {
    "window": tuple, "every": int, "k_max": int, "momentum": float, "history": int
  }  # fmt: skip
  sketch = sedjax.sketch.Count(np.int32(64), np.uint8(1))
  assert (type(sketch.dim), type(sketch.seed)) == (int, int)


@pytest.mark.parametrize("kind", ["Count", "Gaussian"])
def test_sketch_classes_check_as_their_functions_do(kind):
  for dim, seed, words in ((-5, 0, "dim must be an int in .* got -5"), (16.5, 0, "got 16.5"), (16, -1, "seed must")):
    with pytest.raises(ValueError, match=words):
      getattr(sedjax.sketch, kind)(dim, seed)
  with pytest.raises(ValueError, match=r"sketch.exact: there is no sketch"):
    sedjax.sketch.exact().apply("w", PARAMS["w"])


@pytest.mark.parametrize("option", ["window", "every", "momentum"])
def test_inject_hyperparams(option):
  """It makes arrays of all numbers, defaults included, which must stay static here."""
  value = {"window": 4, "every": 2, "momentum": 0.9}[option]
  numbers = {"window", "every", "momentum", "history"}
  injected = optax.inject_hyperparams(track, static_args=numbers - {option})
  with pytest.raises(ValueError, match=rf"{option} must be .* Inside optax.inject_hyperparams, list it in static_args"):
    jax.jit(injected(**{option: value}).init)(PARAMS)
  static = optax.inject_hyperparams(track, static_args=numbers)
  assert int(sedjax.get_report(jax.jit(static(**{option: value}).init)(PARAMS)).count) == 0


def _raise(path):
  raise KeyError(path)


@pytest.mark.parametrize(
  ("groups", "words"),
  [
    (_raise, r"groups\('b'\) raised KeyError\('b'\); return a label or None"),
    (lambda path: [path], r"groups\('b'\) returned \['b'\], which is not hashable; return a string"),
    (lambda path: 0 if path == "b" else "0", r"labels whose text agrees, 0 and '0';"),
  ],
)
def test_group_functions(groups, words):
  with pytest.raises(ValueError, match=words):
    track(groups=groups).init(PARAMS)


def test_group_functions_that_jax_cannot_tell_apart():
  @dataclasses.dataclass
  class ByName:
    depth: int = 1

    def __call__(self, path):
      return path

  with pytest.raises(ValueError, match=r"groups must be hashable, since JAX compiles once for each, got .*ByName"):
    track(groups=ByName())
  ByName.__hash__ = lambda self: self.depth
  track(groups=ByName()).init(PARAMS)


@pytest.mark.parametrize("jit", [False, True])
def test_params_are_needed(jit):
  tx = track(source="params")
  update = jax.jit(tx.update) if jit else tx.update
  with pytest.raises(ValueError, match=r"source='params' needs the parameters, got None; call tx.update"):
    update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
  "step", [1.5, True, "a", 2**40, jnp.float32(1), jnp.zeros(1, jnp.int32), jnp.uint8(1)], ids=str
)
@pytest.mark.parametrize("source", ["updates", "params"])
def test_steps_that_are_no_integers(step, source):
  tx = track(source=source)
  with pytest.raises(ValueError, match=r"sed_step must be an integer scalar of 32 bits or more, and below .* got "):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, sed_step=step)


OTHER_TREES = {
  "another shape": {"w": jnp.ones((3, 5)), "b": jnp.ones(4)},
  "another path": {"w": jnp.ones((3, 4)), "c": jnp.ones(4)},
  "a leaf less": {"w": jnp.ones((3, 4))},
  "a leaf more": {**PARAMS, "c": jnp.ones(2)},
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("sketch", [sedjax.sketch.count(64), sedjax.sketch.exact()], ids=["count", "exact"])
@pytest.mark.parametrize("other", OTHER_TREES)
def test_updates_of_another_tree(other, sketch, jit):
  tx = track(3, sketch=sketch)
  update = jax.jit(tx.update) if jit else tx.update
  with pytest.raises(ValueError, match=r"updates differ in tree, shapes or groups .* call tx.init"):
    update(OTHER_TREES[other], tx.init(PARAMS))


def test_blocks_without_axis_name_are_not_sent_to_init():
  """Which inside the shard_map would take each block for a whole leaf."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  params, specs = {"w": jnp.ones((16, 8))}, {"w": jax.P("x")}
  tx = track(3)
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, jax.P()), out_specs=jax.P())
  words = r"'w' was of shape \(16, 8\) and is of shape \(2, 8\)\); inside the shard_map over \('x',\) give .* axis_name"
  with pytest.raises(ValueError, match=words):
    jax.jit(update)(params, tx.init(params))


def test_groups_that_leave_out_all_leaves():
  tx = track(3, groups=lambda path: "attention" if "attention" in path else None)
  with pytest.raises(ValueError, match="groups returned None for every leaf, such as 'b'"):
    tx.init(PARAMS)
  tx.init({"step": jnp.int32(0)})  # of which none could be tracked


def test_a_state_of_another_sketch_or_tree():
  """A restored state, which this transformation's init never saw: refused where it can be read, else flagged."""
  old = track(3, sketch=sedjax.sketch.count(64)).init(PARAMS)
  reseeded = track(3, sketch=sedjax.sketch.count(64, seed=1))
  with pytest.raises(
    ValueError, match=r"made with sketch .* = \(0, 4, 0, 64\), this tracker's sketch is \(0, 4, 1, 64\)"
  ):
    reseeded.update(PARAMS, old)
  _, state = jax.jit(reseeded.update)(PARAMS, old)
  assert int(sedjax.get_report(state).status) & sedjax.Status.MAP_CHANGED
  renamed = {"v": PARAMS["w"], "b": PARAMS["b"]}
  same = track(3, sketch=sedjax.sketch.count(64))
  with pytest.raises(ValueError, match="differ in tree, shapes or groups"):
    same.update(renamed, old)
  _, state = jax.jit(same.update)(renamed, old)
  assert int(sedjax.get_report(state).status) & sedjax.Status.MAP_CHANGED
  assert "another sketch" in sedjax.explain(sedjax.get_report(state).status)


@pytest.mark.parametrize("find", [sedjax.get_report, sedjax.get_reports, sedjax.get_history])
def test_finding_reports(find):
  with pytest.raises(ValueError, match=r"no tracker in this .* add sedjax.track_spectral_edge"):
    find(optax.adam(1e-3).init(PARAMS))
  twins = optax.chain(track(name="twin"), track(name="twin")).init(PARAMS)
  with pytest.raises(ValueError, match="two trackers have one name"):
    find(twins)
  state = track(history=1).init(PARAMS)
  with pytest.raises(ValueError, match=r"no tracker named 'x'; names: \['spectral_edge'\]"):
    find(state, name="x")


@pytest.mark.parametrize("find", [sedjax.get_report, sedjax.get_history])
def test_unknown_group_or_window(find):
  state = track((5, 10), history=1, groups=lambda path: path).init(PARAMS)
  with pytest.raises(ValueError, match=r"no window 7; the tracker's windows are \(5, 10\)"):
    find(state, window=7)
  with pytest.raises(ValueError, match="no group 'x'; groups: 'b', 'w'"):
    find(state, group="x")
  with pytest.raises(ValueError, match="no group 'x'; groups: none, since the tracker has no `groups`"):
    find(track(history=1).init(PARAMS), group="x")


def test_no_history():
  with pytest.raises(ValueError, match="keeps no history; pass history="):
    sedjax.get_history(track().init(PARAMS))


def test_two_leaves_of_one_path():
  with pytest.raises(ValueError, match="two leaves have the same path 'a/b'; rename one"):
    track().init({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})


MADE = {"window": 3, "sketch": sedjax.sketch.count(64)}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
  "changed",
  [{"window": 5}, {"history": 2}, {"source": "params"}, {"groups": lambda path: path}, {"window": (3, 4)}],
  ids=lambda changed: next(iter(changed)),
)
def test_a_state_of_other_arguments(changed, jit):
  """In both directions: the state knows more than the tracker, or less."""
  old, new = track(**MADE), track(**{**MADE, **changed})
  for tx, state in ((new, old.init(PARAMS)), (old, new.init(PARAMS))):
    tx.init(PARAMS)
    update = jax.jit(tx.update) if jit else tx.update
    words = "differ in tree, shapes or groups" if "groups" in changed and not jit else "made by a tracker of other arg"
    with pytest.raises(ValueError, match=words):
      update(PARAMS, state, PARAMS)


def test_a_state_that_is_not_the_trackers():
  tx = track(**MADE)
  expected = "expects the state of tracker 'spectral_edge'"
  with pytest.raises(ValueError, match=f"{expected}, got tuple"):
    tx.update(PARAMS, optax.adam(1e-3).init(PARAMS))
  with pytest.raises(
    ValueError, match=r"expects the state of tracker 'spectral_edge', got a state of trackers \['x'\]"
  ):
    tx.update(PARAMS, track(**MADE, name="x").init(PARAMS))


@pytest.mark.parametrize(
  "use",
  [
    sedjax.core.report,
    sedjax.core.reports,
    sedjax.core.history,
    _reports.identity,
    lambda state: sedjax.core.observe(sedjax.core.Config(3), state, PARAMS),
  ],
)
def test_the_core_given_the_state_of_an_optimizer(use):
  with pytest.raises(TypeError, match=r"expected a state from core\.init or core\.observe, got SpectralEdgeState; for"):
    use(track(**MADE).init(PARAMS))


@pytest.mark.parametrize("function", [sedjax.core.init, sedjax.core.observe])
def test_the_core_given_its_arguments_in_another_order(function):
  with pytest.raises(TypeError, match=r"expected a core\.Config as the first argument, got dict\."):
    function(PARAMS, sedjax.core.Config(3), PARAMS)


def test_explain_given_a_state_or_inside_jit():
  state = track(**MADE).init(PARAMS)
  with pytest.raises(ValueError, match="expected a concrete status or Report, got a SpectralEdgeState"):
    sedjax.explain(state)
  with pytest.raises(ValueError, match=r"expected a concrete status or Report, got a .*Tracer"):
    jax.jit(lambda state: sedjax.explain(sedjax.get_report(state)) and 0)(state)


@pytest.mark.parametrize("status", [-1, 5000, 2.7])
def test_explain_refuses_what_is_no_status(status):
  with pytest.raises(ValueError, match=r"expected a status, an int in 0…1023, got"):
    sedjax.explain(status)


@pytest.mark.parametrize("shape", [(2**32 + 1, 1), (2**33,)])
def test_leaves_of_more_indices_than_are_told_apart(shape):
  with pytest.raises(ValueError, match=r"leaf 'w' has .* split the leaf"):
    jax.eval_shape(functools.partial(sedjax.sketch.count(64).apply, "w"), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_the_state_of_several_seeds_given_to_one():
  tx = track(**MADE)
  for seeds in (2, 5):
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(seeds))
    for update in (tx.update, jax.jit(tx.update)):
      with pytest.raises(ValueError, match="the state was made by a tracker of other arguments"):
        update(PARAMS, state)
