"""Where a training state keeps the parameters, in trees and in flat names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Keys under which training scripts keep the parameters beside an optimizer's state.
_MODEL_KEYS = ("params", "model", "model_state_dict", "state_dict")
_MODULE_KEYS = ("net", "network", "module")  # which modules have, too
_TRAINING = re.compile(r"opt|sched|step|epoch|iter|rng|loss|scaler|stats")
# A model may have any prefix, and only what no module is called tells: an optimizer's state, alone or of one of several
# models, its moments, and, in front, averages of parameters and running statistics.
_STATE = re.compile(r"(^|_)(optim(izer)?s?|opt_states?)(_|$|[A-Z0-9])")
_OPT = re.compile(r"(^|_)opt(_|$|[A-Z0-9])")  # of an optimizer only where its moments follow
_TORCH_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_BESIDE = re.compile(r"ema_(model|net|params|weights|state(_dict)?)|(model|net|params|weights)_ema|batch_stats")
_BY_NAME = "outside of the model, as its name says"
_MOMENTS = {"mu", "nu", "m", "v", "trace", "momentum", "velocity", "state", "inner_state"}


def flatten(tree: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Keys and leaves of nested dicts and lists, in their order."""
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from flatten(value, (*names, str(key)))
  elif is_list(tree):
    for i, value in enumerate(tree):
      yield from flatten(value, (*names, str(i)))
  elif names:
    yield names, tree


def is_list(tree: Any) -> bool:
  """Whether a node has children by number; metadata of arrays may be tuples, too."""
  return isinstance(tree, list | tuple) and not hasattr(tree, "shape")


def model_keys(tree: Any, is_tensor: Any, anywhere: bool) -> tuple[str, ...] | None:
  """The keys under which a training state keeps the parameters; None where the tree is the parameters.

  Those are under one of the usual names, beside which something belongs to training. Without it a submodule may have
  the name, unless it is "params", or `anywhere` is True, there are no tensors beside it, and modules seldom have it.
  """
  if not isinstance(tree, Mapping):
    return None
  inner = {str(key): value for key, value in tree.items() if isinstance(value, Mapping)}
  full = [key for key, value in inner.items() if any(is_tensor(x) for _, x in flatten(value))]
  for key in (*_MODEL_KEYS, *_MODULE_KEYS):
    if key in full:
      alone = anywhere and not any(map(is_tensor, tree.values())) and (key in _MODEL_KEYS or full == [key])
      others = ((str(other), value) for other, value in tree.items() if other != key)
      if alone or key == "params" or any(_shows_training(other, value, is_tensor) for other, value in others):
        return (key,)
  if len(inner) == 1:
    ((key, only),) = inner.items()
    found = model_keys(only, is_tensor, False)
    return None if found is None else (key, *found)
  return None


def _shows_training(key: str, value: Any, is_tensor: Any) -> bool:
  """Whether what lies beside a model belongs to training: modules may be named so, too, but have other tensors."""
  if not _TRAINING.search(key):
    return False
  held = [names for names, leaf in flatten(value, (key,)) if len(names) > 1 and is_tensor(leaf)]
  return not held or any(map(_is_state, held))


def within(names: tuple[str, ...], inside: tuple[str, ...] | None) -> tuple[tuple[str, ...], str]:
  """A tensor's names within the model, or all of them and why it is not one of the model."""
  if inside is not None and names[: len(inside)] != inside:
    return names, f"outside of {'/'.join(inside)!r}"
  return names[len(inside or ()) :], ""


def model_names(names: Collection[tuple[str, ...]], joined: bool) -> tuple[tuple[str, ...], dict[tuple[str, ...], str]]:
  """Of flat names, by components, the prefix of the model's, and of others why they are not of the model.

  Args:
    names: of all tensors.
    joined: whether they are made of a tree's keys, where "params" is no module.
  """
  state = [name for name in names if _is_state(name)]
  averages = [name for name in names if state and name[0] == "ema" and len(name) > 1]  # else it may be a module
  outside = dict.fromkeys(state + averages, _BY_NAME)
  tree: dict[str, Any] = {}
  for name in names:
    node = tree
    for part in name[:-1]:
      if not isinstance(node.get(part), dict):
        node[part] = {}
      node = node[part]
    node.setdefault(name[-1], None)
  inside = model_keys(tree, lambda leaf: leaf is None, anywhere=False) or ()
  if inside:
    others = [name for name in names if name[: len(inside)] != inside and name not in outside]
    params = inside[-1] == "params" and (joined or outside)
    if params or (outside and all(_TRAINING.search(name[min(len(inside), len(name)) - 1]) for name in others)):
      return inside, outside | dict.fromkeys(others, f"outside of {'/'.join(inside)!r}")
  return (), outside


def _is_state(name: tuple[str, ...]) -> bool:
  if any(map(_STATE.search, name[:-1])) or not _TORCH_MOMENTS.isdisjoint(name):
    return len(name) > 1
  for i, part in enumerate(name[:-1]):
    after = next((other for other in name[i + 1 :] if not other.isdigit()), "")
    if _OPT.search(part) and after in _MOMENTS:
      return True
  return len(name) > 1 and _BESIDE.fullmatch(name[0]) is not None
