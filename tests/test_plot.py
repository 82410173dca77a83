"""Pictures: axes in, axes out; labels with units; what was planted is where it was planted; no peak is thinned away."""

import subprocess
import sys

import matplotlib
import numpy as np
import planted
import pytest
import xarray as xr
from matplotlib.figure import Figure

from sedjax import _drawing, _plot_data, plot
from sedjax._types import Phase

matplotlib.use("agg")

PICTURES = {
  "singular_values": plot.singular_values,
  "ratios": plot.ratios,
  "gap_ratio": plot.gap_ratio,
  "against_null": plot.against_null,
  "groups": plot.groups,
  "fidelity": plot.fidelity,
}


@pytest.fixture(scope="module")
def record():
  return planted.with_series(planted.dataset())


def axes():
  return Figure((8, 3.6), layout="constrained").subplots()


def handles(ax):
  return dict(
    zip([text.get_text() for text in ax.get_legend().get_texts()], ax.get_legend().legend_handles, strict=True)
  )


def shaded(ax, name):
  """Steps between which a phase is shaded, from the drawn boxes of its colour."""
  face = matplotlib.colors.to_rgba(_drawing.PHASES[name][0])
  boxes = [part for part in ax.collections if np.allclose(part.get_facecolor()[0], face)]
  return [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for part in boxes for path in part.get_paths()]


@pytest.mark.parametrize("name", PICTURES)
def test_axes_in_axes_out(record, name):
  ax = axes()
  assert PICTURES[name](record, ax=ax) is ax
  assert ax.get_xlabel() == "optimizer step"
  assert ax.get_ylabel()
  assert list(ax.get_xlim()) == pytest.approx([20, 4000], abs=40)
  ax.figure.savefig("/dev/null", format="png")
  made = PICTURES[name](record)
  assert made.figure is not ax.figure
  matplotlib.pyplot.close(made.figure)


def test_labels_have_units(record):
  assert (
    plot.singular_values(record, ax=axes()).get_ylabel().replace("\n", " ") == "singular value σ_k (parameter units)"
  )
  assert plot.series(record, "loss", ax=axes()).get_ylabel() == "validation loss (nats)"
  other = record.assign(gap_ratio=record.gap_ratio.assign_attrs(long_name="cost in $ and $", units="furlongs"))
  ax = plot.gap_ratio(other, ax=axes())
  assert ax.get_ylabel().replace("\n", " ") == r"cost in \$ and \$ (furlongs)"
  ax.figure.savefig("/dev/null", format="png")


def test_planted_phases_are_shaded_where_they_were_planted(record):
  ax = plot.gap_ratio(record, ax=axes())
  slack = planted.EVERY * max(planted.WINDOWS)
  starts = {Phase.RISE: planted.RISE, Phase.PLATEAU: planted.PLATEAU, Phase.COLLAPSE: planted.COLLAPSE}
  for phase, row in starts.items():
    ((first, last),) = shaded(ax, phase)
    assert abs(first - planted.EVERY * row) <= slack
    assert last > first
  ((first, last),) = shaded(ax, Phase.WARMUP)
  assert (first, last) == (10, 190)  # rows 1 to 9, at steps 20 to 180
  assert {"window filling", "rise", "plateau", "collapse", "no edge", "range of 3 seeds"} <= set(handles(ax))
  assert "1: data shift" in handles(ax)


def test_k_star_is_marked_where_it_is(record):
  ax = plot.ratios(record, ax=axes(), seed=8)
  clear = next(line for line in ax.lines if line.get_label() == "k*")
  x, y = clear.get_data()
  inside = (x > 1400) & (x < 2400)
  assert inside.sum() > 20
  assert set(y[inside]) == {1}
  assert any(line.get_label() == "k*, ambiguous" for line in ax.lines)


def test_seeds_that_differ_are_shaded_as_such(record):
  phase = record.phase.copy(deep=True)
  phase[100:120, 0], phase[100:120, 1], phase[100:120, 2] = 1, 2, 3
  ax = plot.gap_ratio(record.assign(phase=phase), ax=axes())
  assert "seeds differ" in handles(ax)
  assert "seeds differ" not in handles(plot.gap_ratio(record.assign(phase=phase), ax=axes(), seed=7))


def test_thinning_keeps_peaks():
  steps = np.arange(100_000)
  values = np.random.default_rng(0).normal(size=len(steps))
  values[[12_345, 77_777]] = 100, -100
  x, y = _plot_data.thin(steps, values, 500)
  assert len(x) <= 1000
  assert y.max() == 100
  assert y.min() == -100
  assert abs(x[y.argmax()] - 12_345) <= 200
  assert abs(x[y.argmin()] - 77_777) <= 200
  values[40_000:60_000] = np.nan
  x, y = _plot_data.thin(steps, values, 500)
  assert np.isnan(y[(x > 40_200) & (x < 59_800)]).all()
  assert np.isfinite(y[(x < 39_800) | (x > 60_200)]).all()


def test_long_record_is_thinned_and_keeps_its_peak(record):
  long = xr.concat([record[["gap_ratio", "null_ratio", "phase", "k_star"]]] * 100, "step", data_vars="minimal")
  long = long.assign_coords(step=("step", 20 * np.arange(1, long.sizes["step"] + 1), record.step.attrs))
  gap = long.gap_ratio.copy(deep=True)
  gap[10_107] = 50
  ax = plot.gap_ratio(long.assign(gap_ratio=gap), ax=axes(), seed=7)
  line = next(line for line in ax.lines if line.get_label() == "gap ratio")
  assert len(line.get_xdata()) < 3000
  assert np.nanmax(line.get_ydata()) == 50
  assert ax.get_ylim()[1] > 50


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("case", ["one row", "never full", "all NaN", "one seed", "no attributes", "long names"])
def test_corner_cases(record, name, case):
  few = record[[*record.data_vars][:19]]
  made = {
    "one row": few.isel(step=[150]),
    "never full": few.isel(step=slice(4)).assign(phase=few.phase[:4] * 0, k_star=few.k_star[:4] * 0),
    "all NaN": few.map(lambda x: x * np.nan if x.dtype.kind == "f" else x),
    "one seed": few.isel(seed=[1]),
    "no attributes": few.map(lambda x: x.drop_attrs()).drop_attrs(),
    "long names": few.assign_coords(group=["all", "transformer/" * 9, "a$b" * 40]),
  }[case]
  ax = axes()
  assert PICTURES[name](made, ax=ax) is ax
  assert ax.get_xlabel()
  assert ax.get_ylabel()
  ax.figure.savefig("/dev/null", format="png")


def drawn(ax):
  """All numbers of the lines, images and shades of a picture."""
  meshes = [part.get_array() for part in ax.collections if isinstance(part, matplotlib.collections.QuadMesh)]
  lines = [np.asarray(line.get_xydata(), float) for line in ax.lines]
  return [line for line in lines if np.isfinite(line).all(1).any()] + [np.ma.filled(mesh, np.nan) for mesh in meshes]


@pytest.mark.parametrize("name", PICTURES)
def test_what_was_selected_by_xarray_is_drawn(record, name):
  expected = drawn(PICTURES[name](record.isel(seed=[1], window=[0], group=[1]), ax=axes(), window=5, seed=8))
  assert any(values.size > 100 for values in expected)
  for part in (
    record.isel(seed=1, window=0, group=1),
    record.isel(seed=1).sel(window=5).isel(group=[1]),
    record.isel(window=0, group=1).sel(seed=[8]),
  ):
    for one, two in zip(expected, drawn(PICTURES[name](part, ax=axes())), strict=True):
      np.testing.assert_array_equal(one, two)
  dropped = PICTURES[name](record.isel(seed=1, window=0, group=1, drop=True), ax=axes())
  assert len(drawn(dropped)) == len(expected)
  PICTURES[name](record.isel(step=100), ax=axes())


def test_series_and_events(record):
  assert _plot_data.series_names(record) == ["loss", "accuracy"]
  assert _plot_data.events_of(record) == [(1000, "data shift"), (2600, "learning rate halved")]
  assert set(handles(plot.series(record, "loss", ax=axes()))) >= {"seed 7", "seed 9", "2: learning rate halved"}
  assert len(plot.series(record, "loss", ax=axes(), seed=8).lines) == 1 + 2  # and two events


def test_events_that_lie_close_together(record):
  """Some of them are drawn, fewer numbered, and those beyond the picture neither drawn nor explained."""
  steps = [*range(1000, 1100, 2), 2600, 10**6]
  crowded = record.drop_vars("event").assign_coords(event_step=steps).assign(
    event=("event_step", [f"event {i}" for i in range(len(steps))])
  )  # fmt: skip
  ax = plot.gap_ratio(crowded, ax=axes())
  texts = [text.get_text() for text in ax.texts]
  assert texts[0] == "1"
  assert texts[-1] == "51"
  assert len(texts) < 10
  assert "1: event 0" in handles(ax)
  late = plot.gap_ratio(crowded.isel(event_step=slice(50, None)), ax=axes())
  assert [label for label in handles(late) if "event" in label] == ["1: event 50"]


def test_groups_with_long_paths_are_told_apart(record):
  names = [f"transformer/block_{i}/attention/projection" for i in range(record.sizes["group"] - 1)]
  ax = plot.groups(record.assign_coords(group=["all", *names]), ax=axes())
  labels = [label.get_text() for label in ax.get_yticklabels()]
  assert labels == ["all", *(f"block_{i}" for i in range(len(names)))]


def test_text_of_the_record_is_no_formula(record):
  evil = r"$\foo{$_{"
  odd = record.assign_coords(seed=[f"{i}{evil}" for i in range(3)], group=["all", evil, "b"])
  odd = odd.rename(loss=evil, loss_step=f"{evil}_step").assign(event=("event_step", [evil, "a\n\x07b\x9f"]))
  odd[evil].attrs.clear()
  many = odd.isel(seed=[0] * 9)  # whose series is a band
  for made, draw in [*((odd, draw) for draw in PICTURES.values()), *((r, series_of(evil)) for r in (odd, many))]:
    ax = axes()
    draw(made, ax=ax)
    ax.figure.savefig("/dev/null", format="png")
  assert f"{evil}, median".replace("_", " ").replace("$", r"\$") in handles(ax)


def series_of(name):
  return lambda record, ax: plot.series(record, name, ax=ax)


def test_series_as_large_as_float64_has(record):
  values = np.asarray([1.7e308, -1.7e308, np.inf, np.nan, 5.0, -np.inf])
  large = record.drop_dims("loss_step").assign(loss=("loss_step", values)).assign_coords(loss_step=range(6))
  ax = plot.series(large, "loss", ax=axes())
  ax.figure.savefig("/dev/null", format="png")
  assert np.isfinite(ax.get_ylim()).all()
  drawn = ax.lines[0].get_ydata()
  np.testing.assert_array_equal(np.isfinite(drawn), np.isfinite(values))
  assert drawn[4] == 5


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda r: plot.gap_ratio(r, seed=1), "no seed 1; it has \\[7, 8, 9\\]"),
    (lambda r: plot.ratios(r, window=7), "no window 7"),
    (lambda r: plot.fidelity(r, group="tail"), "no group 'tail'"),
    (lambda r: plot.series(r, "nothing"), "no series 'nothing'"),
    (lambda r: plot.ratios(r.drop_vars("ratios")), "no field 'ratios'"),
    (lambda r: plot.ratios(str(r)), "expected a record, got a str"),
    (lambda r: plot.series(str(r), "loss"), "expected a record, got a str"),
    *((lambda r, draw=draw: draw(r.isel(step=[])), "the record has no rows") for draw in PICTURES.values()),
  ],
)
def test_what_is_not_there_is_named(record, call, words):
  with pytest.raises(ValueError, match=words):
    call(record)


def test_without_matplotlib_the_extra_is_named():
  code = "import sys; sys.modules['matplotlib'] = None\nfrom sedjax import plot\nplot.gap_ratio(None)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
  assert "sedjax[plot]" in done.stderr
