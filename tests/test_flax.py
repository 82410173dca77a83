"""Flax's two ways to hold parameters, and plain dicts: the same rows, and reports that can be found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import slow
from flax import linen, nnx
from flax.training.train_state import TrainState

import sedjax

X = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)


def loss_of(apply):
  return lambda params, x: jnp.mean(apply(params, x) ** 2)


def transformation(sketch):
  return optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(3, sketch=sketch))


def plain_dict(sketch, kernel, bias):
  tx, params = transformation(sketch), {"kernel": kernel, "bias": bias}
  state = tx.init(params)
  gradient = jax.jit(jax.grad(loss_of(lambda p, x: x @ p["kernel"] + p["bias"])))
  for x in X:
    updates, state = jax.jit(tx.update)(gradient(params, x), state, params)
    params = optax.apply_updates(params, updates)
  return state


def linen_train_state(sketch, kernel, bias):
  model = linen.Dense(4)
  variables = {"params": {"kernel": kernel, "bias": bias}}  # whole variables, with their first "params"
  state = TrainState.create(apply_fn=model.apply, params=variables, tx=transformation(sketch))
  for x in X:
    state = state.apply_gradients(grads=jax.jit(jax.grad(loss_of(model.apply)))(state.params, x))
  return state


def nnx_optimizer(sketch, kernel, bias):
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  model.kernel, model.bias = nnx.Param(kernel), nnx.Param(bias)
  optimizer = nnx.Optimizer(model, transformation(sketch), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

  for x in X:
    step(model, optimizer, x)
  return optimizer.opt_state


@pytest.mark.parametrize(
  "sketch",
  [sedjax.sketch.count(64), slow(sedjax.sketch.exact())],
  ids=["count", "exact"],
)
@pytest.mark.parametrize("train", [linen_train_state, nnx_optimizer])
def test_same_rows_as_a_plain_dict(train, sketch):
  kernel, bias = jnp.asarray(X[0, :3, :].repeat(2, 1)[:, :4]), jnp.arange(4.0)
  expected = sedjax.get_report(plain_dict(sketch, kernel, bias))
  report = sedjax.get_report(train(sketch, kernel, bias))
  assert int(report.count) == len(X)
  np.testing.assert_allclose(report.singular_values[:2], expected.singular_values[:2], rtol=1e-4)
  np.testing.assert_allclose(report.last_update_norm, expected.last_update_norm, rtol=1e-5)
