"""The analysis of saved checkpoints: readers, selection, the numbers, interruptions, and bad input."""

import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import strategies

import sedjax
from sedjax import (
  _compile,
  _count,
  _leaves,
  _npz,
  _reader,
  _readers,
  _safetensors,
  _selection,
  _store,
  _streams,
  _strided,
  _torch,
  _training,
  checkpoints,
)
from sedjax.__main__ import main
from sedjax._null import row_covariance
from sedjax._reports import group_names, identity
from sedjax._series import Entry, find_series
from sedjax._types import Report
from sedjax.record import Recorder, open_record, to_dataset

safetensors = pytest.importorskip("safetensors.numpy")
EVERY, COUNT = 5, 9
SHAPES = {"block_0/attn/kernel": (96, 40), "block_0/attn/bias": (40,), "emb": (130, 24), "head/kernel": (24, 17)}
GROUPS = {"attn": "attention", "^emb": "embedding"}
FIELDS = Report._fields


def walk(count=COUNT, seed=0):
  """Parameters at every checkpoint: a drift in two directions over noise."""
  rng = np.random.default_rng(seed)
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  ways = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(2)]
  series = []
  for i in range(count):
    series.append(params)
    params = {
      name: (x + 1e-2 * (3 * ways[0][name] + np.cos(i) * ways[1][name] + 0.3 * rng.normal(size=x.shape))).astype("f4")
      for name, x in params.items()
    }
  return series


def write(folder, series, save=lambda path, params: np.savez(path, **params), suffix=".npz"):
  folder.mkdir(parents=True, exist_ok=True)
  for i, params in enumerate(series):
    save(folder / f"step_{i * EVERY}{suffix}", params)
  return str(folder / f"step_*{suffix}")


def assert_same(a, b, rtol=0.0):
  for name in FIELDS:
    np.testing.assert_allclose(a[name].values, b[name].values, rtol=rtol, atol=rtol, err_msg=name)


def dotted(params):
  return {name.replace("/", "."): x for name, x in params.items()}


def save_sharded(path, params):
  path.mkdir()
  names = list(dotted(params))
  where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
  for shard in set(where.values()):
    safetensors.save_file({n: dotted(params)[n] for n in names if where[n] == shard}, path / shard)
  (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def save_orbax(path, params):
  import orbax.checkpoint as ocp

  tree = {"params": {}, "opt_state": [{"mu": jnp.ones(3)}], "step": 3}
  for name, x in params.items():
    at = tree["params"]
    for key in name.split("/")[:-1]:
      at = at.setdefault(key, {})
    at[name.split("/")[-1]] = jnp.asarray(x)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), tree)


def save_torch(path, params):
  torch = pytest.importorskip("torch")
  state = {f"module._orig_mod.{name}": torch.tensor(x) for name, x in dotted(params).items()}
  torch.save({"model_state_dict": state, "optimizer": {"mu": torch.ones(3)}, "epoch": 3}, path)


FORMATS = {
  "safetensors": (lambda path, params: safetensors.save_file(dotted(params), path), ".safetensors"),
  "sharded": (save_sharded, ""),
  "orbax": (save_orbax, ""),
  "torch": (save_torch, ".pt"),
  "compressed": (lambda path, params: np.savez_compressed(path, **params), ".npz"),
  "fortran": (lambda path, params: np.savez(path, **{n: np.asfortranarray(x) for n, x in params.items()}), ".npz"),
}


@pytest.fixture(scope="module")
def series():
  return walk()


@pytest.fixture(scope="module")
def files(tmp_path_factory, series):
  return write(tmp_path_factory.mktemp("npz"), series)


@pytest.fixture(scope="module")
def record(files):
  return checkpoints.analyze(files, window=(3, 5), groups=GROUPS)


@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_give_one_record(kind, tmp_path, series, record):
  found = checkpoints.analyze(write(tmp_path / "a", series, *FORMATS[kind]), window=(3, 5), groups=GROUPS)
  assert_same(found, record)
  assert found.step.values.tolist() == [i * EVERY for i in range(1, COUNT)]
  assert found.group.values.tolist() == ["all", "attention", "embedding", "rest"]
  assert record.attrs["parameters_taken"].splitlines()[0] == "block_0/attn/bias [40]: group attention"
  if kind in ("orbax", "torch"):
    assert "outside of" in found.attrs["parameters_left_out"]


@pytest.mark.parametrize("kind", ["safetensors", "torch", "orbax"])
def test_exact_reads_every_format(kind, tmp_path, series, files, monkeypatch):
  monkeypatch.setattr("sedjax._exact._EXACT_BYTES", 2**17)  # several chunks a tensor
  exact = sedjax.sketch.exact()
  found = checkpoints.analyze(write(tmp_path / "a", series, *FORMATS[kind]), window=5, sketch=exact)
  assert_same(found, checkpoints.analyze(files, window=5, sketch=exact), rtol=1e-6)


def live(series, **options):
  """The record of a live tracker over the same run."""
  tx = sedjax.track_spectral_edge(source="params", every=EVERY, **options)
  state, reports = tx.init(series[0]), []
  update = jax.jit(lambda state, params, step: tx.update(params, state, params, sed_step=step)[1])
  for i, params in enumerate(series):
    state = update(state, params, i * EVERY)
    for late in range(1, EVERY):
      state = update(state, params, i * EVERY + late)
    if i:
      reports.append(sedjax.get_reports(state))
  stacked = jax.tree.map(lambda *fields: np.stack(fields), *reports)
  labels = dict.fromkeys(map(options["groups"], sorted(series[0]))) if "groups" in options else ()
  groups = ("all", *labels)
  return to_dataset(stacked, steps=[i * EVERY for i in range(1, COUNT)], windows=(3, 5), groups=groups)


def group_of(path):
  return "attention" if "attn" in path else "embedding" if path.startswith("emb") else "rest"


def test_agrees_with_a_live_tracker(series, record):
  """Within c·ε·‖θ‖/‖δ‖: here ‖θ‖ is 30 times ‖δ‖."""
  assert_same(record, live(series, window=(3, 5), groups=group_of), rtol=30 * 2.0**-22)


@pytest.mark.parametrize("sketch", [sedjax.sketch.count(1024, seed=3), sedjax.sketch.gaussian(64)])
def test_agrees_with_a_live_tracker_of_another_sketch(files, series, sketch):
  found = checkpoints.analyze(files, window=(3, 5), sketch=sketch)
  gaussian = isinstance(sketch, sedjax.sketch.Gaussian)
  # Gaussian weights are no multiples of a grid: their sums round relative to the parameters.
  assert_same(found, live(series, window=(3, 5), sketch=sketch), rtol=3e-3 if gaussian else 1e-5)


def test_settings_of_jax_change_nothing(files, record):
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
    jax.transfer_guard("disallow"),
    jax.debug_nans(True),
    jax.disable_jit(),
  ):
    assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_an_extra_that_is_missing_is_named_before_anything_is_read(files, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "xarray", None)
  assert main(["analyze", files, "-o", "run.nc"]) == 1
  assert capsys.readouterr().err == "sedjax.record needs xarray and h5netcdf: pip install 'sedjax[io]'.\n"


def test_npz_files_are_read_on_without_a_seek(files, record, monkeypatch):
  """After which newer zipfile modules compare no checksum."""

  def forgetful(*_):
    raise AssertionError

  monkeypatch.setattr("zipfile.ZipExtFile.seek", forgetful)
  assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_files_beside_the_record_are_the_users(tmp_path, files):
  out = tmp_path / "run.nc"
  others = [tmp_path / f"run.nc{end}" for end in (".new", ".partial", ".old", "~")]
  for other in others:
    other.write_text("mine")
  checkpoints.analyze(files, window=3, out=out)
  with Recorder(out) as recorder:
    recorder.log(3, loss=0.5)
  assert [other.read_text() for other in others] == ["mine"] * len(others)
  assert set(tmp_path.iterdir()) == {out, *others}


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()], ids=["count", "exact"])
def test_small_groups_of_equal_sizes_agree_with_a_live_tracker(tmp_path, sketch):
  """Signs seem to be three times as many as they are; both know how many there are."""
  rng = np.random.default_rng(0)
  series = [{"w": np.zeros((16, 48), np.float32), "v": np.zeros((70, 60), np.float32)}]
  for _ in range(COUNT - 1):
    moves = {name: rng.choice([-1.0, 1.0], x.shape) for name, x in series[0].items()}
    series.append({name: (x + moves[name]).astype(np.float32) for name, x in series[-1].items()})
  files = write(tmp_path / "a", series)
  options = {"window": (3, 5), "sketch": sketch}
  found = checkpoints.analyze(files, groups={"w": "attention", "v": "embedding"}, **options)
  expected = live(series, groups=lambda path: {"w": "attention", "v": "embedding"}[path], **options)
  assert_same(found, expected, rtol=1e-5)
  assert found.effective_dim.sel(group="attention").max() < 16 * 48 + 3 * np.sqrt(16 * 48) + 1


def differences(series, names=tuple(SHAPES)):
  flat = [np.concatenate([params[name].ravel().astype(np.float64) for name in names]) for params in series]
  return np.diff(flat, axis=0)


def test_exact_mode_is_that_of_float64(files, series, monkeypatch):
  monkeypatch.setattr("sedjax._exact.REPORT_OPTIONS", {})
  found = checkpoints.analyze(files, window=(3, 5), groups=GROUPS, sketch=sedjax.sketch.exact())
  for group, names in {"all": tuple(SHAPES), "embedding": ("emb",)}.items():
    rows = differences(series, names)
    for last in range(5, COUNT):
      expected = oracles.spectrum(rows[last - 5 : last])
      report = found.sel(group=group, window=5, step=last * EVERY, seed=0)
      for name in ("singular_values", "ratios", "drift_speed", "pc1_fraction", "alignment", "last_update_norm"):
        values = report[name].values[: len(np.atleast_1d(expected[name]))] if report[name].ndim else report[name].values
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, err_msg=name)


def test_exact_mode_agrees_with_a_live_exact_tracker(files, series):
  found = checkpoints.analyze(files, window=(3, 5), sketch=sedjax.sketch.exact())
  expected = live(series, window=(3, 5), sketch=sedjax.sketch.exact())
  assert_same(found, expected, rtol=1e-4)
  np.testing.assert_allclose(found.effective_dim, expected.effective_dim, rtol=1e-4)


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()])
def test_long_series_and_identical_checkpoints(tmp_path, sketch):
  series = walk(31)
  series[7] = series[6]
  series[20] = series[19] = series[18]
  found = checkpoints.analyze(write(tmp_path, series), window=5, sketch=sketch)
  rows = differences(series)
  rows = rows[np.any(rows != 0, axis=1)]
  assert found.skipped_zero.values.ravel()[-1] == 3
  assert found["count"].values.ravel()[-1] == len(rows)
  expected = oracles.spectrum(rows[-5:])["singular_values"]
  np.testing.assert_allclose(found.singular_values.values[-1, 0, 0, 0], expected, rtol=1e-4 if sketch else 0.05)


def test_wide_and_narrow_dtypes(tmp_path):
  """float64 keeps what float32 would round; complex and bfloat16 are read as they are."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(50, 40))
  series = [{"w": base + 1e-7 * i * rng.normal(size=base.shape), "z": base + 1j * i * base} for i in range(5)]
  found = checkpoints.analyze(write(tmp_path / "wide", series), window=3, groups={"^w$": "w", "z": "z"})
  rows = np.diff([params["w"].ravel() for params in series], axis=0)
  norms = found.last_update_norm.sel(group="w").values.ravel()
  np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=0.05)
  torch = pytest.importorskip("torch")

  def save(path, params):
    torch.save({"w": torch.tensor(params["w"]).to(torch.bfloat16)}, path)

  series = [{"w": base + i * rng.normal(size=base.shape)} for i in range(5)]
  narrow = checkpoints.analyze(write(tmp_path / "narrow", series, save, ".pt"), window=3)
  rounded = [{"w": np.asarray(jnp.asarray(params["w"], jnp.bfloat16), np.float32)} for params in series]
  assert_same(narrow, checkpoints.analyze(write(tmp_path / "f32", rounded), window=3), rtol=1e-6)


# ---- what is taken ----


def test_tied_tensors_buffers_and_prefixes(tmp_path, series):
  torch = pytest.importorskip("torch")

  def extras(i):
    return {
      "h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)),
      "h.0.attn.masked_bias": np.float32(-1e4).reshape(()),
      "h.0.rotary_emb.inv_freq": np.ones(4, np.float32),
      "bn.running_mean": np.full(3, i, np.float32),
      "bn.num_batches_tracked": np.int64(i),
      "ids": np.arange(5),
      "zeros_a": np.zeros((4, 4), np.float32),
      "zeros_b": np.zeros((4, 4), np.float32),
    }

  def tensors(params, i):
    return {**dotted(params), **extras(i), "lm_head.weight": params["emb"]}

  def by_torch(path, params):
    state = {f"_orig_mod.module.{n}": torch.tensor(x) for n, x in tensors(params, int(path.stem[5:])).items()}
    state["_orig_mod.module.lm_head.weight"] = state["_orig_mod.module.emb"]
    torch.save(state, path)

  def by_safetensors(path, params):
    safetensors.save_file({n: np.array(x) for n, x in tensors(params, int(path.stem[5:])).items()}, path)

  a = checkpoints.analyze(write(tmp_path / "a", series, by_torch, ".pt"), window=3)
  b = checkpoints.analyze(write(tmp_path / "b", series, by_safetensors, ".safetensors"), window=3)
  zeros = {f"zeros_{x}": np.zeros((4, 4), np.float32) for x in "ab"}
  c = checkpoints.analyze(write(tmp_path / "c", [{**params, **zeros} for params in series]), window=3)
  assert_same(a, b)
  assert_same(a, c)
  for found in (a, b):
    assert found.attrs["parameters_taken"] == c.attrs["parameters_taken"]
    left_out = found.attrs["parameters_left_out"]
    for line in (
      "lm_head/weight [130, 24]: tied to emb",
      "h/0/attn/bias [1, 1, 8, 8]: a causal mask",
      "h/0/attn/masked_bias []: a causal mask",
      "h/0/rotary_emb/inv_freq [4]: a rotary table",
      "bn/running_mean [3]: running statistics",
      "ids [5]: it holds no floats but int64",
    ):
      assert line in left_out.splitlines(), left_out


def test_torch_files_that_are_called_archives(tmp_path, series, record):
  torch = pytest.importorskip("torch")

  def by_torch(path, params):
    torch.save({name: torch.tensor(x) for name, x in params.items()}, path)

  files = write(tmp_path / "a", series, by_torch, ".pth.tar")
  assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_statistics_of_codebooks(tmp_path, series):
  """Counters that move far more than parameters do."""
  names = (
    *("vq._ema_cluster_size", "vq.cluster_size", "vq.embed_avg", "vq._ema_w", "conv.weight_u", "conv.weight_v"),
    *(f"fc.parametrizations.weight.0.{vector}" for vector in ("_u", "_v")),
  )
  beside = [{**params, **{name: np.full(4, 1e3 * i, np.float32) for name in names}} for i, params in enumerate(series)]
  found = checkpoints.analyze(write(tmp_path / "a", beside), window=3)
  assert_same(found, checkpoints.analyze(write(tmp_path / "b", series), window=3))
  left_out = found.attrs["parameters_left_out"].splitlines()
  assert {line.partition(":")[0] for line in left_out} == {f"{name.replace('.', '/')} [4]" for name in names}


def test_vectors_of_weight_normalization_are_parameters(tmp_path, series):
  beside = [{**params, "fc.weight_v": np.ones((4, 5), np.float32), "fc.weight_g": np.ones(4)} for params in series]
  taken = checkpoints.analyze(write(tmp_path / "a", beside), window=3).attrs["parameters_taken"]
  assert {"fc/weight_v [4, 5]", "fc/weight_g [4]"} <= set(taken.splitlines())


def test_dotted_keys_of_a_live_tracker(tmp_path):
  rng = np.random.default_rng(0)
  params = {f"layers.{i}.weight": rng.normal(size=(20, 30)).astype(np.float32) for i in range(3)}
  tx = sedjax.track_spectral_edge(3, source="params", sketch=sedjax.sketch.count(64))
  state, live = tx.init(params), []
  for i in range(6):
    safetensors.save_file(params, tmp_path / f"step_{i}.safetensors")
    _, state = tx.update(params, state, params)
    live.append(np.asarray(sedjax.get_report(state).singular_values))
    params = {name: x + rng.normal(size=x.shape).astype(np.float32) / 100 for name, x in params.items()}
  pattern, options = f"{tmp_path}/step_*.safetensors", {"window": 3, "sketch": sedjax.sketch.count(64)}
  found = checkpoints.analyze(pattern, rename={"/": "."}, **options).singular_values.values[-1].ravel()
  np.testing.assert_allclose(found, live[-1], rtol=1e-4)
  assert not np.allclose(
    checkpoints.analyze(pattern, **options).singular_values.values[-1].ravel(), live[-1], rtol=0.01
  )


def test_statistics_that_flax_nnx_keeps_beside_parameters(tmp_path, series):
  """Under names that say so only together."""
  beside = {"bn/mean": (4,), "bn/var": (4,)} | {f"blocks/0/bn/{name}": (5,) for name in ("scale", "mean", "var")}
  rng = np.random.default_rng(0)
  extended = [{**params, **{name: rng.normal(size=shape) for name, shape in beside.items()}} for params in series]
  found = checkpoints.analyze(write(tmp_path / "a", extended), window=3)
  assert "blocks/0/bn/scale [5]" in found.attrs["parameters_taken"].splitlines()
  assert found.attrs["parameters_left_out"].splitlines() == [
    f"{name} [{size}]: running statistics"
    for name, size in (("bn/mean", 4), ("bn/var", 4), ("blocks/0/bn/mean", 5), ("blocks/0/bn/var", 5))
  ]
  named = {"head/mean": (4,), "head/var": (4,), "head/kernel2": (3, 4), "mean": (3,), "var": (3,)}  # of no such module
  infos = {name: _reader.TensorInfo(shape, np.dtype("f4")) for name, shape in named.items()}
  assert not any(_selection._why_not(name, infos) for name in infos)


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()])
def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, series, sketch, monkeypatch):
  """Its numbers may be of both; it is never taken for the new one that was read."""
  files, out = write(tmp_path, series), tmp_path / "run.nc"
  close, replaced = _npz.NpzReader.close, tmp_path / f"step_{4 * EVERY}.npz"
  calls = []

  def close_and_replace(self):
    close(self)
    calls.append(self)
    if len(calls) > 6:  # two readers open files to select what is read
      np.savez(replaced, **{name: x + len(calls) for name, x in series[4].items()})

  monkeypatch.setattr(_npz.NpzReader, "close", close_and_replace)
  with pytest.raises(checkpoints.CheckpointError, match="was changed while it was read; run it again when it is whole"):
    checkpoints.analyze(files, window=3, sketch=sketch, out=out, progress=False)
  monkeypatch.undo()
  found = checkpoints.analyze(files, window=3, sketch=sketch, out=out, progress=False)
  fresh = checkpoints.analyze(files, window=3, sketch=sketch, progress=False)
  assert_same(found, fresh)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, series, monkeypatch):
  files = write(tmp_path, series, *FORMATS["safetensors"])

  def forbidden(path, *_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

  monkeypatch.setattr(_safetensors, "open", forbidden, raising=False)
  with pytest.raises(
    checkpoints.CheckpointError, match=r"step_0\.safetensors .*: it cannot be read: Permission denied"
  ):
    checkpoints.analyze(files, window=3, progress=False)


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()])
def test_a_run_that_stands_still_at_its_end(tmp_path, series, sketch):
  moving = len(series) - 1
  files = write(tmp_path, [*series, *[series[-1]] * 12])
  found = checkpoints.analyze(files, window=3, sketch=sketch, progress=False).isel(seed=0, group=0, window=0)
  assert found["count"].values.tolist() == [*range(1, moving + 1), *[moving] * 12]
  assert found.skipped_zero.values.tolist() == [*[0] * moving, *range(1, 13)]
  assert np.all(found.singular_values.values[moving:] == found.singular_values.values[moving - 1])


def test_float8_of_torch(tmp_path):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  for name in ("float8_e5m2", "float8_e4m3fn"):
    series = [{"w": torch.tensor(rng.normal(size=(40, 30))).to(getattr(torch, name))} for _ in range(5)]
    wide = [{"w": params["w"].float().numpy()} for params in series]
    found = checkpoints.analyze(write(tmp_path / name, series, lambda path, x: torch.save(x, path), ".pt"), window=3)
    assert_same(found, checkpoints.analyze(write(tmp_path / f"{name}_wide", wide), window=3))


def test_views_of_other_numbers_are_not_tied():
  """Tensors of one storage are tied where they hold the same numbers, in whatever shape or order of axes."""
  torch = pytest.importorskip("torch")
  base = torch.arange(64.0).reshape(8, 8)

  def memory(tensor):
    return _torch._torch_memory(tensor)

  same = (base, base.t(), base.reshape(-1), base.reshape(2, 4, 8), base[None], base.permute(1, 0)[:, None])
  assert len({memory(tensor) for tensor in same}) == 1
  others = (base[:4], base[:, :4], base[1::2], base.reshape(-1)[::2], base[4:], base.view(torch.int32)[:2])
  assert len({memory(tensor) for tensor in others}) == len(others)


@pytest.mark.parametrize(
  ("given", "steps", "said"),
  [([], None, "no file was given"), (None, np.arange(9) + 0.5, "whole numbers"), (None, "012345678", "whole numbers")],
)
def test_no_files_and_steps_that_are_no_numbers(files, given, steps, said):
  with pytest.raises(checkpoints.CheckpointError, match=said):
    checkpoints.analyze(files if given is None else given, window=3, steps=steps)


def test_copies_that_part_ways_are_not_tied(tmp_path, series):
  """An average of the parameters begins as a copy of them."""
  series = [{**params, "ema/emb": series[i // 2]["emb"]} for i, params in enumerate(series)]
  assert "ema/emb" in checkpoints.analyze(write(tmp_path, series), window=3).attrs["parameters_taken"]


def test_numbers_in_another_order_of_bytes(tmp_path, series, record):
  swapped = [{name: x.astype(">f4") for name, x in params.items()} for params in series]
  for kind in ("plain", "compressed", "fortran"):
    files = write(tmp_path / kind, swapped, *FORMATS.get(kind, ()))
    assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_numbers_that_are_too_long_are_left_out(tmp_path, series):
  if np.dtype(np.longdouble).itemsize == 8:
    pytest.skip("no longer floats here")
  long = [{**params, "long": np.ones(3, np.longdouble)} for params in series]
  found = checkpoints.analyze(write(tmp_path / "a", long), window=3)
  assert found.attrs["parameters_left_out"] == f"long [3]: dtype {np.dtype(np.longdouble)} cannot be read"


@pytest.mark.parametrize(
  ("tree", "inside"),
  [
    ({"a": 1, "b": {"c": 1}}, None),
    ({"model": {"a": 1}, "optimizer": {"a": {"mu": 1}}}, ("model",)),
    ({"model": {"a": 1}, "epoch": 3, "loss": 1}, ("model",)),
    ({"params": {"a": 1}, "batch_stats": {"a": 1}}, ("params",)),
    ({"state": {"params": {"a": 1}, "opt_state": [1, 1]}}, ("state", "params")),
    ({"net": {"a": 1}, "head": {"a": 1}}, None),  # two modules
    ({"net": {"a": 1}, "scheduler": {"last": 3}}, ("net",)),
    ({"model": {"a": 1}, "head": 1}, None),  # a module, beside a tensor
    ({"params": {"a": 1}, "timestep_embed": {"a": 1}}, ("params",)),
  ],
)
def test_where_a_training_state_keeps_its_parameters(tree, inside):
  def arrays(node):
    if isinstance(node, dict):
      return {name: arrays(value) for name, value in node.items()}
    return [*map(arrays, node)] if isinstance(node, list) else np.ones(3) if node == 1 else node

  assert _training.model_keys({"model": {"a": 1}, "timestep_embed": {"a": 1}}, bool, anywhere=False) is None
  for anywhere in (False, True):
    assert _training.model_keys(arrays(tree), lambda value: isinstance(value, np.ndarray), anywhere) == inside


STATE = {  # names of the parameters and of what lies beside them in one flat file
  "npz of a train state": ("params/{}", ["ema_params/{}", "opt_state/0/mu/{}", "opt_state/0/nu/{}", "step"]),
  "within a state": ("state/params/{}", ["state/opt_state/0/mu/{}", "state/batch_stats/{}/mean", "epoch"]),
  "a target network": ("params/{}", ["target_params/{}"]),
  "opt": ("params/{}", ["opt/0/trace/{}"]),
  "parameters without a name": ("{}", ["opt_state/0/mu/{}", "ema/{}"]),
  "dotted": ("model.{}", ["optimizer.state.exp_avg.{}", "optimizer.state.exp_avg_sq.{}", "model_ema.{}"]),
  "dotted, wrapped": ("module.{}", ["optim.0.momentum_buffer.{}"]),
  "moments in front": ("{}", ["exp_avg.{}", "exp_avg_sq.{}"]),
  "linen": ("params.{}", ["batch_stats.{}.mean"]),
}


@pytest.mark.parametrize("case", STATE)
def test_training_states_under_flat_names(tmp_path, series, record, case):
  """What belongs to the optimizer changes, and by more than the parameters, which alone are taken."""
  name, beside = STATE[case]
  join = dotted if "." in name + beside[0] else dict

  def save(path, params):
    own = {name.format(key): x for key, x in join(params).items()}
    others = {other.format(key): 1e3 * x for other in beside for key, x in join(params).items()}
    safetensors.save_file(others | own, path)

  found = checkpoints.analyze(write(tmp_path, series, save, ".safetensors"), window=(3, 5), groups=GROUPS)
  assert found.attrs["parameters_taken"] == record.attrs["parameters_taken"]
  assert_same(found, record)
  assert found.attrs["parameters_left_out"].count("outside of") >= len(set(beside) - {"step", "epoch"})


@pytest.mark.parametrize(
  "names",
  [
    ["model.h.w", "lm_head.w"],
    ["model.h.w", "timestep_embed.w"],
    ["params.0", "net.0.w"],
    ["opt.layers.0.attn.v.w", "opt_proj.w", "qformer.w"],
    ["a.mu.w", "a.nu.w"],
    ["ema.w", "ema_gate.w", "optics.w", "model.w"],
    ["w", "w/v"],
  ],
)
def test_modules_that_are_named_as_training_states_are(names):
  tensors = {name: _reader.TensorInfo((3,), np.dtype("f4")) for name in names}
  inside, outside = _selection._in_model(tensors)
  assert (["/".join(parts) for parts in inside.values()], outside) == ([name.replace(".", "/") for name in names], {})


@pytest.mark.parametrize(
  "state",
  [
    "actor_opt_state/0/mu/w",
    "gen_opt/1/0/nu/w",
    "gen_opt/inner_state/0/trace/w",
    "opt_state_g/0/mu/w",
    "optG.state.0.exp_avg",
    "optimizer_d.state.0.exp_avg_sq",
    "critic_optim.0.momentum_buffer",
    "optimizerD/0/mu/w",
    "opt2/1/m/w",
  ],
)
def test_optimizers_of_several_models(state):
  names = ["actor_params/w", "gen_params/adopt/mu/w", "w", state]
  inside, outside = _selection._in_model({name: _reader.TensorInfo((3,), np.dtype("f4")) for name in names})
  assert [*inside] == names[:3]
  assert outside == {state: "outside of the model, as its name says"}


def test_a_head_beside_the_model_of_a_flat_training_state():
  names = ["model.h.w", "lm_head.w", "optimizer.state.exp_avg.w"]
  inside, outside = _selection._in_model({name: _reader.TensorInfo((3,), np.dtype("f4")) for name in names})
  assert [*inside] == names[:2]
  assert outside == {names[2]: "outside of the model, as its name says"}


def test_optimizer_moments_beside_the_parameters(tmp_path, series, record):
  torch = pytest.importorskip("torch")

  def save(path, params):
    tensors = {name: torch.tensor(x) for name, x in dotted(params).items()}
    moments = {i: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)} for i in range(4)}
    torch.save({**tensors, "optimizer": {"state": moments}, "opt_state": {"mu": torch.ones(3)}}, path)

  found = checkpoints.analyze(write(tmp_path / "a", series, save, ".pt"), window=(3, 5), groups=GROUPS)
  assert_same(found, record)
  left_out = found.attrs["parameters_left_out"].splitlines()
  assert "optimizer.state.*.exp_avg [3] × 4: outside of the model, as its name says" in left_out
  assert "opt_state.mu [3]: outside of the model, as its name says" in left_out


def test_views_that_repeat_numbers_are_left_out(tmp_path, series):
  """They may be as large as one likes, while the file holds one number."""
  torch = pytest.importorskip("torch")

  def save(path, params):
    torch.save({**{n: torch.tensor(x) for n, x in params.items()}, "wide": torch.ones(1).expand(10**6, 10**6)}, path)

  found = checkpoints.analyze(write(tmp_path / "a", series, save, ".pt"), window=3)
  assert "wide [1000000, 1000000]: it repeats fewer numbers" in found.attrs["parameters_left_out"]
  assert_same(found, checkpoints.analyze(write(tmp_path / "b", series), window=3))


def test_two_tensors_of_one_name(tmp_path, series, files):
  message = r"step_0\.npz \(step 0\): tensors '(emb|head/kernel)' and '(emb|head/kernel)' both have the path 'x'"
  with pytest.raises(checkpoints.CheckpointError, match=rf"{message}; check rename"):
    checkpoints.analyze(files, window=3, rename={"emb|head/kernel": "x"})
  wrapped = [{**params, "_orig_mod/emb": params["emb"]} for params in series]
  with pytest.raises(checkpoints.CheckpointError, match="both have the path 'emb'"):
    checkpoints.analyze(write(tmp_path / "a", wrapped), window=3)
  with pytest.raises(_reader.ReadError, match=r"two tensors are named 'a\.b', by names within names; rename one"):
    _reader.new_name("a.b", {"a.b": None})


def test_torch_layout_is_mapped_to_flax(tmp_path):
  torch, nnx = pytest.importorskip("torch"), pytest.importorskip("flax.nnx")
  del nnx
  rng = np.random.default_rng(0)
  flax = [
    {"fc/kernel": rng.normal(size=(6, 5)).astype("f4"), "conv/kernel": rng.normal(size=(3, 3, 2, 4)).astype("f4")}
    for _ in range(5)
  ]

  def save(path, params):
    linear, conv = (torch.tensor(params[name]) for name in ("fc/kernel", "conv/kernel"))
    torch.save({"fc.weight": linear.T, "conv.weight": conv.permute(3, 2, 0, 1)}, path)

  found = checkpoints.analyze(
    write(tmp_path / "torch", flax, save, ".pt"), window=3, rename={"weight$": "kernel"}, transpose="kernel$"
  )
  assert_same(found, checkpoints.analyze(write(tmp_path / "flax", flax), window=3))


# ---- going on ----


@pytest.mark.parametrize("exact", [False, True])
def test_goes_on_after_an_interruption_at_every_save(tmp_path, files, exact, monkeypatch, capsys):
  options = {"window": 3, "sketch": sedjax.sketch.exact() if exact else None, "groups": GROUPS}
  monkeypatch.setattr(_streams, "_SAVE_SECONDS", 0)
  monkeypatch.setattr(_streams._Tracker, "ready", lambda _: True)
  whole = checkpoints.analyze(files, **options)
  save, saves = _store.Store.save, []

  def interrupted(self, *args):
    save(self, *args)
    saves.append(args)
    raise KeyboardInterrupt

  out = tmp_path / "run.nc"
  for done in range(len(SHAPES) if exact else COUNT):
    monkeypatch.setattr(_store.Store, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
      checkpoints.analyze(files, out=out, **options)
    assert len(saves) == done + 1
    assert not out.exists()
    assert ("going on after" in capsys.readouterr().err) == (done > 0)
  monkeypatch.setattr(_store.Store, "save", save)
  assert_same(checkpoints.analyze(files, out=out, **options), whole)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["run.nc"]


def test_the_users_series_can_be_added(tmp_path, files):
  out = tmp_path / "run.nc"
  whole = checkpoints.analyze(files, window=3, out=out)
  with Recorder(out) as recorder:
    recorder.log(10, validation_loss=0.5)
    recorder.event(20, "the data shifted")
  found = open_record(out)
  assert_same(found.load(), whole)
  assert found.validation_loss_step.values.tolist() == [10]
  assert found.event.values.tolist() == ["the data shifted"]
  assert {"sketch", "sketch_id", "source", "every", "windows", "jax_version", "device", "command"} <= set(found.attrs)


def test_small_checkpoints_are_saved_several_at_a_time(tmp_path, files, monkeypatch):
  """And a checkpoint that cannot be read keeps all before it."""
  saves, save = [], _store.Store.save
  monkeypatch.setattr(_store.Store, "save", lambda self, *args: (saves.append(args), save(self, *args)))
  folder = tmp_path / "series"
  shutil.copytree(os.path.dirname(files), folder)
  (folder / f"step_{5 * EVERY}.npz").write_bytes(b"nothing")
  with pytest.raises(checkpoints.CheckpointError, match="rows up to step 20 are kept"):
    checkpoints.analyze(str(folder / "step_*.npz"), window=3, out=tmp_path / "run.nc")
  assert 1 <= len(saves) <= 2
  shutil.copy(f"{os.path.dirname(files)}/step_{5 * EVERY}.npz", folder)
  found = checkpoints.analyze(str(folder / "step_*.npz"), window=3, out=tmp_path / "run.nc")
  assert_same(found, checkpoints.analyze(files, window=3))


@pytest.mark.parametrize("left", [100, None])
def test_an_analysis_whose_reports_are_damaged_begins_anew(tmp_path, files, capsys, left):
  folder, out = tmp_path / "series", tmp_path / "run.nc"
  shutil.copytree(os.path.dirname(files), folder)
  (folder / f"step_{5 * EVERY}.npz").write_bytes(b"nothing")
  with pytest.raises(checkpoints.CheckpointError, match="rows up to step 20 are kept"):
    checkpoints.analyze(str(folder / "step_*.npz"), window=3, out=out)
  reports = tmp_path / "run.nc.part" / "reports.bin"
  reports.unlink() if left is None else reports.write_bytes(reports.read_bytes()[:left])
  shutil.copy(f"{os.path.dirname(files)}/step_{5 * EVERY}.npz", folder)
  capsys.readouterr()
  found = checkpoints.analyze(str(folder / "step_*.npz"), window=3, out=out)
  assert "run.nc.part belongs to another analysis, or is damaged: beginning anew" in capsys.readouterr().err
  assert_same(found, checkpoints.analyze(files, window=3))


def test_another_analysis_begins_anew(tmp_path, files, monkeypatch, capsys):
  def stop(self, *args):
    save(self, *args)
    raise KeyboardInterrupt

  save = _store.Store.save
  monkeypatch.setattr(_store.Store, "save", stop)
  with pytest.raises(KeyboardInterrupt):
    checkpoints.analyze(files, window=3, out=tmp_path / "run.nc")
  monkeypatch.setattr(_store.Store, "save", save)
  found = checkpoints.analyze(files, window=4, out=tmp_path / "run.nc")
  assert "beginning anew" in capsys.readouterr().err
  assert_same(found, checkpoints.analyze(files, window=4))


@pytest.mark.parametrize(
  "other",
  [
    {"rename": {"^emb$": "x", "^head/kernel$": "emb", "^x$": "head/kernel"}},
    {"transpose": "head"},
  ],
  ids=lambda other: next(iter(other)),
)
def test_an_analysis_of_other_tensors_does_not_go_on(tmp_path, monkeypatch, capsys, other):
  """Also where both have all paths in common, by names that change places."""
  series = [{"emb": params["emb"][:24, :17], "head/kernel": params["head/kernel"]} for params in walk(5)]
  files, save = write(tmp_path / "a", series), _store.Store.save

  def stop(self, *args):
    save(self, *args)
    raise KeyboardInterrupt

  monkeypatch.setattr(_store.Store, "save", stop)
  options = {"window": 3, "groups": {"emb": "a"}, "out": tmp_path / "run.nc"}
  with pytest.raises(KeyboardInterrupt):
    checkpoints.analyze(files, **options)
  monkeypatch.setattr(_store.Store, "save", save)
  found = checkpoints.analyze(files, **options | other)
  assert "beginning anew" in capsys.readouterr().err
  assert_same(found, checkpoints.analyze(files, **options | other | {"out": None}))


@pytest.mark.parametrize("kind", ["npz", "sharded", "orbax"])
def test_a_checkpoint_that_was_written_again_is_noticed(tmp_path, series, kind):
  """Whichever of its files it is, of the same size as before."""
  if kind == "npz":
    np.savez(tmp_path / "a", **series[0])
    path = tmp_path / "a.npz"
  else:
    path = tmp_path / "a"
    FORMATS[kind][0](path, series[0])
  files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
  assert len(files) >= {"npz": 1, "sharded": 3, "orbax": 4}[kind]
  entry, signatures = Entry(str(path), 0), []
  for file in [None, *files]:
    if file is not None:
      os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 10**7))
    signatures.append(json.dumps(_store.signature_of(entry)))
    assert signatures[-1] == json.dumps(_store.signature_of(entry))
  assert len(set(signatures)) == len(files) + 1


# ---- bad input ----


def spoil(i, change):
  """A series with one changed checkpoint."""
  series = walk()
  series[i] = change(dict(series[i]))
  return series


def with_nan(params):
  params["emb"] = params["emb"].copy()
  params["emb"][3, 4] = np.nan
  return params


BAD = {
  "nan": (with_nan, r"step_20\.npz \(step 20\), tensor 'emb': it holds NaN"),
  "shape": (lambda p: {**p, "emb": p["emb"][1:]}, r"step_20\.npz \(step 20\), tensor 'emb': its shape is \(129, 24\)"),
  "dtype": (lambda p: {**p, "emb": p["emb"].astype(np.float16)}, r"\(step 20\), tensor 'emb': its dtype is float16"),
  "integers": (lambda p: {**p, "emb": p["emb"].astype(int)}, r"\(step 20\), tensor 'emb': its dtype is int64"),
  "missing": (lambda p: {n: x for n, x in p.items() if n != "emb"}, r"\(step 20\): it lacks tensor 'emb'"),
  "new": (lambda p: {**p, "lora": p["emb"]}, r"\(step 20\), tensor 'lora': the first checkpoint .* has no such tensor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors_are_named_and_the_rest_is_kept(kind, tmp_path, record):
  change, message = BAD[kind]
  good = write(tmp_path / "good", walk())
  out = tmp_path / "run.nc"
  bad = write(tmp_path / "bad", spoil(4, change))
  with pytest.raises(checkpoints.CheckpointError, match=message) as caught:
    checkpoints.analyze(bad, window=(3, 5), groups=GROUPS, out=out)
  assert str(caught.value).count("\n") == 0
  import xarray as xr

  with xr.open_dataset(out, engine="h5netcdf") as kept:
    assert kept.step.values.tolist() == [5, 10, 15]
  shutil.copy(tmp_path / "good" / "step_20.npz", tmp_path / "bad")
  del good
  assert_same(checkpoints.analyze(bad, window=(3, 5), groups=GROUPS, out=out), record)


@pytest.mark.parametrize("exact", [False, True])
def test_truncated_files_are_named(tmp_path, exact):
  for kind in ("safetensors", "torch", "compressed"):
    save, suffix = FORMATS[kind]
    files = write(tmp_path / kind, walk(), save, suffix)
    path = tmp_path / kind / f"step_20{suffix}"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(checkpoints.CheckpointError, match=rf"step_20{suffix} \(step 20\)"):
      checkpoints.analyze(files, window=3, sketch=sedjax.sketch.exact() if exact else None)


def test_series_that_make_no_record(tmp_path, files):
  def refused(message, *args, **options):
    with pytest.raises(checkpoints.CheckpointError, match=message) as caught:
      checkpoints.analyze(*args, **options)
    assert "\n" not in str(caught.value)

  refused("no file matches", str(tmp_path / "*.npz"))
  refused("there is no file", [str(tmp_path / "a.npz")])
  refused(r"from .* \(step 0\) to .* there are 9 checkpoints, and so 8 rows, fewer than the window of 10", files)
  refused(r"step_0\.npz is one file alone; give a series of checkpoints", files.replace("*", "0"))
  refused("steps= has 3 for 9", files, steps=(1, 2, 3))
  folder = os.path.dirname(files)
  names = [f"{folder}/step_{i * EVERY}.npz" for i in range(COUNT)]
  refused("do not ascend", names, window=3, steps=[0, 1, 2, 4, 3, 5, 6, 7, 8])
  refused("same step", [names[0], *names], window=3)
  shutil.copy(names[0], tmp_path / "final.npz")
  refused("differ in more than a number", [*names, str(tmp_path / "final.npz")], window=3)
  shutil.copy(names[0], tmp_path / "step_5.npz")
  write(tmp_path / "seed_1", walk())
  write(tmp_path / "seed_2", walk())
  refused("several numbers vary", str(tmp_path / "seed_*" / "*.npz"), window=3)
  refused("none of its", write(tmp_path / "ints", [{"a": np.arange(3)}] * 5), window=3)
  with pytest.raises(ValueError, match="no regular expression"):
    checkpoints.analyze(files, window=3, transpose="(")
  with pytest.raises(ValueError, match="regular expressions to names"):
    checkpoints.analyze(files, window=3, groups={"(": "a"})


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()])
def test_rows_of_more_steps_than_reports_can_count(tmp_path, sketch):
  """Each checkpoint is near enough to the one before, which is a copy of another."""
  params = walk(6)
  files = write(tmp_path, [*params[:3], params[2], *params[3:]])
  steps = [i * 2**30 + i for i in range(7)]
  with pytest.raises(
    checkpoints.CheckpointError, match=r"step_20.npz .* a row of 2147483650 steps, from step 2147483650"
  ):
    checkpoints.analyze(files, window=3, sketch=sketch, steps=steps)
  with pytest.raises(checkpoints.CheckpointError, match=r"step_5.npz .* give steps in a larger unit"):
    checkpoints.analyze(files, window=3, steps=[2 * step for step in steps])


def test_names_of_tensors_that_are_no_text(tmp_path):
  header = json.dumps({"a\ud800.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
  for step in range(4):
    (tmp_path / f"step_{step}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(checkpoints.CheckpointError, match=r"step_0.* tensor 'a\\ud800.w' has NUL or half of a character"):
    checkpoints.analyze(str(tmp_path / "step_*"), window=3)


def test_groups_have_the_names_that_a_live_record_gives(tmp_path):
  path = "transformer/encoder/layers_10/self_attention/query_projection/kernel"
  series = [{path: params["emb"]} for params in walk(5)]
  config = sedjax.core.Config(3, groups=lambda path: path)
  state = sedjax.core.init(config, series[0])
  live = group_names(identity(state)[0])
  found = checkpoints.analyze(write(tmp_path, series), window=3, groups=lambda path: path)
  assert found.group.values.tolist() == ["all", *live[1:]]
  assert len(live[1]) < len(path)


def test_patterns_in_a_folder_with_brackets(tmp_path):
  for folder in ("run[1]", "run[ab]", "runa"):
    (tmp_path / folder).mkdir()
    touched(tmp_path / folder, "step_{}", (len(folder), 100))
  for folder, first in {"run[1]": 6, "run[ab]": 4}.items():  # of which the last is a pattern for another folder
    found = find_series(str(tmp_path / folder / "step_*.npz"), None)
    assert [entry.step for entry in found] == [first, 100]
  (tmp_path / "lr[0.1]").mkdir()
  for step in (1, 2):
    touched(tmp_path / "lr[0.1]", f"step_{step}/model", (0,))
    touched(tmp_path, f"step[{step}]", (0,))
  for pattern in ("lr[[]0.1]/step_*/model.npz", "lr[0.1]/step_*/model.npz", "step[*].npz"):
    assert [entry.step for entry in find_series(str(tmp_path / pattern), None)] == [1, 2]


def touched(folder, names, numbers):
  """Empty files with these numbers in their names."""
  files = [folder / f"{names.format(i, i)}.npz" for i in numbers]
  for file in files:
    file.parent.mkdir(exist_ok=True)
    file.touch()
  return files


@pytest.mark.parametrize(
  ("names", "shown"),
  [
    ("step_{}e3", "1e3 in "),
    ("step_1e{}", "1e1 in "),
    ("step_1e-{}", "1e-1 in "),
    ("step_{}k", "1k in "),
    ("{}Mtok", "1M in "),
    ("step_{},000", "1,0 in "),
    ("step_{}_000", "1_000 in "),
    ("step_{} 000", "1 000 in "),
    ("step_0x{}", "0x1 in "),
    ("{}million", "1mil in "),
    ("epoch_{}.0", "1.0 in "),
    ("epoch_0.{}", "0.1 in "),
    ("step_-{}", "_-1 in "),
    ("step_{}e3/model_{}k", "1e3 in "),
  ],
)
def test_numbers_in_names_that_are_no_steps(tmp_path, names, shown):
  files = touched(tmp_path, names, range(1, 6))
  message = rf"the steps in the names are not written as plain whole numbers \({shown}.*1.*\); give steps"
  with pytest.raises(checkpoints.CheckpointError, match=message):
    find_series(files, None)
  assert find_series(files, [1000 * i for i in range(1, 6)])[-1].step == 5000


STEPS = ["checkpoint-{}", "{}", "0.5B_v1.5_step{}_lr1e-3", "step_{}k/model-{}", "epoch={}_512", "global_step{}"]


@pytest.mark.parametrize("names", [*STEPS, "1024x{}", "{}milestone"])
def test_numbers_in_names_that_are_steps(tmp_path, names):
  found = find_series(touched(tmp_path, names, ("01", "10", "9")), None)
  assert [entry.step for entry in found] == [1, 9, 10]


def test_a_parameter_that_the_first_checkpoint_left_out(tmp_path):
  for i, (first, why) in enumerate({(0, 3): "it is empty", (4, 3): "it holds no floats but int32"}.items()):
    new = np.zeros(first, np.int32 if i else np.float32)
    series = [{**params, "late": new if step < 3 else np.ones((4, 3), "f4")} for step, params in enumerate(walk(5))]
    message = rf"\(step 15\), tensor 'late': it is a parameter, but not in the first checkpoint .* \({why}\)"
    with pytest.raises(checkpoints.CheckpointError, match=message):
      checkpoints.analyze(write(tmp_path / str(i), series), window=3)


@pytest.mark.parametrize("where", [3, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_changes_beyond_float32_are_named(tmp_path, exact, where):
  series = [{name: x.astype(np.float64) for name, x in params.items()} for params in walk(6)]
  series[where]["emb"] *= 1e200
  files, sketch = write(tmp_path / "a", series), sedjax.sketch.exact() if exact else None
  kept = f"rows up to step {5 * (where - 1)} are kept"
  message = rf"\(step {5 * where}\), tensor 'emb': since .* changed by .* float32.*{kept}"
  with pytest.raises(checkpoints.CheckpointError, match=message):
    checkpoints.analyze(files, window=3, sketch=sketch, out=tmp_path / "run.nc")
  with open_record(tmp_path / "run.nc") as kept:
    assert np.isfinite(kept.singular_values).all()
  constant = [{**params, "emb": series[where]["emb"]} for params in series]
  found = checkpoints.analyze(write(tmp_path / "b", constant), window=3, sketch=sketch)
  assert np.isfinite(found.singular_values).all()


def test_given_steps_meet_files_in_the_order_of_their_numbers(tmp_path, series, record):
  for i, params in enumerate(series):
    np.savez(tmp_path / f"epoch={i + 5}-step={7 * (i + 5)}.npz", **params)  # 10 comes before 5 in the order of letters
  steps = range(0, EVERY * len(series), EVERY)
  assert_same(checkpoints.analyze(str(tmp_path / "*.npz"), window=(3, 5), groups=GROUPS, steps=steps), record)


def test_a_damaged_last_checkpoint_keeps_the_rows_before(tmp_path, series, record):
  pattern = write(tmp_path / "a", series)
  last = tmp_path / "a" / f"step_{EVERY * (len(series) - 1)}.npz"
  last.write_bytes(last.read_bytes()[:500])
  with pytest.raises(checkpoints.CheckpointError, match="damaged"):
    checkpoints.analyze(pattern, window=(3, 5), groups=GROUPS, out=tmp_path / "run.nc")
  with open_record(tmp_path / "run.nc") as kept:
    assert_same(kept, record.isel(step=slice(0, -1)))


def test_a_folder_with_an_index_and_a_single_file(tmp_path, series, record):
  """The index may list that file itself, or be what is left of another model."""
  files = write(tmp_path / "a", series, *FORMATS["sharded"])
  folder = tmp_path / "a" / "step_0"
  safetensors.save_file(dotted(series[0]), folder / "model.safetensors")
  message = "step_0.*both model.safetensors and model.safetensors.index.json, which may differ; give one"
  with pytest.raises(checkpoints.CheckpointError, match=message):
    checkpoints.analyze(files, window=(3, 5), groups=GROUPS)
  found = checkpoints.analyze(f"{files}/model.safetensors.index.json", window=(3, 5), groups=GROUPS)
  assert_same(found, record)
  where = dict.fromkeys(dotted(series[0]), "model.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_an_orbax_checkpoint_with_lists(tmp_path, series):
  import orbax.checkpoint as ocp

  def save(path, params):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, {"layers": [{"w": jnp.asarray(x)} for x in params.values()]})

  found = checkpoints.analyze(write(tmp_path / "a", series, save, ""), window=5)
  assert found.attrs["parameters_taken"].count("layers/") == len(SHAPES)


def test_steps_are_sorted_as_numbers(tmp_path, series, record):
  """Also where names do not sort, and where steps are given."""
  for i, params in enumerate(series):
    np.savez(tmp_path / f"x{'abcdefghi'[i]}.npz", **params)
  found = checkpoints.analyze(
    str(tmp_path / "x*.npz"), steps=[i * EVERY for i in range(COUNT)], window=(3, 5), groups=GROUPS
  )
  assert_same(found, record)


def test_tensors_that_the_index_does_not_list(tmp_path, series, record):
  files = write(tmp_path / "a", series, *FORMATS["sharded"])
  for path in (tmp_path / "a").glob("*/model-00001*"):
    safetensors.save_file({**safetensors.load_file(path), "ema.emb": np.ones((3, 2), np.float32)}, path)
  found = checkpoints.analyze(files, window=(3, 5), groups=GROUPS)
  assert_same(found, record)
  left_out = found.attrs["parameters_left_out"]
  assert left_out == "ema.emb [3, 2]: outside of the index, though model-00001-of-00002.safetensors holds it"


class Evil:
  """Makes a file where it is unpickled."""

  def __init__(self, trace):
    self.trace = trace

  def __reduce__(self):
    return os.mkdir, (str(self.trace),)


def test_pickles_are_not_executed(tmp_path, series):
  torch = pytest.importorskip("torch")
  evil = Evil(tmp_path / "was here")
  files = write(tmp_path / "torch", series, *FORMATS["torch"])
  torch.save({"w": torch.ones(3), "evil": evil}, tmp_path / "torch" / "step_10.pt")
  with pytest.raises(checkpoints.CheckpointError, match=r"step_10\.pt \(step 10\).*could run code.*refused"):
    checkpoints.analyze(files, window=3)
  (tmp_path / "torch" / "step_10.pt").write_bytes(pickle.dumps({"w": evil}))
  with pytest.raises(checkpoints.CheckpointError, match=r"step_10\.pt \(step 10\)"):
    checkpoints.analyze(files, window=3)
  pickled = spoil(0, lambda p: {**p, "evil": np.array([evil], object)})
  found = checkpoints.analyze(write(tmp_path / "npz", pickled), window=3)
  assert "evil [1]: it holds pickled objects" in found.attrs["parameters_left_out"]
  assert not evil.trace.exists()
  pickle.loads(pickle.dumps(evil))  # so that it is seen to be able to
  assert evil.trace.exists()


def test_a_full_disk_keeps_what_was_saved(tmp_path, files, monkeypatch):
  monkeypatch.setattr(_streams, "_SAVE_SECONDS", 0)
  monkeypatch.setattr(_streams._Tracker, "ready", lambda _: True)
  replacing, count = _store.replacing, []

  def full(path):
    count.append(path)
    if len(count) == 4:
      raise OSError(28, "No space left on device")
    return replacing(path)

  monkeypatch.setattr(_store, "replacing", full)
  out = tmp_path / "run.nc"
  with pytest.raises(checkpoints.CheckpointError, match=r"run\.nc\.part cannot be written \(No space left"):
    checkpoints.analyze(files, window=3, out=out)
  monkeypatch.setattr(_store, "replacing", replacing)
  assert_same(checkpoints.analyze(files, window=3, out=out), checkpoints.analyze(files, window=3))


def test_shards_that_are_missing_or_elsewhere(tmp_path, series):
  files = write(tmp_path / "a", series, *FORMATS["sharded"])
  shard = tmp_path / "a" / "step_15" / "model-00002-of-00002.safetensors"
  shard.unlink()
  with pytest.raises(checkpoints.CheckpointError, match=r"step_15 \(step 15\): its shard model-00002.* does not exist"):
    checkpoints.analyze(files, window=3)
  index = shard.parent / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
  with pytest.raises(checkpoints.CheckpointError, match="outside of its folder"):
    checkpoints.analyze(files, window=3)


# ---- the command ----


def command(*words):
  return main(["analyze", *map(str, words)])


@pytest.mark.parametrize("given", [None, "", "cuda"])
def test_command_takes_no_device_from_others(given, tmp_path, monkeypatch, capsys):
  found = []
  monkeypatch.setattr(jax.config, "update", lambda *change: found.append(change))
  monkeypatch.delenv("JAX_PLATFORMS")
  if given is not None:
    monkeypatch.setenv("JAX_PLATFORMS", given)
  assert command(tmp_path / "none*", "-o", tmp_path / "run.nc") == 1
  assert found == [*([] if given else [("jax_platforms", "cpu")]), ("jax_cpu_enable_async_dispatch", False)]
  assert "none*" in capsys.readouterr().err


def test_command(tmp_path, files, record, capsys):
  import xarray as xr

  out = tmp_path / "run.nc"
  groups = [f"--group={name}={pattern}" for pattern, name in GROUPS.items()]
  assert command(files, "-o", out, "--window", "3,5", *groups) == 0
  printed = capsys.readouterr()
  assert "wrote" in printed.out
  assert "taken: 4 tensors" in printed.err
  with xr.open_dataset(out, engine="h5netcdf") as found:
    assert_same(found, record)
  assert (
    command(files, "-o", out, "--window", "3", "--sketch", "exact", "--leave-out", "emb", "--transpose", "typo") == 0
  )
  printed = capsys.readouterr().err
  assert "emb [130, 24]: groups leaves it out" in printed
  assert [line for line in printed.splitlines() if "no tensor fits" in line] == ["no tensor fits 'typo'"]
  for words in (
    [tmp_path / "none*", "-o", out],
    [files, "-o", out, "--window", "x"],
    [files, "-o", out, "--sketch", "count:x"],
    [files, "-o", out, "--group", "a"],
  ):
    assert command(*words) == 1
    assert capsys.readouterr().err.startswith("sedjax analyze: ")


def test_patterns_of_the_command_may_look_ahead(tmp_path, files):
  """Whose sign of equality is not the one that parts pattern and name."""
  out = tmp_path / "run.nc"
  words = ["--window", "3", "--rename", "^(?=emb)=table/", "--group", "tables=^(?=table)"]
  assert command(files, "-o", out, *words) == 0
  assert "table/emb [130, 24]: group tables" in written(out).attrs["parameters_taken"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_that_are_no_text(tmp_path, files, monkeypatch):
  folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
  shutil.copytree(os.path.dirname(files), folder)
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
  assert command(f"{folder}/step_*.npz", "-o", f"{folder}/run.nc", "--window", "3") == 0
  sys.stdout.seek(0)
  assert sys.stdout.read() == f"wrote {tmp_path}/caf\\udce9/run.nc: 8 rows\n"
  assert "caf\\udce9" in written(f"{folder}/run.nc").attrs["checkpoints"]


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--leave-out", ""], "--leave-out must not be empty, as all paths have that; give '.' to mean all"),
    (["--leave-out", "("], "--leave-out must be a regular expression, got '('"),
    (["--group", "a="], "--group must not be empty"),
    (["--leave-out", "w", "--group", "a=w"], "--leave-out and --group must name a pattern once, got 'w' twice"),
    (["--group", "a=w", "--group", "b=w"], "--leave-out and --group must name a pattern once, got 'w' twice"),
    (["--rename", "a=b", "--rename", "a=c"], "--rename must name a pattern once, got 'a' twice"),
    (["--sketch", "count:1000000000000"], "must be from 1 to 16,777,216, got 'count:1000000000000'"),
    (["--sketch", "gaussian:16777217"], "must be from 1 to 16,777,216, got 'gaussian:16777217'"),
    (["--sketch", "count:0"], "must be from 1 to 16,777,216, got 'count:0'"),
  ],
)
@pytest.mark.usefixtures("no_work")
def test_arguments_of_the_command_that_are_refused(tmp_path, files, capsys, words, said):
  assert command(files, "-o", tmp_path / "run.nc", "--window", "3", *words) == 1
  err = capsys.readouterr().err
  assert said in err
  assert err.count("\n") == 1


def test_an_interruption_ends_the_program_at_once(tmp_path):
  """Whatever other threads are at, which Python would wait for."""
  code = """
import threading, time, sedjax.checkpoints
from sedjax.__main__ import main

def interrupted(*args, **options):
  raise KeyboardInterrupt

sedjax.checkpoints.analyze = interrupted
threading.Thread(target=time.sleep, args=[300]).start()
main()
"""
  command = [sys.executable, "-c", code, "analyze", "*.npz", "-o", str(tmp_path / "run.nc")]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
  assert (done.returncode, done.stdout) == (130, "")
  assert done.stderr == "sedjax analyze: interrupted; run the same command again to go on.\n"


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_shows_rate_and_time_left(tmp_path, monkeypatch, shown):
  for step in range(0, 60, 10):
    np.savez(tmp_path / f"step_{step}.npz", w=np.random.default_rng(step).normal(size=(500, 100)).astype(np.float32))
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  monkeypatch.setattr(sys, "stderr", Terminal())
  checkpoints.analyze(f"{tmp_path}/step_*.npz", window=3, progress=shown)
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
  assert "taken: 1 tensor, 50,000 parameters" in text
  frames = [frame for frame in re.split(r"[\r\n]", text) if "━" in frame]
  assert bool(frames) is shown
  if shown:
    assert re.fullmatch(r"reading ━+ 0\.0/1\.2 MB \? -:--:--", frames[0].strip())
    assert re.fullmatch(r"step 50 ━+ 1\.2/1\.2 MB [\d.]+ (bytes|[kMG]B)/s 0:00:00", frames[-1].strip())


# ---- mangled files ----


def content_of(kind):
  """A small checkpoint's bytes and suffix."""
  small = {"a.w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(2, np.float64)}
  if kind == "safetensors":
    return safetensors.save(small), ".safetensors"
  buffer = io.BytesIO()
  if kind == "npz":
    np.savez(buffer, **small)
  elif kind == "compressed":
    np.savez_compressed(buffer, **small)
  else:
    torch = pytest.importorskip("torch")
    torch.save({n: torch.tensor(x) for n, x in small.items()}, buffer, _use_new_zipfile_serialization=kind == "torch")
  return buffer.getvalue(), ".pt" if "torch" in kind else ".npz"


def mangled(data, content):
  """Some bytes changed, and the end cut off."""
  found = bytearray(content)
  for _ in range(data.draw(strategies.integers(0, 4))):
    found[data.draw(strategies.integers(0, len(found) - 1))] = data.draw(strategies.integers(0, 255))
  return found[: data.draw(strategies.integers(0, len(found)) | strategies.just(len(found)))]


def error_of(path):
  """What the reader says of a checkpoint, of which all tensors are read."""
  try:
    reader = _readers.open_checkpoint(path)
  except _reader.ReadError as error:
    return str(error)
  try:
    for name, info in reader.tensors.items():
      if info.dtype is not None:
        assert info.size < 10**6
        reader.read(name, 0, np.empty(info.size, info.dtype))
  except _reader.ReadError as error:
    return str(error)
  finally:
    reader.close()
  return None


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed", "torch", "legacy torch"])
def test_mangled_files_give_the_error_or_a_result(kind, tmp_path):
  content, suffix = content_of(kind)
  path, errors = tmp_path / f"mangled{suffix}", []

  @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
  @hypothesis.given(strategies.data())
  def mangle(data):
    path.write_bytes(mangled(data, content))
    errors.append(error_of(path))

  mangle()
  found = [error for error in errors if error is not None]
  assert found
  assert all(error and "\n" not in error for error in found)


@pytest.mark.parametrize(("kind", "examples"), [("sharded", 200), ("orbax", 60)])
def test_mangled_folders_give_the_error_or_a_result(kind, examples, tmp_path):
  if kind == "orbax":
    pytest.importorskip("orbax.checkpoint")
  whole, errors = tmp_path / "whole", []
  FORMATS[kind][0](whole, {"a/w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(2, np.float32)})
  files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
  # An index has more ways to be wrong than what it tells of.
  files += [path for path in files if path.suffix == ".json"] * 4

  @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @hypothesis.given(strategies.data())
  def mangle(data):
    path = tmp_path / "mangled"
    shutil.copytree(whole, path)
    file = data.draw(strategies.sampled_from(files))
    (path / file).write_bytes(mangled(data, (whole / file).read_bytes()))
    errors.append(error_of(path))
    shutil.rmtree(path)

  mangle()
  found = [error for error in errors if error is not None]
  assert found
  assert all(error and "\n" not in error for error in found)


@pytest.mark.parametrize("shard", ["a\0b", "../a.safetensors", "model.safetensors.index.json", "\ud800", "", 3, None])
def test_an_index_of_nonsense(tmp_path, shard):
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
  assert re.search("weight_map|shard|index", error_of(tmp_path))


PARTED = [(), (7,), (70,), (5, 3), (96, 40), (33, 64), (1000, 24), (3, 4, 30), (2, 90), (200, 30), (4, 50, 7)]
# The other dtypes with a shape that has parts of every kind.
PARTED_CASES = [
  pytest.param(shape, dtype, marks=() if dtype is np.float32 or shape == (1000, 24) else pytest.mark.slow)
  for shape in PARTED
  for dtype in (np.float32, np.float64, jnp.bfloat16)
]


@pytest.mark.parametrize(("shape", "dtype"), PARTED_CASES)
@pytest.mark.parametrize("plain", [2**18, 50])
def test_sketches_of_parts_are_those_of_the_whole(shape, dtype, plain, monkeypatch):
  """In float64; by NumPy, by compiled functions of several parts, and by both, for what the last part leaves."""
  monkeypatch.setattr(_leaves, "_PLAIN", plain)
  monkeypatch.setattr(_leaves, "_CHUNK", 3000)
  monkeypatch.setattr(_count, "_SMALL", 0)  # all in lots, as large leaves are
  dim, path = 64, "layer/w"
  sketch = sedjax.sketch.count(dim, seed=2)
  x = np.asarray(np.random.default_rng(0).normal(size=shape), dtype)
  other = _selection.Leaf("other", _reader.TensorInfo((96, *shape[-1:]), x.dtype), None, 0)
  leaf = _selection.Leaf(path, _reader.TensorInfo(shape, x.dtype), None, 0)
  selection = types.SimpleNamespace(config=types.SimpleNamespace(sketch=sketch), leaves=(leaf, other))
  sketcher = _leaves.Sketcher(selection)
  parts = sketcher.parts(leaf)
  assert sum(part.rows - part.known for part in parts) == math.prod(shape[:-1])
  if shape == (1000, 24) and plain == 50:
    assert parts[-2:] == [_leaves.Part(864, 128, 32), _leaves.Part(992, 8, 0)]
  row, flat = np.zeros(dim), x.reshape(-1, *shape[-1:])
  for part in parts:
    sketcher.add(leaf, part, np.ascontiguousarray(flat[part.start : part.start + part.rows]), row)
  expected = np.asarray(sketch.apply(path, jnp.asarray(x.astype(np.float32))), np.float64)
  np.testing.assert_allclose(row, expected, rtol=2e-5, atol=2e-5)
  with jax.enable_x64(True):
    piece = _count.Piece("", jnp.asarray(x), hashes=sketch.hashes(path, shape))
    for whole in (
      sketch.rows([piece], [0], 1, _count.WIDE)[0],
      _strided.strided_rows([piece], [0], 1, dim, 2, _count.WIDE, None)[0],
    ):
      assert whole.dtype == np.float64
      np.testing.assert_allclose(row, whole, rtol=1e-12, atol=1e-12)


def test_parts_that_are_read_make_the_same_record(tmp_path, series, record, monkeypatch):
  monkeypatch.setattr(_leaves, "_PLAIN", 300)
  monkeypatch.setattr(_leaves, "_CHUNK", 1500)
  for kind in ("safetensors", "sharded", "fortran"):
    found = checkpoints.analyze(write(tmp_path / kind, series, *FORMATS[kind]), window=(3, 5), groups=GROUPS)
    assert_same(found, record, rtol=1e-6)


def test_without_quick_compilation(files, record, monkeypatch):
  """As where the compiler does not know its options."""
  monkeypatch.setattr(_streams, "known", lambda **_: None)
  monkeypatch.setattr(_leaves, "known", lambda **_: None)
  for cached in (_streams._compiled_push, _leaves._compiled_chunk, _leaves._compiled_whole):
    cached.cache_clear()
  assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record, rtol=1e-5)


def test_unknown_compiler_options_are_left_out():
  assert _compile.known(xla_no_such_option=True) is None
  assert _compile.known(**_compile.ROW_OPTIONS) in (None, _compile.ROW_OPTIONS)


def test_rows_wait_for_the_compiler(files, record, monkeypatch):
  """Reading goes on meanwhile, and nothing that was read is lost when it ends early."""
  monkeypatch.setattr(_streams._Tracker, "ready", lambda _: False)
  assert_same(checkpoints.analyze(files, window=(3, 5), groups=GROUPS), record)


def test_noise_of_rows_of_very_many_steps():
  """The closed form is that of the sums over all pairs of steps."""
  for momentum in (0.0, 0.5, 0.99):
    for every in (1, 2, 7):
      apart = np.arange(1 - every, every)
      lags = np.abs(np.arange(5)[:, None] * every + apart)
      expected = ((every - np.abs(apart)) * momentum ** lags.astype(float)).sum(1)
      np.testing.assert_allclose(row_covariance(5, momentum, every)[0], expected, rtol=1e-9)


# ---- where the record goes ----


def written(path):
  """Everything that a record holds."""
  with open_record(path) as found:
    return found.load()


def test_what_the_user_added_survives_another_analysis(tmp_path, files):
  out = tmp_path / "run.nc"
  checkpoints.analyze(files, window=3, out=out)
  with Recorder(out, attrs={"model": "tiny"}) as recorder:
    recorder.log(10, loss=0.5)
    recorder.log(20, rates=np.asarray([0.25]))
    recorder.event(20, "the data shifted")
  expected = checkpoints.analyze(files, window=4, k_max=2, out=out)
  found = written(out)
  assert_same(found, expected)
  assert (found.loss.values.tolist(), found.loss_step.values.tolist()) == ([0.5], [10])
  assert found.rates.dims == ("rates_step", "seed")
  assert (found.event.values.tolist(), found.event_step.values.tolist()) == (["the data shifted"], [20])
  assert (found.attrs["model"], found.attrs["k_max"]) == ("tiny", 2)
  assert os.listdir(tmp_path) == ["run.nc"]
  with Recorder(out) as recorder:  # which makes the series longer
    recorder.log(30, loss=0.25)
    recorder.event(30, "again")
  checkpoints.analyze(files, window=3, out=out)
  found = written(out)
  assert found.loss.values.tolist() == [0.5, 0.25]
  assert found.event.values.tolist() == ["the data shifted", "again"]
  assert "k_max" not in found.attrs


def test_fewer_rows_do_not_take_the_place_of_more(tmp_path):
  files, out = write(tmp_path / "a", walk()), tmp_path / "run.nc"
  whole = checkpoints.analyze(files, window=3, out=out)
  good = (tmp_path / "a" / "step_20.npz").read_bytes()
  (tmp_path / "a" / "step_20.npz").write_bytes(b"nothing")
  message = r"rows up to step 15 are kept in .*run\.nc\.part, and .*run\.nc is left as it was; mend that and run it"
  with pytest.raises(checkpoints.CheckpointError, match=message):
    checkpoints.analyze(files, window=4, out=out)
  assert_same(written(out), whole)
  (tmp_path / "a" / "step_20.npz").write_bytes(good)
  assert_same(checkpoints.analyze(files, window=4, out=out), written(out))
  assert written(out).sizes["index"] == 4


@pytest.fixture
def no_work(monkeypatch):
  """Nothing may be read before the record's place is known to be good."""
  monkeypatch.setattr(checkpoints, "select", lambda *_: pytest.fail("it began to read"))


def a_tracked_record(path):
  state = sedjax.track_spectral_edge(3).init({"w": jnp.ones(3)})
  with Recorder(path) as recorder:
    recorder.append(5, state)


def a_record_of_other_steps(path):
  write(path.parent / "b", walk(5))
  (path.parent / "b" / "step_20.npz").rename(path.parent / "b" / "step_21.npz")
  for step in (0, 5):
    shutil.copy2(path.parent / "a" / f"step_{step}.npz", path.parent / "b")
  checkpoints.analyze(str(path.parent / "b" / "step_*.npz"), window=3, out=path)


def a_record_of_others(path):
  checkpoints.analyze(write(path.parent / "b", walk(5, seed=1)), window=3, out=path)


def an_open_recorder(path):
  checkpoints.analyze(str(path.parent / "a" / "step_*.npz"), window=3, out=path)
  recorder = Recorder(path)
  recorder.log(5, loss=1.0)
  recorder.flush()
  return recorder


def another_file_in_the_part(path):
  folder = path.with_name("run.nc.part")
  folder.mkdir()
  (folder / "thesis.txt").write_text("important")


@pytest.mark.parametrize(
  ("make", "name", "words"),
  [
    (lambda path: path.write_text("important"), "run.nc", "is no record of these checkpoints .it is no record"),
    (a_tracked_record, "run.nc", "no analysis of checkpoints made it"),
    (a_record_of_others, "run.nc", "it begins with another checkpoint"),
    (a_record_of_other_steps, "run.nc", "it has the step 21, which these have not"),
    (an_open_recorder, "run.nc", r"is being recorded, as .*run\.nc\.journal beside it shows; close its Recorder"),
    (another_file_in_the_part, "run.nc", r"run\.nc\.part, where the unfinished analysis would lie"),
    (lambda path: path.with_name("run.nc.part").write_text(""), "run.nc", r"run\.nc\.part, where the unfinished"),
    (lambda path: path.mkdir(), "run.nc", r"which is no name or a folder's; name a file, such as .*run\.nc/run\.nc"),
    (os.mkfifo, "run.nc", "is a device or a pipe"),
    (str, "", r"cannot be '.*/', which is no name or a folder's; name a file"),
    (lambda path: path.write_text("important"), "run.nc/run.nc", r"cannot be written \((Not a directory|File exists)"),
    (str, "../../../../../../../../../../../../../proc/a/run.nc", "cannot be written"),
    pytest.param(str, "a" * 300, r"cannot be written \(File name too long", id="a long name"),
  ],
)
def test_what_lies_where_the_record_would(tmp_path, request, make, name, words):
  write(tmp_path / "a", walk())
  held = make(tmp_path / "run.nc")
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  request.getfixturevalue("no_work")
  with pytest.raises(checkpoints.CheckpointError, match=words) as caught:
    checkpoints.analyze(str(tmp_path / "a" / "step_*.npz"), window=4, out=f"{tmp_path}/{name}")
  assert "\n" not in str(caught.value)
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
  if isinstance(held, Recorder):
    held.close()


@pytest.mark.usefixtures("no_work")
def test_an_empty_name_of_the_record(files):
  with pytest.raises(checkpoints.CheckpointError, match="cannot be '', which is no name"):
    checkpoints.analyze(files, window=4, out="")


def test_only_what_the_analysis_wrote_is_removed(tmp_path):
  out = tmp_path / "run.nc"
  store = _store.Store(out, "")
  store.save({"a": np.ones(3)}, [b"report"])
  (store.folder / "thesis.txt").write_text("important")
  store.remove()
  assert os.listdir(store.folder) == ["thesis.txt"]


def test_one_analysis_at_a_time_writes_a_record(tmp_path, files):
  out = tmp_path / "run.nc"
  other = _store.Store(out, "")
  with pytest.raises(checkpoints.CheckpointError, match=r"another analysis works in .*run\.nc\.part; wait for its end"):
    checkpoints.analyze(files, window=4, out=out)
  other.close()
  checkpoints.analyze(files, window=4, out=out)
  assert sorted(os.listdir(tmp_path)) == ["run.nc"]


def test_an_analysis_that_saved_nothing_leaves_nothing(tmp_path):
  bad = [{**params, "emb": params["emb"] * np.nan} for params in walk()]
  files = write(tmp_path / "a", bad)
  with pytest.raises(checkpoints.CheckpointError, match="NaN"):
    checkpoints.analyze(files, window=4, out=tmp_path / "run.nc")
  assert os.listdir(tmp_path) == ["a"]


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
  for i in range(6):
    (tmp_path / f"step_{i}").mkdir()
    (tmp_path / f"step_{i}" / "flax_model.msgpack").write_bytes(b"x")
  words = r"step_0 \(step 0\): this folder has neither orbax's _METADATA nor any of model\.safetensors\.index\.json, "
  with pytest.raises(checkpoints.CheckpointError, match=words):
    checkpoints.analyze(str(tmp_path / "step_*"), window=3)


def test_reports_that_another_process_took_away_are_not_made_up(tmp_path):
  store = _store.Store(tmp_path / "run.nc", "")
  store.save({"a": np.ones(3)}, [b"report"])
  store.remove()
  with pytest.raises(checkpoints.CheckpointError, match="was emptied"):
    store.save({"a": np.ones(3)}, [b"report"], 2)


@pytest.mark.parametrize("sketch", [None, sedjax.sketch.exact()], ids=["count", "exact"])
def test_errors_name_tensors_as_their_file_does(tmp_path, sketch):
  series = walk()
  series[4] = {**series[4], "block_0/attn/kernel": series[4]["block_0/attn/kernel"] * np.nan}
  files = write(tmp_path / "a", series, *FORMATS["safetensors"])
  with pytest.raises(checkpoints.CheckpointError, match=r"\(step 20\), tensor 'block_0\.attn\.kernel': it holds NaN"):
    checkpoints.analyze(files, window=3, sketch=sketch, rename={"block": "layer"})
