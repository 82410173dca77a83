"""Addition modulo 97, the small transformer that groks it, and one training step: what `grokking.py` runs.

Everything here is for one run, a `Lane`; `jax.vmap` over lanes trains many seeds at once, each with a split, an
initialization, batches and a weight decay of its own, as `make_interval` does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import sedjax

MODULUS = 97
PAIRS = MODULUS**2
WIDTH, HEADS, HIDDEN, LAYERS = 128, 4, 256, 2
PARAMETERS = 290_401  # of the model in arXiv 2602.16746
MOMENTUM = 0.9  # β₁ of AdamW, which the tracker's null must know


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a run is trained and watched.

  Attributes:
    train_fraction: share of the 97² pairs that is trained on; the others are the test set.
    batch_size: pairs in a batch, drawn with replacement.
    learning_rate: of AdamW; β = (0.9, 0.98) and clipping of the gradient at norm 1 are the same for all settings.
    max_steps: where a run that does not grok ends.
    eval_every: steps between two evaluations on all pairs.
    row_every: steps summed into one row of the window; divides `eval_every`.
  """

  train_fraction: float
  batch_size: int
  learning_rate: float
  max_steps: int
  eval_every: int
  row_every: int

  @property
  def train_pairs(self) -> int:
    return round(self.train_fraction * PAIRS)


PAPER = Settings(0.5, 512, 1e-3, 200_000, 100, 20)


class Lane(NamedTuple):
  """One run: arrays only, so that it can be vmapped, scanned and donated."""

  params: Any
  opt_state: Any
  order: jax.Array  # int32[97²], the pairs shuffled: the first `train_pairs` are trained on
  seed: jax.Array  # int32[]
  decay: jax.Array  # float32[], weight decay


def _uniform(bound: float) -> Any:
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _dense(features: int, inputs: int) -> nn.Dense:
  """A linear layer as PyTorch starts it: weights and bias within ±1/sqrt(inputs)."""
  return nn.Dense(features, kernel_init=_uniform(inputs**-0.5), bias_init=_uniform(inputs**-0.5))


class Block(nn.Module):
  """Pre-norm attention and MLP; the sequence that leaves may be shorter than the one that enters."""

  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # PyTorch draws the joint projection of queries, keys and values by Xavier over its 4·WIDTH inputs and outputs.
    joint = nn.Dense(3 * WIDTH, kernel_init=_uniform((6 / (4 * WIDTH)) ** 0.5), name="qkv")(nn.LayerNorm(1e-5)(x))
    heads = joint.reshape(*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
    query, key, value = heads[:, : self.outputs, 0], heads[:, :, 1], heads[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (WIDTH // HEADS) ** 0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(-1, self.outputs, WIDTH)
    x = x[:, : self.outputs] + nn.Dense(WIDTH, kernel_init=_uniform(WIDTH**-0.5), name="out")(mixed)
    hidden = jax.nn.gelu(_dense(HIDDEN, WIDTH)(nn.LayerNorm(1e-5)(x)), approximate=False)
    return x + _dense(WIDTH, HIDDEN)(hidden)


class Model(nn.Module):
  """int32[batch, 2] pairs to float32[batch, 97] logits, read at the first token."""

  @nn.compact
  def __call__(self, pairs: jax.Array) -> jax.Array:
    normal = nn.initializers.normal
    x = nn.Embed(MODULUS, WIDTH, embedding_init=normal(1.0), name="tokens")(pairs)
    x = x + self.param("positions", normal(WIDTH**-0.5), (2, WIDTH))
    for layer in range(LAYERS):
      # Only the first token of the last layer is read, so only that is computed.
      x = Block(outputs=1 if layer == LAYERS - 1 else 2)(x)
    return _dense(MODULUS, WIDTH)(nn.LayerNorm(1e-5)(x[:, 0]))


def optimizer(settings: Settings, tracker: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
  """Clipped AdamW with `decay` (may be traced) on all parameters, then the tracker."""
  adamw = optax.adamw(settings.learning_rate, b1=MOMENTUM, b2=0.98, weight_decay=decay)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw, tracker)


def init(settings: Settings, tracker: Any, seed: Any, decay: Any) -> Lane:
  """A lane before its first step; `seed` and `decay` may be traced scalars."""
  split_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
  params = Model().init(model_key, jnp.zeros((1, 2), jnp.int32))["params"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == PARAMETERS, f"the model has {count} parameters instead of {PARAMETERS}"
  order = jax.random.permutation(split_key, jnp.arange(PAIRS, dtype=jnp.int32))
  opt_state = optimizer(settings, tracker, decay).init(params)
  return Lane(params, opt_state, order, jnp.asarray(seed, jnp.int32), jnp.asarray(decay, jnp.float32))


def _logits_and_labels(params: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
  first, second = index // MODULUS, index % MODULUS
  return Model().apply({"params": params}, jnp.stack([first, second], -1)), (first + second) % MODULUS


def train_step(settings: Settings, tracker: Any, lane: Lane, step: Any) -> tuple[Lane, Any]:
  """One step; `step` counts the steps before it and must not be vmapped, so that rows are pushed only when due.

  Returns:
    The next lane, and the updates that were added to the parameters.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(lane.seed), 1), step)
  index = lane.order[jax.random.randint(key, (settings.batch_size,), 0, settings.train_pairs)]

  def loss(params: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(*_logits_and_labels(params, index)).mean()

  tx = optimizer(settings, tracker, lane.decay)
  updates, opt_state = tx.update(jax.grad(loss)(lane.params), lane.opt_state, lane.params, sed_step=step)
  return lane._replace(params=optax.apply_updates(lane.params, updates), opt_state=opt_state), updates


def evaluate(settings: Settings, lane: Lane) -> tuple[jax.Array, jax.Array]:
  """Accuracy on the whole training set and on the whole test set."""

  def correct_of(index: jax.Array) -> jax.Array:
    logits, labels = _logits_and_labels(lane.params, index)
    return (logits.argmax(-1) == labels).astype(jnp.float32)

  # In batches: faster than all pairs at once, whose activations outgrow the processor's cache.
  correct = jax.lax.map(correct_of, lane.order.reshape(MODULUS, MODULUS)).reshape(-1)
  return correct[: settings.train_pairs].mean(), correct[settings.train_pairs :].mean()


def make_interval(settings: Settings, tracker: Any) -> Any:
  """The jitted function that trains all lanes up to their next evaluation; returns reports, train and test accuracy."""
  one_run = functools.partial(train_step, settings, tracker)

  def one_step(lanes: Lane, step: jax.Array) -> tuple[Lane, None]:
    # The step is not mapped over lanes: rows are then pushed by a real branch, not computed and thrown away.
    return jax.vmap(one_run, in_axes=(0, None))(lanes, step)[0], None

  def one_row(lanes: Lane, first: jax.Array) -> tuple[Lane, sedjax.Report]:
    lanes, _ = jax.lax.scan(one_step, lanes, first + jnp.arange(settings.row_every, dtype=jnp.int32))
    return lanes, sedjax.get_reports(lanes.opt_state)

  @functools.partial(jax.jit, donate_argnums=0)
  def interval(lanes: Lane, start: jax.Array) -> tuple[Lane, Any]:
    firsts = start + jnp.arange(0, settings.eval_every, settings.row_every, dtype=jnp.int32)
    lanes, reports = jax.lax.scan(one_row, lanes, firsts)
    return lanes, (reports, *jax.vmap(functools.partial(evaluate, settings))(lanes))

  return interval
