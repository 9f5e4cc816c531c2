"A folder of many patients is read study by study: the answers are the same, and what is finished stays."

import contextlib
import errno
import io
import os
import shutil

import pandas as pd
import pydicom
import pytest

from ich_fastai import tables as tables_module
from ich_fastai.core import InputError
from ich_fastai.deliver import MOST, Screen, explain_stop, ich_predict, predict_files
from ich_fastai.exports import View, write_view
from ich_fastai.head import draw_head, make_rng
from ich_fastai.images import OTHER, index_export
from ich_fastai.model import load_model
from ich_fastai.predict import predict_study
from ich_fastai.series import survey_files
from ich_fastai.tables import Progress, Tables


@pytest.fixture(scope="module")
def model(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    return load_model(simulated_run / "model", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three patients, of whom one has nothing usable; and a file that is no image."
    home, head = tmp_path_factory.mktemp("many"), draw_head(make_rng(5, 0))
    for k, n in enumerate((10, 3, 12)):
        ids = {"PatientID": f"P{k}", "StudyInstanceUID": f"1.{k}", "SeriesInstanceUID": f"1.{k}.1"}
        write_view(home / f"P{k}", head, [], View(n=n, size=64), ids)
    (home / "notes.txt").write_text("not an image")
    return home


def start(home, resume=False, **begun):
    return Tables([home / f"out{name}.csv" for name in ("", "-studies", "-series")], begun, resume)


class Stop(Progress):
    "Ctrl-C after so many studies."

    def __init__(self, after):
        self.after = after
        super().__init__(io.StringIO())

    def __call__(self, what, done, *_):
        if what == "studies read" and done == self.after:
            raise KeyboardInterrupt


def run(model, folder, tables, **how):
    with contextlib.redirect_stdout(io.StringIO()) as screen, explain_stop(tables):
        predict_files(model, [str(folder)], tables, **how)
    return screen.getvalue()


@pytest.fixture(scope="module")
def whole(model, folder, tmp_path_factory):
    "The bytes of the tables of a run that nobody stopped."
    tables = start(tmp_path_factory.mktemp("whole"))
    return run(model, folder, tables), [path.read_bytes() for path in tables.paths]


def test_by_study_is_as_all_at_once(model, folder, whole, tmp_path):
    export, survey = index_export(folder, tmp_path), survey_files(folder, tmp_path)
    assert [*export.studies] == ["1.0", "1.1", "1.2", OTHER] and export.lost.total() == 1
    for study in export.studies:
        expected = survey.images[survey.images["study"].eq(study)].reset_index(drop=True).drop(columns="series")
        got = export.read(study)
        pd.testing.assert_frame_equal(got[sorted(got)], expected.assign(error=got["error"])[sorted(got)])
    (tmp_path / "out.csv").write_bytes(whole[1][0])
    got, expected = pd.read_csv(tmp_path / "out.csv"), predict_study(model, folder)
    assert got["file"].to_list() == expected["file"].to_list() and got["error"].isna().sum() == 22
    assert got["any"].to_numpy() == pytest.approx(expected["any"].to_numpy(float), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_run_keeps_what_is_finished_and_goes_on(model, folder, whole, tmp_path, after):
    tables = start(tmp_path)
    if after:
        with pytest.raises(InputError, match=f"^stopped; {after} of 4 studies are finished, --resume goes on$"):
            run(model, folder, tables, progress=Stop(after))
        for path in tables.paths:  # what a kill in the middle of a study leaves
            path.write_bytes(path.read_bytes() + b"half of a row")
    called = []
    run(model, folder, start(tmp_path, resume=True), writers=[lambda _, study: called.append(study.uid)])
    assert [path.read_bytes() for path in tables.paths] == whole[1]
    assert called == {0: ["1.0", "1.2"], 1: ["1.2"], 3: []}[after], "finished studies are not read again"


def test_a_full_disk_is_one_line_and_leaves_tables_whole(model, folder, whole, tmp_path, monkeypatch):
    write, n = tables_module.write_at, []

    def fill(path, size, data):
        n.append(path)
        if len(n) == 6:  # of four files a study
            write(path, size, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, size, data)

    monkeypatch.setattr(tables_module, "write_at", fill)
    with pytest.raises(InputError, match="out-studies.csv: cannot be written .No space left.*; 1 of 4 studies are"):
        run(model, folder, tables := start(tmp_path))
    for path, data in zip(tables.paths, whole[1], strict=True):
        assert data.startswith(path.read_bytes()) and path.read_bytes().endswith(b"\n")
    run(model, folder, start(tmp_path, resume=True))
    assert [path.read_bytes() for path in tables.paths] == whole[1]


@pytest.fixture(scope="module")
def once(model, folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("once")
    run(model, folder / "P0", start(home, **{"model": "a", "--html": ""}))
    return home


@pytest.mark.parametrize("change", ["model", "--html", "tables", "study", "list"])
def test_another_run_is_not_gone_on_with(model, folder, once, tmp_path, change):
    begun = {"model": "a", "--html": ""}
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    tables = start(tmp_path, **begun)
    why = {
        "model": "begun with another model; give the same",
        "--html": "begun with another --html",
        "tables": "its tables were changed since",
        "study": "1.0: 9 images, 10 when it was read",
        "list": "not a list of finished studies",
    }
    if change == "tables":
        tables.paths[1].write_text("short\n")
    if change == "list":
        tables.list.write_text("dear diary\n")
    files = sorted((folder / "P0").iterdir())[1:] if change == "study" else [folder / "P0"]
    with pytest.raises(InputError, match=why[change]) as e:
        tables = start(tmp_path, resume=True, **begun | {change: "b"} if change in begun else begun)
        predict_files(model, [*map(str, files)], tables)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", '{"beg', '{"begun": {"model"'])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_at_its_first_line_blocks_nothing(model, folder, tmp_path, text, resume):
    start(tmp_path).list.write_text(text)
    run(model, folder / "P0", tables := start(tmp_path, resume=resume))
    assert list(tables.finished) == list(start(tmp_path, resume=True).finished) == ["1.0"]


def test_resume_wants_the_input_and_the_model_that_it_began_with(simulated_run, model, folder, tmp_path):
    weights, out = tmp_path / "model", str(tmp_path / "out.csv")
    shutil.copytree(simulated_run / "model", weights)
    ich_predict(str(weights), [str(folder / "P0")], out)
    before = (tmp_path / "out.csv").read_bytes()
    ich_predict(str(weights), [f"{folder}/P2/../P0"], out, resume=True)
    with pytest.raises(InputError, match="begun with another input; give the same, or start without --resume") as e:
        ich_predict(str(weights), [str(folder / "P2")], out, resume=True)
    assert str(folder) not in (tmp_path / "out-finished.jsonl").read_text() and "\n" not in str(e.value)
    with open(weights / "model.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="begun with another model; give the same"):
        ich_predict(str(weights), [str(folder / "P0")], out, resume=True)
    assert (tmp_path / "out.csv").read_bytes() == before


def test_a_name_that_is_no_utf8_is_a_row(model, folder, tmp_path):
    (tmp_path / "in").mkdir()
    for path in (folder / "P0").iterdir():
        shutil.copy(path, tmp_path / "in" / os.fsdecode(b"=\xff\n\x1b[2J" + path.name.encode()))
    run(model, tmp_path / "in", tables := start(tmp_path))
    slices = pd.read_csv(tables.paths[0])
    assert slices["file"].str.startswith(r"'=\xff\n\x1b[2J").all() and slices["any"].notna().sum() == 10


def test_each_series_is_a_row_of_its_study(model, folder, tmp_path):
    "With --all-series: the study keeps its UID, and the screen tells its rows apart."
    shutil.copytree(folder / "P0", tmp_path / "in" / "a")
    for path in sorted((tmp_path / "in" / "a").iterdir())[:4]:
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID = "1.0.2"
        ds.save_as(path)
    said = run(model, tmp_path / "in", tables := start(tmp_path), all_series=True)
    table = pd.read_csv(tables.paths[1], dtype=str)
    assert table["StudyInstanceUID"].tolist() == ["1.0", "1.0"]
    assert table["SeriesInstanceUID"].tolist() == ["1.0.1", "1.0.2"] and table["slices"].tolist() == ["6", "4"]
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("1.0.")] == [
        ["1.0.1", "6"],
        ["1.0.2", "4"],
    ]


def test_nothing_usable_leaves_no_table(model, folder, tmp_path):
    with pytest.raises(InputError, match="^no usable series in 3 images, e.g. P1: 3 positions"):
        run(model, folder / "P1", start(tmp_path / "out"))
    assert not [*(tmp_path / "out").iterdir()]


def test_a_screen_says_what_it_does_not_show(whole, tmp_path):
    assert "24 images" not in whole[0] and "26 images, 4 not used" in whole[0]
    assert max(map(len, whole[0].splitlines()[:-1])) <= 80
    series = pd.DataFrame(
        {"study": ["1.0"], "description": "a", "slices": 9, "spacing_mm": 5.0, "kernel": "", "uid": "1"}
    )
    series = series.assign(used=False, reason="", notes="", pixel_mm=0.5)
    screen = Screen()
    for k in range(100):
        screen.add(series.assign(study=f"1.{k}"), pd.DataFrame(), [f"note {k}"])
    said = screen.show(start(tmp_path))
    assert said.count("Study 1.") == MOST and "... and 60 more series, in " in said
    assert said.count("note") == 6 and "... and 95 more such notes." in said


@pytest.mark.parametrize("live", [True, False])
def test_progress_fits_a_line(live):
    stream, now = io.StringIO(), [0.0]
    stream.isatty = lambda: live
    progress = Progress(stream, lambda: now[0])
    for done in range(1001):
        progress("headers read", done, 1000)
        now[0] += 0.5
    progress.clear()
    lines = stream.getvalue().replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 79
    said = [line.strip() for line in lines if line.strip()]
    assert len(said) == (1000 if live else 8)
    assert said[-2 if live else 0] == (
        "headers read: 999 of 1,000, 1 s left" if live else "headers read: 120 of 1,000, 7 min left"
    )
