"""What every transformation that only watches must satisfy, wherever optax users put it.

Each property takes a transformation and raises where it does not hold. The properties know nothing about sedjax, so
that deliberately broken transformations can be put through them too. Where a fact shows in the traced program alone,
nothing is compiled: compiling is what the suite's time goes into.
"""

import functools
import logging
import re
import tempfile

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

STEPS = 6


def tree(dtype=jnp.float32, seed=0):
  """Parameters or updates with a matrix, a vector, a scalar and a 4-D kernel."""
  rng = np.random.default_rng(seed)
  shapes = {"layer": {"bias": (5,), "kernel": (6, 5)}, "conv": (2, 1, 2, 3), "gain": ()}
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def stacked(count=STEPS, dtype=jnp.float32, seed=1):
  return jax.tree.map(lambda *x: jnp.stack(x), *(tree(dtype, seed + i) for i in range(count)))


def signature(state):
  """Structure, shapes, dtypes and weak types."""
  leaves = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), state)
  return jax.tree.structure(state), jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, tuple))


def assert_all_arrays(state):
  for leaf in jax.tree.leaves(state):
    assert isinstance(leaf, jax.Array), f"{type(leaf)} in the state"
    assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_), leaf.dtype


def assert_identical(a, b):
  """Same structure and dtypes, and the same bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_near(a, b, tolerance=2e-5):
  chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def train(tx, state, params, updates):
  """State and parameters after the stacked updates."""

  def step(carry, update):
    state, params = carry
    update, state = tx.update(update, state, params)
    return (state, optax.apply_updates(params, update)), None

  return jax.lax.scan(step, (state, params), updates)[0]


def updates_pass_untouched(tx):
  def mixed(seed):
    whole = tree(seed=seed)
    return {
      "single": whole["gain"],
      "half": whole["layer"]["bias"].astype(jnp.float16),
      "brain": whole["conv"].astype("bfloat16"),
    }

  update = mixed(3)
  update["single"] = jnp.float32(-0.0)
  update["brain"] = update["brain"].at[0].set(jnp.nan)
  out, _ = jax.jit(tx.update)(update, tx.init(mixed(0)), mixed(0))
  assert_identical(out, update)


def state_keeps_its_signature(tx):
  params = tree()
  state = tx.init(params)
  assert_all_arrays(state)
  assert signature(state) == signature(jax.jit(tx.update)(tree(seed=3), state, params)[1])
  for dtype in (jnp.bfloat16, jnp.float16):
    low = tree(dtype)
    state = jax.eval_shape(tx.init, low)
    assert signature(state) == signature(jax.eval_shape(tx.update, low, state, low)[1])


def state_keeps_its_signature_under_x64(tx):
  with jax.enable_x64(True):
    params = {"double": tree(jnp.float64)["conv"], "single": tree()["gain"]}
    updates = {"double": tree(jnp.float64, 3)["conv"], "single": tree(seed=3)["gain"]}
    state = tx.init(params)
    assert_all_arrays(state)
    out, later = jax.jit(tx.update)(updates, state, params)
    assert signature(state) == signature(later)
    assert_identical(out, updates)


def loops(tx):
  params, updates = tree(), stacked()

  def body(carry):
    i, state, params = carry
    update, state = tx.update(jax.tree.map(lambda u: u[i], updates), state, params)
    return i + 1, state, optax.apply_updates(params, update)

  scanned, _ = train(tx, tx.init(params), params, updates)
  looped = jax.eval_shape(lambda s: jax.lax.while_loop(lambda c: c[0] < STEPS, body, (0, s, params)), tx.init(params))[
    1
  ]
  chosen = lambda s, yes: jax.lax.cond(yes, lambda t: tx.update(params, t, params)[1], lambda t: t, s)  # noqa: E731
  chosen = jax.eval_shape(chosen, tx.init(params), True)
  assert signature(scanned) == signature(looped) == signature(chosen)


def vmap_equals_single_runs(tx):
  seeds = 3
  params = jax.tree.map(lambda *x: jnp.stack(x), *(tree(seed=s) for s in range(seeds)))
  updates = jax.tree.map(lambda *x: jnp.stack(x), *(stacked(seed=10 * s) for s in range(seeds)))
  together = jax.vmap(lambda s, p, u: train(tx, s, p, u)[0])(jax.vmap(tx.init)(params), params, updates)
  for s in range(seeds):
    one, steps = jax.tree.map(lambda x, s=s: x[s], (params, updates))
    assert_near(jax.tree.map(lambda x, s=s: x[s], together), train(tx, tx.init(one), one, steps)[0])


def jit_equals_eager(tx):
  params = {"conv": tree()["conv"]}  # one leaf: each operation is compiled for itself here
  eager = jitted = tx.init(params)
  for i in range(2):
    updates = {"conv": tree(seed=i)["conv"]}
    _, eager = tx.update(updates, eager, params)
    _, jitted = jax.jit(tx.update)(updates, jitted, params)
    params = {"conv": params["conv"] + updates["conv"]}
  assert_near(eager, jitted)


def traces_and_compiles_once(tx):
  params, traces, messages = tree(), [], []

  def counted(*args):
    traces.append(1)
    return tx.update(*args)

  update, state = jax.jit(counted), tx.init(params)
  _, state = update(params, state, params)
  handler = logging.Handler()
  handler.emit = lambda record: messages.append(record.getMessage())
  logging.getLogger("jax").addHandler(handler)
  try:
    with jax.log_compiles():
      for i in range(3):
        _, state = update(tree(seed=i), state, params)
  finally:
    logging.getLogger("jax").removeHandler(handler)
  assert len(traces) == 1
  assert not [m for m in messages if "counted" in m], messages


def holds_no_callback_and_donates(tx):
  params = tree()
  state = tx.init(params)
  leaves = jax.tree.leaves(state)
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
  size = sum(leaf.nbytes for leaf in leaves)
  compiled = jax.jit(tx.update, donate_argnums=1).lower(tree(seed=1), state, params).compile()
  assert not re.search(r'custom_call_target="[^"]*callback', compiled.as_text())
  assert compiled.memory_analysis().alias_size_in_bytes >= size
  jax.block_until_ready(compiled(tree(seed=1), state, params))
  assert all(leaf.is_deleted() for leaf in leaves)


def tolerates_extra_arguments(tx):
  """They reach it through a chain and change nothing in the traced program."""
  params, chained = tree(), optax.chain(optax.scale(1.0), tx)
  state = chained.init(params)
  plain = jax.make_jaxpr(chained.update)(params, state, params)
  extra = jax.make_jaxpr(lambda *a: chained.update(*a, value=jnp.float32(1), loss=2.0, nonsense="x"))
  assert str(extra(params, state, params)) == str(plain)


def abstract_init(tx):
  params = tree()
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  concrete = tx.init(params)
  for abstract in (jax.eval_shape(tx.init, params), jax.eval_shape(tx.init, shapes), tx.init(shapes)):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), concrete)


def empty_trees(tx):
  for empty in ({}, (), None, {"a": None, "b": optax.MaskedNode()}):
    state = jax.eval_shape(tx.init, empty)
    out, later = jax.eval_shape(tx.update, empty, state, {} if empty is None else empty)
    assert jax.tree.structure(out) == jax.tree.structure(empty)
    assert signature(state) == signature(later)
  _, later = jax.jit(tx.update)({}, tx.init({}), {})
  assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(later))


def map_params(tx):
  tx, params = optax.chain(optax.adam(1e-3), tx), tree()
  state = tx.init(params)
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  assert_identical(mapped, state)
  marked = optax.tree.map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x)
  assert_near(marked[0][0].mu, jax.tree.map(lambda x: x + 1, state[0][0].mu))
  assert signature(marked) == signature(state)
  tx.update(params, state, params)  # map_params called init with what is no parameters


def wrappers(tx):
  """Inside optax's wrappers it initialises and scans (which checks the state's signature)."""
  label = {"layer": "watched", "conv": "rest", "gain": "rest"}
  wrapped = {
    "masked": optax.masked(tx, {"layer": True, "conv": False, "gain": True}),
    "partition": optax.partition({"watched": optax.chain(optax.sgd(1.0), tx), "rest": optax.sgd(1.0)}, label),
    "MultiSteps inside": optax.MultiSteps(optax.chain(optax.sgd(1.0), tx), 2),
    "MultiSteps outside": optax.chain(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), tx),
    "inject_hyperparams": optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), tx))(rate=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.chain(optax.sgd(1.0), tx), 3),
    "conditionally_transform": optax.conditionally_transform(tx, lambda step: step % 2 == 0),
    "flatten": optax.flatten(tx),
    "schedule_free": optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), tx), 0.1),
  }
  params, updates = tree(), stacked()
  for name, outer in wrapped.items():
    state = jax.eval_shape(outer.init, params)
    later, _ = jax.eval_shape(lambda s, outer=outer: train(outer, s, params, updates), state)
    assert signature(later) == signature(state), name


def saves_and_resumes(tx):
  """Through orbax and through flax bytes, a resumed run goes on bit for bit."""
  params, updates = tree(), stacked()
  half = jax.tree.map(lambda u: u[: STEPS // 2], updates)
  rest = jax.tree.map(lambda u: u[STEPS // 2 :], updates)
  saved = train(tx, tx.init(params), params, half)
  expected = train(tx, *saved, rest)
  with tempfile.TemporaryDirectory() as folder:
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(f"{folder}/state", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(f"{folder}/state", jax.eval_shape(lambda: (tx.init(params), params)))
  assert_identical(train(tx, *restored, rest), expected)
  again = flax.serialization.from_bytes((tx.init(params), params), flax.serialization.to_bytes(saved))
  assert_identical(train(tx, *jax.tree.map(jnp.asarray, again), rest), expected)


def survives_odd_leaves(tx):
  """None, integer, boolean, float0 and complex leaves."""
  params = {"w": jnp.ones((3, 4)), "none": None, "step": jnp.int32(3), "flag": jnp.array(True), "z": jnp.ones(3) * 1j}
  updates = {**params, "step": np.zeros((), jax.dtypes.float0), "flag": np.zeros((), jax.dtypes.float0)}
  state = tx.init(params)
  out, later = jax.jit(tx.update)(updates, state, params)
  assert out["step"].dtype == jax.dtypes.float0
  assert_identical({k: out[k] for k in "wz"}, {k: updates[k] for k in "wz"})
  assert signature(later) == signature(state)
  assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(later))


def _keeps_shardings(tx, axis_type):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  params = {"kernel": jnp.ones((16, 6)), "bias": jnp.ones((6,))}
  spec = {"kernel": jax.P("data"), "bias": jax.P()}
  place = lambda x: jax.tree.map(lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s)), x, spec)  # noqa: E731
  rng = np.random.default_rng(0)
  steps = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(4)]
  update = jax.jit(tx.update)
  single = tx.init(params)
  with jax.set_mesh(mesh):
    sharded = tx.init(place(params))
  types, layouts = jax.tree.map(jax.typeof, sharded), []
  for step in steps:
    params = jax.tree.map(jnp.add, params, step)
    with jax.set_mesh(mesh):
      out, sharded = update(place(step), sharded, place(params))
    _, single = update(step, single, params)
    layouts.append([(x.sharding, x.ndim) for x in jax.tree.leaves(sharded)])
    assert jax.tree.map(jax.typeof, sharded) == types
    assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, place(step))
  assert all(a.is_equivalent_to(b, ndim) for (a, ndim), (b, _) in zip(layouts[0], layouts[-1], strict=True))
  assert_near(jax.device_get(sharded), jax.device_get(single), 1e-4)


def keeps_shardings(tx):
  """On eight devices the state that comes out is laid out as the one that went in, and says the same."""
  _keeps_shardings(tx, jax.sharding.AxisType.Auto)


def keeps_explicit_shardings(tx):
  """Likewise where shardings are part of the types, which update must not change."""
  _keeps_shardings(tx, jax.sharding.AxisType.Explicit)


PROPERTIES = (
  updates_pass_untouched,
  state_keeps_its_signature,
  state_keeps_its_signature_under_x64,
  loops,
  vmap_equals_single_runs,
  jit_equals_eager,
  traces_and_compiles_once,
  holds_no_callback_and_donates,
  tolerates_extra_arguments,
  abstract_init,
  empty_trees,
  map_params,
  wrappers,
  saves_and_resumes,
  survives_odd_leaves,
  keeps_shardings,
  keeps_explicit_shardings,
)
