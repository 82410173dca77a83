"""What a tracker adds to the program of a whole training step: no copy of the parameters, and no other numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from conftest import slow

import sedjax
from sedjax import _keep

WIDTH, LAYERS = 512, 6
LEAF_BYTES = 4 * WIDTH**2


def tree(lead=()):
  names = [f"layer{i}" for i in range(LAYERS)]
  return {name: jax.ShapeDtypeStruct((*lead, WIDTH, WIDTH), jnp.float32) for name in names}


def step_of(tx):
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


def compiled_step(step, init, params):
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(init, params), params)
  return lowered.compile(**oracles.AS_USERS_COMPILE)


def copies(compiled, shape):
  """How many arrays of this shape are copied."""
  return len(re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* copy\(", compiled.as_text()))


OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "adamw": lambda: optax.adamw(1e-3)}


@pytest.mark.parametrize("source", ["updates", "params"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_copies_no_parameters(optimizer, source):
  tx = optax.chain(OPTIMIZERS[optimizer](), sedjax.track_spectral_edge(5, source=source, every=20))
  compiled = compiled_step(step_of(tx), tx.init, tree())
  assert copies(compiled, (WIDTH, WIDTH)) == 0
  # Updates that are looked at are stored, once; parameters are not.
  stored = LAYERS * LEAF_BYTES if source == "updates" else 0
  assert compiled.memory_analysis().temp_size_in_bytes <= stored + 4 * 2**20


def test_a_vmapped_step_copies_no_parameters():
  tx = optax.chain(optax.adamw(1e-3), sedjax.track_spectral_edge(5))
  params = tree((3,))
  compiled = compiled_step(jax.vmap(step_of(tx)), jax.vmap(tx.init), params)
  assert copies(compiled, (3, WIDTH, WIDTH)) == 0
  assert compiled.memory_analysis().temp_size_in_bytes <= 3 * (LAYERS * LEAF_BYTES + 4 * 2**20)


def test_a_loop_of_steps_copies_no_parameters():
  tx = optax.chain(optax.adamw(1e-3), sedjax.track_spectral_edge(5))

  def train(params, state, gradients):
    return jax.lax.fori_loop(0, 9, lambda _, carry: step_of(tx)(*carry, gradients), (params, state))

  compiled = compiled_step(train, tx.init, tree())
  assert copies(compiled, (WIDTH, WIDTH)) == 0


def step_with_backward(tx, width):
  """The compiled program of a step of a few layers, of which backward the last comes first."""
  params = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in tree()}

  def loss(params, x):
    return jnp.sum(functools.reduce(lambda x, name: jnp.tanh(x @ params[name]), sorted(params), x))

  step = jax.jit(lambda params, state, x: step_of(tx)(params, state, jax.grad(loss)(params, x)), donate_argnums=(0, 1))
  inputs = jax.ShapeDtypeStruct((4, width), jnp.float32)
  return step.lower(params, jax.eval_shape(tx.init, params), inputs).compile(**oracles.AS_USERS_COMPILE)


def test_a_step_with_its_backward_pass_copies_no_parameters():
  """Without a tracker XLA copies those of all layers but the first, which nothing reads when all gradients are made."""
  adamw = optax.adamw(1e-3)
  without = step_with_backward(adamw, WIDTH)
  compiled = step_with_backward(optax.chain(adamw, sedjax.track_spectral_edge(5)), WIDTH)
  assert copies(without, (WIDTH, WIDTH)) == LAYERS - 1
  assert copies(compiled, (WIDTH, WIDTH)) == 0
  used, used_without = (each.memory_analysis().temp_size_in_bytes for each in (compiled, without))
  assert used <= used_without + _keep._TURNS * LEAF_BYTES + 4 * 2**20


def test_updates_are_summed_when_they_are_made():
  """The last layer's update, which is made first, does not wait for those of the layers before it in the tree."""
  width = 2048  # few of which are summed at a time
  text = step_with_backward(optax.chain(optax.adamw(1e-3), sedjax.track_spectral_edge(5)), width).as_text()
  assert "is_scheduled=true" in text
  lines = text.split("ENTRY ")[1].splitlines()
  made = [i for i, line in enumerate(lines) if " while(" in line and f"f32[{width},{width}]" in line]
  summed = [i for i, line in enumerate(lines) if " fusion(" in line and "_strided_sums" in line]
  assert len(made) == len(summed) == LAYERS
  late = [sum(i < j for i in made) - k for k, j in enumerate(summed, 1)]  # made before the k-th sums, and waiting
  assert max(late) <= 2


def test_updates_that_may_be_made_at_once_are_summed_in_turn():
  """A few MiB of sums at a time, where each update is made of arguments alone."""
  tx = optax.chain(optax.adamw(1e-3), sedjax.track_spectral_edge(5))
  params = {f"layer{i}": jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for i in range(4)}
  update = jax.jit(lambda params, state, gradients: tx.update(gradients, state, params), donate_argnums=1)
  compiled = update.lower(params, jax.eval_shape(tx.init, params), params).compile(**oracles.AS_USERS_COMPILE)
  assert compiled.memory_analysis().temp_size_in_bytes <= 8 * 2**20


def test_ranks():
  """By how much has to be made before, of whichever arguments; the same for what needs nothing of another's."""
  found = []

  def function(x, y):
    first = jnp.sin(x)
    third = jnp.cos(first @ y) + x
    found.append(_keep.ranks_of([third, x, first, 2.0 * y, third * 2, np.ones(3), None]))
    return third

  jax.make_jaxpr(function)(jnp.ones((2, 2)), jnp.ones((2, 2)))
  jax.make_jaxpr(jax.vmap(function))(jnp.ones((3, 2, 2)), jnp.ones((3, 2, 2)))
  function(jnp.ones((2, 2)), jnp.ones((2, 2)))
  assert found == [(2, 0, 1, 1, 3, 0, 0)] * 2 + [(0,) * 7]


def test_what_is_an_argument_is_handed_on_as_it_is():
  """Else a program of the tracker alone would have to make new arrays."""
  tx = sedjax.track_spectral_edge(5)
  jaxpr = jax.make_jaxpr(tx.update)(tree(), jax.eval_shape(tx.init, tree())).jaxpr
  assert jaxpr.outvars[:LAYERS] == jaxpr.invars[:LAYERS]


def bits_of(kind, count=2**16):
  """Arrays of random bits: of NaN of all kinds, infinities, subnormal numbers and zeros of both signs, too."""
  size = jnp.dtype(kind).itemsize
  bits = np.random.default_rng(0).integers(0, 256, size=(count, size), dtype=np.uint8)
  bits[:2] = [[0] * size, [0] * (size - 1) + [128]]
  return jnp.asarray(bits.view(f"u{size}").reshape(-1, 64))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", slow("float16"), "float8_e4m3fn"])
@pytest.mark.parametrize("source", ["updates", "params"])
def test_no_bit_changes(source, kind):
  tx = sedjax.track_spectral_edge(3, source=source)
  bits = bits_of(kind)
  params = dict.fromkeys(("first", "second"), jnp.ones(bits.shape, kind))

  @functools.partial(jax.jit, **oracles.AS_USERS_COMPILE)
  def step(bits, state, params):
    made = {"first": bits, "second": bits[::-1]}  # one after the other
    updates = {name: jax.lax.bitcast_convert_type(each, jnp.dtype(kind)) for name, each in made.items()}
    updates, state = tx.update(updates, state, params)
    return {name: jax.lax.bitcast_convert_type(each, bits.dtype) for name, each in updates.items()}, state

  passed, _ = step(bits, tx.init(params), params)
  np.testing.assert_array_equal(passed["first"], bits)
  np.testing.assert_array_equal(passed["second"], bits[::-1])


@pytest.mark.parametrize("source", ["updates", "params"])
def test_floats_of_half_a_byte(source):
  tx = sedjax.track_spectral_edge(3, source=source)
  numbers = np.random.default_rng(0).normal(size=(100, 80)).astype(np.float32)
  update = jax.jit(lambda x: {"w": x.astype("float4_e2m1fn")})
  passed, _ = jax.jit(lambda x, s, p: tx.update(update(x), s, p))(numbers, tx.init(update(numbers)), update(numbers))
  assert passed["w"].dtype == jnp.float4_e2m1fn
  np.testing.assert_array_equal(*(tree["w"].astype(np.float32) for tree in (passed, update(numbers))))


def assert_same_seed(states, seed, expected, atol):
  """The state of one seed of several, whole, in which something has been seen."""
  for got, wanted in zip(jax.tree.leaves(states), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got[seed], wanted, atol=atol, rtol=1e-4)
  tracker = expected[-1].trackers["spectral_edge"]
  assert np.any(tracker.rows if isinstance(tracker.base, tuple) else tracker.base)


@pytest.mark.parametrize("source", ["updates", "params"])
def test_vmapped_steps_that_share_a_state(source):
  """Under vmap the branches of `every` are computed for all, from what some of the seeds share."""
  tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(3, source=source, every=2))
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 100, 80)), jnp.float32)}
  state = tx.init({"w": params["w"][0]})
  for i in range(2):
    _, state = jax.jit(tx.update)({"w": params["w"][0]}, state, {"w": (3 + i) * params["w"][0]})
  _, states = jax.jit(jax.vmap(tx.update, in_axes=(0, None, 0)))(params, state, params)
  for seed in range(3):
    own = {"w": params["w"][seed]}
    _, expected = jax.jit(tx.update)(own, state, own)
    assert_same_seed(states, seed, expected, 1e-4)


@pytest.mark.parametrize(
  ("source", "every", "dtype"),
  [
    ("updates", 1, "float64"),
    ("updates", 2, "float32"),
    ("params", 2, "float64"),
    slow("updates", 1, "float32"),
    slow("updates", 2, "float64"),
    slow("params", 1, "float32"),
    slow("params", 1, "float64"),
    slow("params", 2, "float32"),
  ],
)
def test_vmapped_steps_with_64_bits(source, every, dtype):
  tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(3, source=source, every=every))
  with jax.enable_x64(True):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 100, 80)), dtype)}
    _, states = jax.jit(jax.vmap(tx.update))(params, jax.vmap(tx.init)(params), params)
    for seed in range(2):
      own = {"w": params["w"][seed]}
      _, expected = jax.jit(tx.update)(own, tx.init(own), own)
      assert_same_seed(states, seed, expected, 1e-4)


@pytest.mark.parametrize("sketch", [sedjax.sketch.count(512), sedjax.sketch.exact()], ids=["count", "exact"])
def test_no_seed_at_all(sketch):
  tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(3, sketch=sketch))
  params = dict.fromkeys("vw", jnp.zeros((0, 100, 80)))
  one = dict.fromkeys("vw", jnp.zeros((100, 80)))
  state = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), jax.eval_shape(tx.init, one))

  def update(params, state):
    return tx.update({"v": params["v"], "w": jnp.sin(params["w"])}, state, params)

  updates, _ = jax.jit(jax.vmap(update))(params, state)
  assert updates["w"].shape == (0, 100, 80)


@pytest.mark.parametrize("source", ["updates", "params"])
@pytest.mark.parametrize("remat", [False, slow(True)])
def test_second_derivatives_pass_through_a_scan(source, remat):
  """There JAX forgets the rule of a `custom_jvp`."""
  start = {"w": jnp.linspace(-1, 1, 6000).reshape(60, 100)}

  def curvature(tx):
    def loss_after(rate):
      def body(carry, _):
        params, state = carry
        gradients = jax.grad(lambda p: jnp.sum((p["w"] - 0.3) ** 4))(params)
        updates, state = tx.update(gradients, state, params)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), None

      steps = jax.checkpoint(body) if remat else body
      (params, _), _ = jax.lax.scan(steps, (start, tx.init(start)), None, 3)
      return jnp.sum(params["w"] ** 2)

    return jax.jit(jax.grad(jax.grad(loss_after)))(0.01), jax.jit(jax.hessian(loss_after))(0.01)

  tracked = curvature(optax.chain(optax.scale(1.5), sedjax.track_spectral_edge(3, source=source)))
  np.testing.assert_allclose(tracked, curvature(optax.scale(1.5)), rtol=1e-5)


@pytest.mark.parametrize("source", ["updates", "params"])
def test_derivatives_pass(source):
  """Forwards and backwards, of what an optimizer makes within the same program."""
  tx = optax.chain(optax.sgd(0.5), sedjax.track_spectral_edge(3, source=source))
  gradients = jnp.arange(6000.0).reshape(60, 100)
  state = tx.init({"v": gradients, "w": gradients})

  def summed(gradients):
    gradients = {"v": gradients, "w": gradients[::-1] + 1}  # one after the other
    updates, _ = tx.update(gradients, state, gradients)
    return (updates["v"] ** 2 + updates["w"] ** 2).sum()

  expected = 0.5 * gradients + 0.5 * (gradients + 1)
  np.testing.assert_allclose(jax.jit(jax.grad(summed))(gradients), expected)
  _, tangent = jax.jit(lambda x: jax.jvp(summed, (x,), (jnp.ones_like(x),)))(gradients)
  np.testing.assert_allclose(tangent, expected.sum(), rtol=1e-6)


@pytest.mark.parametrize(
  ("kind", "source"),
  [("Explicit", "updates"), ("Auto", "params"), slow("Explicit", "params"), slow("Auto", "updates")],
)
def test_sharded_steps_report_what_one_device_does(kind, source):
  tx = optax.chain(optax.adamw(1e-2), sedjax.track_spectral_edge(3, source=source, sketch=sedjax.sketch.count(512)))
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType[kind],) * 2)
  rng = np.random.default_rng(0)
  params = {"a": rng.normal(size=(128, 96)), "b": rng.normal(size=(96, 64)), "c": rng.normal(size=(64,))}
  params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
  specs = {"a": jax.P("data", "model"), "b": jax.P(None, "model"), "c": jax.P()}

  def trained(params):
    def loss(params, x):
      return jnp.square(jnp.tanh(x * params["a"]).sum(1)).sum() + sum(
        jnp.square(leaf).sum() for leaf in (params["b"], params["c"])
      )

    @jax.jit
    def step(params, state, x):
      return step_of(tx)(params, state, jax.grad(loss)(params, x))

    state, path = tx.init(params), [jax.device_get(params)]
    for i in range(7):
      params, state = step(params, state, jnp.float32(1 + i % 3))
      path.append(jax.device_get(params))
    return path, sedjax.get_report(state)

  expected_path, expected = trained(jax.tree.map(jnp.asarray, params))
  with jax.set_mesh(mesh):
    placed = {name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    path, got = trained(placed)
  for name, leaf in path[-1].items():
    np.testing.assert_allclose(leaf, expected_path[-1][name], rtol=1e-5, atol=1e-6)
  if source == "params":
    # Its rows are known to the last digits of parameters, in which two programs differ: one device sees the same path.
    state = tx.init(params)
    for before in path[:-1]:
      _, state = tx.update(before, state, before)
    expected = sedjax.get_report(state)
  np.testing.assert_allclose(got.singular_values, expected.singular_values, rtol=1e-5 if source == "params" else 1e-4)
  assert got.count == expected.count > 3


@pytest.mark.parametrize(
  ("kind", "source"),
  [("Explicit", "params"), ("Auto", "updates"), slow("Explicit", "updates"), slow("Auto", "params")],
)
def test_vmapped_steps_with_a_seed_on_each_device(kind, source):
  tx = optax.chain(optax.adamw(1e-2), sedjax.track_spectral_edge(3, source=source, sketch=sedjax.sketch.count(512)))
  mesh = jax.make_mesh((8,), ("seed",), axis_types=(jax.sharding.AxisType[kind],))
  params, *gradients = ({"w": x} for x in np.random.default_rng(0).normal(size=(8, 8, 96, 64)).astype(np.float32))
  step = jax.jit(jax.vmap(step_of(tx)))

  def trained(put):
    now = jax.tree.map(put, params)
    state = jax.tree.map(put, jax.vmap(tx.init)(now))
    for gradient in gradients:
      now, state = step(now, state, jax.tree.map(put, gradient))
    return jax.device_get(sedjax.get_report(state))

  expected = trained(jnp.asarray)
  with jax.set_mesh(mesh):
    got = trained(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("seed"))))
  np.testing.assert_allclose(got.singular_values, expected.singular_values, rtol=1e-4)
  assert (got.count == expected.count).all()
