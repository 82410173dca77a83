"""The report's words, its warnings and its page in a browser; the command line's answers to bad input."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import h5py
import numpy as np
import planted
import pytest
import xarray as xr
from matplotlib.figure import Figure

from sedjax import _journal, _netcdf, _page, _sections, _summary, plot, record
from sedjax.__main__ import main
from sedjax._html import escape, number
from sedjax._types import Status


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A folder with a short record, one that is still written, and something else."""
  folder = tmp_path_factory.mktemp("small")
  few = planted.dataset(1, 3)
  few.to_netcdf(folder / "run.nc", engine="h5netcdf")
  layout = {"format": _journal.FORMAT, "version": 1, "windows": [3], "groups": ["all"], "seeds": [0], "attrs": {}}
  (folder / "live.nc.journal").write_bytes(_journal.frame(_journal.SESSION, json.dumps(layout).encode()))
  (folder / "thesis.txt").write_text("important")
  return folder


def words(page):
  """The page's text without pictures, style and tags."""
  page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
  page = re.sub(r'src(set)?="data:[^"]*"', "", page)
  return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


@pytest.mark.parametrize(
  ("value", "digits", "text"),
  [(999.7, 3, "1,000"), (99.97, 2, "100"), (12.34, 3, "12.3"), (1234.5, 3, "1,234"), (0.0005, 3, "5.0e-04")],
)
def test_numbers_as_a_reader_writes_them(value, digits, text):
  assert number(value, digits) == text


@pytest.fixture(scope="module")
def made():
  return planted.with_series(planted.dataset())


@pytest.fixture
def quick(monkeypatch):
  """Pictures are drawn, but not rendered, which takes most of the time."""

  def figure(draw, alt, caption):
    draw(Figure().subplots())
    return f'<img alt="{escape(alt)}">{escape(caption)}'

  monkeypatch.setattr(_sections, "figure", figure)


def warnings_of(page):
  """Titles of the warnings on a page."""
  box = re.search(r'<section class="note.*?</section>', page, re.S)
  return re.findall(r"<li><b>(.*?)</b>", box.group(), re.S)


@pytest.mark.usefixtures("quick")
def test_what_was_planted_is_told(made):
  page = _page.make_page(made, name="run.nc")
  text = words(page)
  rise = made.step.values[np.flatnonzero(made.phase[:, 0, 1, 0] == 2)[0]]
  assert abs(rise - planted.EVERY * planted.RISE) <= 200
  assert re.search(rf"An edge rises (at step|between steps).*{rise:,}.* in all 3 seeds", text)
  assert f"a rise from step {rise:,}" in text
  assert "a plateau from step 1,3" in text
  assert "At the end, step 4,000: no edge." in text
  assert "There k* is 1 in 100" in text
  assert "Where all exceed noise, they agree on k*" in text
  assert "data shift" in text
  assert "loss: 30 values" in text
  assert "looks back 200 steps" in text
  assert "count, dim 4096, seed 0" in text
  assert warnings_of(page) == []
  assert "No warnings" in text
  other = words(_page.make_page(made, window=5, group="head"))
  assert "group “head” in windows of 5 rows" in other
  assert "No edge is seen" in other


def with_bit(made, bit, **where):
  status = made.status.copy(deep=True)
  status.loc[where] = status.loc[where] | int(bit)
  return made.assign(status=status)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
  ("title", "change"),
  [
    ("Window not full.", lambda r: r.isel(step=slice(7))),
    ("Short rows.", lambda r: r.assign_attrs(every=9)),
    ("Momentum explains PC1.", lambda r: r.assign_attrs(momentum=0.95)),
    ("Effective dimension low.", lambda r: with_bit(r, Status.LOW_EFFECTIVE_DIM, step=400)),
    ("Steps skipped: not finite.", lambda r: with_bit(r, Status.NONFINITE_SKIPPED, step=400)),
    ("Steps skipped: zero updates.", lambda r: with_bit(r, Status.ZERO_SKIPPED, group="head")),
    ("Rows of unequal length.", lambda r: with_bit(r, Status.PARTIAL_ROW, window=5)),
    ("Rounding.", lambda r: with_bit(r, Status.CANCELLATION, step=400)),
    ("Untracked leaves.", lambda r: with_bit(r, Status.UNTRACKED, seed=8)),
    ("Unknown group.", lambda r: with_bit(r, Status.UNKNOWN_GROUP, step=400)),
    ("The map changed.", lambda r: with_bit(r, Status.MAP_CHANGED, step=400)),
    ("Below float32’s floor.", lambda r: with_bit(r, Status.BELOW_FLOOR, step=400)),
    ("Unknown status.", lambda r: with_bit(r, 1 << 20, step=400)),
    ("Edge ambiguous.", lambda r: r.assign(edge_ambiguous=xr.ones_like(r.edge_ambiguous))),
    ("Values missing.", lambda r: r.assign(gap_ratio=r.gap_ratio.where(r.step != 400))),
  ],
)
def test_a_warning_where_its_cause_is_and_no_other(made, title, change):
  assert warnings_of(_page.make_page(change(made))) == [title]


@pytest.mark.usefixtures("quick")
def test_a_window_that_never_fills_in_one_seed(made):
  here = (made.seed == 8) & (made.group == "all")
  phase = xr.where(here, 0, made.phase).transpose(*made.phase.dims)
  some = made.assign(phase=phase, k_star=made.k_star.where(~here, 0))
  assert "Window not full." in warnings_of(_page.make_page(some))
  assert "in some seeds, so there is no edge to look for" in words(_page.make_page(some))


@pytest.mark.usefixtures("quick")
def test_rows_of_unequal_length_are_not_said_to_be_alike(made):
  """Such as those of checkpoints at steps 1, 2, 4, ..., of which the record's `every` is but one."""
  row_steps = xr.where(made.step > 2000, 512, 1).broadcast_like(made.status).transpose(*made.status.dims)
  odd = with_bit(made, Status.PARTIAL_ROW).assign(row_steps=row_steps).assign_attrs(every=1, momentum=0.9)
  text = words(_page.make_page(odd))
  assert "in windows of 10 rows of 1 to 512 steps each" in text
  assert "looks back 10 rows" in text
  assert warnings_of(_page.make_page(odd)) == ["Rows of unequal length."]
  assert "What noise shows is that of rows of 1 step." in text


@pytest.mark.usefixtures("quick")
def test_numbers_that_are_missing_are_not_a_window_that_fills(made):
  text = words(_page.make_page(made.assign(gap_ratio=made.gap_ratio * np.nan)))
  assert "The gap ratio is NaN or infinite in every full window, so nothing can be said about an edge." in text
  assert "never full" not in text
  assert "Window not full" not in text
  some = made.assign(pc1_fraction=made.pc1_fraction.where(made.step != 400))
  assert warnings_of(_page.make_page(some)) == ["Values missing."]


@pytest.mark.usefixtures("quick")
def test_momentum_that_was_not_told_is_asked_about(made):
  """Ratios that exceed white noise and not what momentum 0.9 makes of it."""
  low = made.assign(gap_ratio=xr.where(made.gap_ratio > 0, 1.1, made.gap_ratio).astype("float32"), k_star=made.k_star)
  low = low.assign(k_star=xr.where(made.k_star > 0, 1, 0), edge_ambiguous=xr.zeros_like(made.edge_ambiguous))
  assert warnings_of(_page.make_page(low.assign_attrs(every=10))) == ["Momentum may explain the edge."]
  del low.attrs["momentum"]
  assert "does not record the optimizer’s momentum" in words(_page.make_page(low.assign_attrs(every=10)))
  assert warnings_of(_page.make_page(low.assign_attrs(every=10, momentum=0.5))) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("value", [np.nan, np.inf, -5.0, 0, 2.0**63, "soon", [1, 2]])
def test_attributes_that_cannot_be_are_as_if_not_recorded(made, value):
  odd = made.assign_attrs(every=value, momentum=value) if value else made.assign_attrs(every=value, momentum=1.5)
  text = words(_page.make_page(odd))
  assert "Recorded with a value that cannot be: every and momentum." in text
  assert "in windows of 10 rows; tables" in text


@pytest.mark.usefixtures("quick")
def test_text_from_the_file_is_escaped(made):
  evil = "<script>alert(1)</script>"
  bad = made.assign_coords(group=["all", evil, "head"]).rename(loss=evil, loss_step=f"{evil}_step")
  bad = bad.assign_attrs(command=f'{evil}"&').assign(event=("event_step", np.asarray([evil, "x"], object)))
  page = _page.make_page(bad, name=evil)
  assert "<script" not in page
  assert page.count("&lt;script&gt;") >= 4


@pytest.mark.usefixtures("quick")
def test_events_and_series_beyond_the_record(made):
  """Events of no row have no phase; infinite values are neither least nor greatest."""
  far = made.assign(accuracy=made.accuracy.copy(data=[np.inf, 0.4, -np.inf])).assign_coords(event_step=[3, 10**6])
  text = words(_page.make_page(far))
  assert "data shift before the first row 3" in text
  assert "learning rate halved after the last row 1,000,000" in text
  assert "accuracy: 3 values, least 0.4, greatest 0.4, at the end 0.4, at step" in text
  assert "; after it 1 value, none finite." in text


@pytest.mark.parametrize("case", ["one row", "never full", "one seed", "no series", "all NaN", "no attributes"])
def test_corner_cases_make_a_page(made, case):
  few = made.drop_dims(["loss_step", "accuracy_step", "event_step"])
  few = {
    "one row": few.isel(step=[150]),
    "never full": few.isel(step=slice(4)),
    "one seed": few.isel(seed=[0]),
    "no series": few,
    "all NaN": few.map(lambda x: x * np.nan if x.dtype.kind == "f" else x),
    "no attributes": few.drop_attrs(),
  }[case]
  page = _page.make_page(few)
  text = words(page)
  assert page.count("<img ") == page.count("alt=")
  assert {
    "one row": "step 3,020 alone",
    "never full": "The window is never full, so nothing can be said",
    "one seed": "One run, steps 20 to 4,000",
    "no series": "3 seeds",
    "all NaN": "The gap ratio is NaN or infinite in",
    "no attributes": "Not recorded: sketch, every, momentum and source.",
  }[case] in text
  assert ("Do the seeds agree?" in text) == (case != "one seed")
  assert "nan" not in text.split()


def test_a_series_without_values_and_a_name_that_is_no_text(tmp_path):
  path = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.nc")
  few = planted.dataset(1, 3)
  empty = few.assign(
    loss=("loss_step", np.zeros(0)), accuracy=(("accuracy_step", "seed"), np.zeros((0, few.sizes["seed"])))
  )
  empty = empty.assign_coords(loss_step=np.zeros(0, int), accuracy_step=np.zeros(0, int))
  empty.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  os.rename(tmp_path / "run.nc", path)
  assert main(["report", path, "-o", str(tmp_path / "page.html")]) == 0
  text = words((tmp_path / "page.html").read_text())
  assert "What happened in caf\\udce9.nc" in text
  assert "loss: no values. accuracy: no values." in text
  with pytest.raises(ValueError, match="the series 'loss' has no values to draw"):
    plot.series(empty, "loss")


def test_record_is_read_in_blocks_and_says_the_same(made, monkeypatch):
  whole = _summary._read(made, 1, 0)
  monkeypatch.setattr(_summary, "_BLOCK", 18 * 7)
  parts = _summary._read(made, 1, 0)
  for field, value in vars(whole[0]).items():
    np.testing.assert_allclose(value, getattr(parts[0], field), err_msg=field, rtol=1e-6)
  for one, other in zip(whole[1:], parts[1:], strict=True):
    xr.testing.assert_identical(one, other)


def test_command_line(made, tmp_path, capsys):
  made.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  out = tmp_path / "report.html"
  assert main(["report", str(tmp_path / "run.nc"), "-o", str(out)]) == 0
  assert "What happened in run.nc" in out.read_text()
  assert sorted(os.listdir(tmp_path)) == ["report.html", "run.nc"]
  assert out.stat().st_size < 3e6
  assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("make", "args", "said"),
  [
    (None, [], "there is no record"),
    (lambda path: path.write_text("no record"), [], "cannot read"),
    (lambda path: planted.dataset(1, 3).drop_vars("phase").to_netcdf(path, engine="h5netcdf"), [], "lacks phase"),
    (lambda path: planted.dataset(1, 3, record_version=99).to_netcdf(path, engine="h5netcdf"), [], "version 99"),
    (
      lambda path: planted.dataset(1, 3).to_netcdf(path, engine="h5netcdf"),
      ["--window", "6"],
      "no window 6; it has 5, 10",
    ),
    (lambda path: planted.dataset(1, 3).to_netcdf(path, engine="h5netcdf"), ["--group", "x"], "no group 'x'"),
  ],
)
def test_bad_input_gets_one_sentence(make, args, said, tmp_path, capsys):
  path = tmp_path / "run.nc"
  if make:
    make(path)
  assert main(["report", str(path), "-o", str(tmp_path / "report.html"), *args]) == 1
  err = capsys.readouterr().err
  assert said in err
  assert err.startswith("sedjax")
  assert err.count("\n") == 1
  assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_written(made, tmp_path, capsys):
  made.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  assert main(["report", str(tmp_path / "run.nc"), "-o", str(tmp_path / "nowhere" / "report.html")]) == 1
  err = capsys.readouterr().err
  assert "No such file or directory" in err
  assert "nowhere/report.html cannot be written" in err


@pytest.mark.parametrize(
  ("record", "out", "words"),
  [
    ("run.nc", "run.nc", "the page cannot take the place of its record"),
    ("live.nc", "live.nc", "the page cannot take the place of its record"),
    ("run.nc", "live.nc.journal", "exists and is no page, so it is not replaced"),
    ("run.nc", "thesis.txt", "exists and is no page, so it is not replaced"),
    ("run.nc", "pipe", "exists and is no page, so it is not replaced"),
    ("run.nc", "folder", "which is no name or a folder's; name a file"),
    ("run.nc", ".", "which is no name or a folder's; name a file"),
    ("folder", "report.html", "is a folder; name the file of a record"),
    ("pipe", "report.html", "is a device or a pipe; name the file of a record"),
    ("piped.nc", "report.html", "is a device or a pipe; name the file of a record"),
  ],
)
def test_a_page_takes_no_other_files_place(small, tmp_path, capsys, record, out, words):
  shutil.copytree(small, tmp_path, dirs_exist_ok=True)
  (tmp_path / "folder").mkdir()
  for name in ("pipe", "piped.nc.journal"):
    os.mkfifo(tmp_path / name)
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  assert main(["report", str(tmp_path / record), "-o", str(tmp_path / out)]) == 1
  err = capsys.readouterr().err
  assert words in err
  assert err.count("\n") == 1
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_record_without_a_name(tmp_path, capsys):
  assert main(["report", ".", "-o", str(tmp_path / "report.html")]) == 1
  assert ". is a folder; name the file of a record" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_page_takes_an_older_pages_place(small, tmp_path):
  for beginning in ("", "<!DOCTYPE html>\n<p>old"):
    (tmp_path / "report.html").write_text(beginning)
    assert main(["report", str(small / "run.nc"), "-o", str(tmp_path / "report.html")]) == 0
    assert "What happened in run.nc" in (tmp_path / "report.html").read_text()


def test_a_damaged_record_is_named(tmp_path, capsys):
  path = tmp_path / "run.nc"
  _netcdf.write_new(path, planted.dataset(1, 3))
  with h5py.File(path) as file:
    chunk = file["pc1_fraction"].id.get_chunk_info(0)
  with open(path, "r+b") as file:
    file.seek(chunk.byte_offset)
    file.write(b"\0" * chunk.size)
  assert main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 1
  err = capsys.readouterr().err
  assert re.match(r"sedjax\.record: pc1_fraction cannot be read from .*run\.nc, which is damaged \(", err)
  assert err.count("\n") == 1
  with record.open_record(path) as found, pytest.raises(ValueError, match=r"pc1_fraction cannot be read"):
    found.pc1_fraction.load()
  assert os.listdir(tmp_path) == ["run.nc"]


@pytest.mark.parametrize("missing", ["matplotlib", "h5netcdf", "xarray"])
def test_missing_extra_is_named(made, missing, tmp_path):
  made.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  code = f"import sys; sys.modules[{missing!r}] = None\nfrom sedjax.__main__ import main\nsys.exit(main(sys.argv[1:]))"
  command = [sys.executable, "-c", code, "report", tmp_path / "run.nc", "-o", tmp_path / "page.html"]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 1
  assert re.search(r"sedjax\[(io|plot|io,plot)\]", done.stderr)
  assert "Traceback" not in done.stderr


def test_a_terminal_without_the_characters_of_a_name(made, tmp_path, monkeypatch):
  made.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
  assert main(["report", str(tmp_path / "run.nc"), "-o", str(tmp_path / "σ.html")]) == 0
  assert main(["report", str(tmp_path / "β.nc"), "-o", str(tmp_path / "σ.html")]) == 1
  for stream, text in ((sys.stdout, b"\\u03c3.html"), (sys.stderr, b"\\u03b2.nc")):
    stream.flush()
    assert text in stream.buffer.getvalue()


@pytest.mark.parametrize("args", [["--help"], ["report", "--help"], ["analyze", "--help"]])
def test_help_has_an_example(args, capsys):
  with pytest.raises(SystemExit) as ended:
    main(args)
  assert ended.value.code == 0
  command = "analyze 'run/step_*/model.safetensors' -o run.nc" if "analyze" in args else "report run.nc -o report.html"
  assert f"sedjax {command}" in capsys.readouterr().out


def test_arguments_that_cannot_be_read(capsys):
  with pytest.raises(SystemExit) as ended:
    main(["report"])
  assert ended.value.code == 2
  assert "the following arguments are required" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
  """A folder with a page whose names are long."""
  folder = tmp_path_factory.mktemp("page")
  long = made.assign_coords(group=["all", "a_name_of_a_group_without_any_place_to_break_it/" * 3, "head"])
  long = long.assign_attrs(command="x" * 300, sketch_id=np.arange(4))
  _page.write_page(with_bit(long, Status.LOW_EFFECTIVE_DIM, step=400), folder / "page.html", name="a" * 70 + ".nc")
  return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844), (360, 740)])
def test_in_a_browser(folder, size):
  """No console error, no request but the page itself, nothing wider than the window, all pictures there."""
  playwright = pytest.importorskip("playwright.sync_api")
  serve = functools.partial(Quiet, directory=str(folder))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, playwright.sync_playwright() as tools:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    view = browser.new_page(viewport={"width": size[0], "height": size[1]})
    trouble, asked = [], []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("requestfailed", lambda request: trouble.append(request.url[:80]))
    view.on("request", lambda request: asked.append(request.url))
    address = f"http://127.0.0.1:{server.server_port}/page.html"
    view.goto(address)
    wide, inner = view.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    pictures = view.evaluate("[...document.images].map(x => [x.complete, x.naturalWidth, x.alt, x.clientWidth])")
    outside = view.evaluate(
      "[...document.querySelectorAll('main *')].filter(x => !x.closest('.scroll') && "
      "x.getBoundingClientRect().right > innerWidth + 1).length"
    )
    cut = view.evaluate(
      "[...document.querySelectorAll('.few')].map(x => x.parentElement.scrollWidth - x.parentElement.clientWidth)"
    )
    groups = view.evaluate("(x => x.scrollWidth - x.clientWidth)(document.querySelector('.many').parentElement)")
    browser.close()
    server.shutdown()
  assert trouble == []
  assert {url for url in asked if not url.startswith("data:")} == {address}
  assert wide <= inner
  assert outside == 0
  assert cut == [0, 0, 0]  # of phases, events and provenance nothing has to be scrolled to
  assert groups == 0 or size[0] < 1280
  assert len(pictures) == 8
  for complete, natural, alt, shown in pictures:
    assert complete
    assert natural > 0
    assert alt
    assert 250 < shown <= size[0]


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    del args
