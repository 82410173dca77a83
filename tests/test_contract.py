"""The contract table: every variant of the tracker × every property, and broken transformations that must fail it."""

from typing import Any, NamedTuple

import contract
import jax
import jax.numpy as jnp
import optax
import pytest

import sedjax

_by_first = {"groups": lambda path: None if path == "gain" else path.split("/")[0]}
VARIANTS = {
  "count, groups, windows, history": {"window": (3, 4), "sketch": sedjax.sketch.count(64), "history": 2, **_by_first},
  "exact, params, groups, every 2": {"sketch": sedjax.sketch.exact(), "source": "params", "every": 2, **_by_first},
}
# Nearly each of their parts is in the variants above; the rest of the table takes some minutes more.
SLOW_VARIANTS = {
  "count": {"sketch": sedjax.sketch.count(64)},
  "count, params, every 2": {"sketch": sedjax.sketch.count(64), "source": "params", "every": 2},
  "count, every 3, momentum": {"sketch": sedjax.sketch.count(64), "every": 3, "momentum": 0.9},
  "gaussian": {"sketch": sedjax.sketch.gaussian(32)},
  "gaussian, params, groups": {"sketch": sedjax.sketch.gaussian(32), "source": "params", **_by_first},
  "exact": {"sketch": sedjax.sketch.exact()},
  "exact, groups, every 2": {"sketch": sedjax.sketch.exact(), "every": 2, **_by_first},
}
# One transformation a variant, so that what is compiled for one property serves the others.
TRANSFORMATIONS = {
  name: sedjax.track_spectral_edge(**{"window": 3, **options}) for name, options in (VARIANTS | SLOW_VARIANTS).items()
}


@pytest.mark.parametrize("prop", contract.PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
  "variant",
  [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in VARIANTS]
  + [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(name)]) for name in SLOW_VARIANTS],
)
def test_contract(variant, prop):
  prop(TRANSFORMATIONS[variant])


class _ToyState(NamedTuple):
  value: Any


def _toy(init, update):
  return optax.GradientTransformationExtraArgs(init, lambda u, s, p=None, **_: update(u, s, p))


def _norm(tree):
  return jnp.asarray(optax.tree.norm(tree), jnp.float32)


def _zero():
  return jnp.zeros((), jnp.float32)


def _sum(tree):
  return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


@jax.custom_batching.custom_vmap
def _sum_with_a_wrong_rule(x):
  return jnp.sum(x)


@_sum_with_a_wrong_rule.def_vmap
def _(size, _, x):
  return jnp.full(size, jnp.sum(x) / size), True


@jax.tree_util.register_pytree_node_class
class _Unknown:
  """A node that JAX knows and serializers do not."""

  def __init__(self, value):
    self.value = value

  def tree_flatten(self):
    return (self.value,), None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


# What is broken, and the properties that must notice.
BROKEN = {
  "its state changes structure after the first update": (
    _toy(lambda _: _ToyState({}), lambda u, _s, _p: (u, _ToyState({"norm": _norm(u)}))),
    ("state_keeps_its_signature", "loops", "wrappers", "traces_and_compiles_once"),
  ),
  "its updates come back as float32": (
    _toy(
      lambda _: _ToyState(_zero()),
      lambda u, _s, _p: (jax.tree.map(lambda x: x.astype(jnp.float32), u), _ToyState(_norm(u))),
    ),
    ("updates_pass_untouched",),
  ),
  "its init concatenates the leaves": (
    _toy(
      lambda p: _ToyState(jnp.zeros_like(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(p)]))),
      lambda u, _s, _p: (u, _ToyState(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(u)]))),
    ),
    ("empty_trees", "map_params"),
  ),
  "its counter is a Python int": (
    _toy(lambda _: _ToyState(0), lambda u, s, _p: (u, _ToyState(s.value + 1))),
    ("state_keeps_its_signature", "holds_no_callback_and_donates"),
  ),
  "its fields share a buffer": (
    _toy(
      lambda _: (lambda z: _ToyState((z, z)))(_zero()),
      lambda u, _s, _p: (u, _ToyState((_norm(u), 2 * _norm(u)))),
    ),
    ("holds_no_callback_and_donates",),
  ),
  "it takes no extra arguments and reports through the host": (
    optax.GradientTransformation(
      lambda _: _ToyState(_zero()),
      lambda u, s, _p=None: (jax.debug.callback(lambda _: None, _norm(u)), (u, s))[1],
    ),
    ("holds_no_callback_and_donates",),
  ),
  "it adds numbers of any width to its state": (
    _toy(lambda _: _ToyState(_zero()), lambda u, s, _p: (u, _ToyState(s.value + _sum(u)))),
    ("state_keeps_its_signature_under_x64", "survives_odd_leaves"),
  ),
  "it mixes the seeds": (
    _toy(lambda _: _ToyState(_zero()), lambda u, s, _p: (u, _ToyState(s.value + _sum_with_a_wrong_rule(u["conv"])))),
    ("vmap_equals_single_runs",),
  ),
  "it does something else where it is traced": (
    _toy(
      lambda _: _ToyState(_zero()),
      lambda u, s, _p: (u, _ToyState(s.value + isinstance(jax.tree.leaves(u)[0], jax.core.Tracer))),
    ),
    ("jit_equals_eager",),
  ),
  "it takes an argument of its own for one of another's": (
    optax.GradientTransformationExtraArgs(
      lambda _: _ToyState(_zero()), lambda u, s, _p=None, *, value=0.0, **_: (u, _ToyState(s.value + value))
    ),
    ("tolerates_extra_arguments",),
  ),
  "its init reads the parameters": (
    _toy(lambda p: _ToyState(jnp.float32(float(_sum(p)))), lambda u, s, _p: (u, s)),
    ("abstract_init",),
  ),
  "its state cannot be saved": (
    _toy(lambda _: _Unknown(_zero()), lambda u, s, _p: (u, _Unknown(s.value + 1))),
    ("saves_and_resumes",),
  ),
  "it counts devices": (
    _toy(
      lambda _: _ToyState(_zero()),
      lambda u, s, _p: (u, _ToyState(s.value + jax.sharding.get_abstract_mesh().size)),
    ),
    ("keeps_shardings", "keeps_explicit_shardings"),
  ),
}


def test_every_property_can_fail():
  assert {name for _, noticing in BROKEN.values() for name in noticing} == {p.__name__ for p in contract.PROPERTIES}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_contract_catches(fault):
  tx, noticing = BROKEN[fault]
  for prop in contract.PROPERTIES:
    if prop.__name__ in noticing:
      with pytest.raises(Exception):  # noqa: B017, PT011 - each property fails in its own way
        prop(tx)


def test_the_contract_accepts_a_sound_transformation():
  """So that the broken ones are not caught for a reason that has nothing to do with their fault."""
  tx = _toy(lambda _: _ToyState(_zero()), lambda u, s, _p: (u, _ToyState(s.value + 1)))
  for prop in contract.PROPERTIES:
    prop(tx)
