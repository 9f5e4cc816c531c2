"What a user of a trained model gets must be what was evaluated, for every file that was given."

import shutil
from functools import partial

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import HOSTILE_SETS, make_dataset, make_file, to_bytes

from ich_fastai.calibrate import calibrate, fit_decisions, score_levels
from ich_fastai.evaluate import evaluate
from ich_fastai.core import InputError, read_stage, save_table
from ich_fastai.deliver import ich_predict
from ich_fastai.viewer import view_held_out
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.model import load_model
from ich_fastai.cache import Cache
from ich_fastai.cohort import find_neighbors, input_addresses
from ich_fastai.exports import write_export
from ich_fastai.head import draw_head, make_rng
from ich_fastai.labels import find_dataset
from ich_fastai.cohort import measure_geometry
from ich_fastai.model import predict_logits
from ich_fastai.predict import CALLS, SETS, decide, predict_held_out, predict_study, summarize_studies
from ich_fastai.tables import make_harmless, make_submission, read_sample
from ich_fastai.tiny import tiny_phantom


@pytest.fixture(scope="module")
def trained(simulated_run, write_predictions):
    "A run folder with an evaluated model."
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    evaluate(simulated_run, None, n_boot=20)
    return simulated_run


def test_a_studys_probability_is_the_one_that_was_evaluated(trained):
    card, predictions = read_stage(trained, "model/model.json"), read_stage(trained, "predictions.parquet")
    study = score_levels(predictions)["study"]
    fitted = card["corrections"]["study_calibration"]
    slope, intercept = (np.array([fitted[label][name] for label in LABELS]) for name in ("slope", "intercept"))
    order = predictions["StudyInstanceUID"].drop_duplicates()
    got = summarize_studies(predictions.assign(error=None), card).loc[order, list(LABELS)]
    assert got.to_numpy() == pytest.approx(calibrate(study.x, slope, intercept), abs=1e-9)
    assert predictions["keep_rate"].max() < 1, "or the order of correction and maximum would not matter"


@pytest.mark.parametrize("level", ["slice", "study"])
def test_calls_and_sets_are_those_of_the_fit(trained, level):
    card, predictions = read_stage(trained, "model/model.json"), read_stage(trained, "predictions.parquet")
    d, studies = score_levels(predictions)[level], predictions["StudyInstanceUID"]
    got = decide(predictions[LOGITS].to_numpy(), card, pd.factorize(studies)[0] if level == "study" else None)
    mine = d.fold == card["training"]["folds"][0]["fold"]  # whose network the model is
    fit = fit_decisions(d.y[mine], d.x[mine], d.patients[mine], level=level)
    p, known = calibrate(d.x, fit.slope, fit.intercept), np.isfinite(fit.threshold)
    called = np.where(known, p >= fit.threshold, np.nan)
    assert got[CALLS].astype(float).to_numpy() == pytest.approx(called, nan_ok=True)
    assert got["call_any"].nunique() == 2, "or nothing was compared"
    present, absent = d.x >= fit.present_from, d.x <= fit.absent_to
    assert ((got[SETS] == "present").to_numpy() == (present & ~absent)).all()
    assert ((got[SETS] == "absent").to_numpy() == (absent & ~present)).all() and "undecided" in got[SETS].to_numpy()


def test_each_file_is_a_row_that_can_be_told_apart(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good").write_bytes(make_file(SOPInstanceUID="ID_same"))
        (tmp_path / name / "bad").write_bytes(b"junk")
    result = predict_study(load_model(trained / "model", "cpu"), tmp_path, all_series=True).set_index("file")
    assert sorted(result.index) == ["a/bad", "a/good", "b/bad", "b/good"]
    assert result["error"].isna().tolist() == result["any"].notna().tolist() and result["error"].isna().sum() == 1
    assert result.loc["b/good", "error"] == "duplicate: same SOPInstanceUID as a/good"


@pytest.mark.parametrize("harm", ["[]", "{", "weights", "file", "device"])
def test_a_model_of_no_use_is_one_line(trained, tmp_path, harm):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    if harm in ("[]", "{"):
        (folder / "model.json").write_text(harm)
    elif harm == "weights":
        (folder / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError) as e:
        load_model(folder / "model.json" if harm == "file" else folder, "nowhere" if harm == "device" else "cpu")
    assert "\n" not in str(e.value)


def test_no_files_are_an_error(trained):
    with pytest.raises(InputError, match="nothing in it"):
        predict_study(load_model(trained / "model", "cpu"), [])


def write_sample(csv, slices):
    csv.write_text("ID,Label\n" + "".join(f"{s}_{label},0.5\n" for s in slices for label in LABELS))
    return csv


def test_submission_follows_the_sample(tmp_path):
    wanted = read_sample(write_sample(tmp_path / "sample.csv", ("ID_c", "ID_a", "ID_b")))
    p = np.random.default_rng(0).uniform(size=(4, 6))
    slices = pd.DataFrame(p, columns=LABELS).assign(SOPInstanceUID=[f"ID_{s}" for s in "abcd"])
    twice = pd.concat([slices.iloc[:1].assign(**dict.fromkeys(LABELS)), slices])  # a duplicate has no probabilities
    table = make_submission(twice, wanted)
    assert table["ID"].to_list() == wanted.to_list()
    assert table["Label"].to_numpy() == pytest.approx(p[[2, 0, 1]].ravel(), abs=1e-12)
    with pytest.raises(InputError, match="6 of 18 rows of the sample have no probability, e.g. ID_c_epidural"):
        make_submission(slices[slices["SOPInstanceUID"] != "ID_c"], wanted)
    with pytest.raises(InputError, match="sample.csv: asks for epidural, .*, on which the model was not trained"):
        read_sample(tmp_path / "sample.csv", ["any"])


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", None])
def test_another_file_is_not_a_sample(tmp_path, text):
    if text is not None:
        (tmp_path / "sample.csv").write_text(text)
    with pytest.raises(InputError, match=r"sample\.csv: not a sample submission with the columns ID,Label"):
        read_sample(tmp_path / "sample.csv")


def test_the_command_writes_slices_studies_and_a_submission(trained, command, tmp_path):
    (tmp_path / "study").mkdir()
    for k, uid in enumerate(("ID_a", "ID_b")):
        file = make_file(
            SOPInstanceUID=uid, ImagePositionPatient=["-120", "-120", str(5 * k)], StudyInstanceUID="1." * 31
        )
        (tmp_path / "study" / uid).write_bytes(file)
    (tmp_path / "study" / "bad").write_bytes(b"junk")
    sample = write_sample(tmp_path / "sample.csv", ("ID_b", "ID_a"))
    arguments = (
        trained / "model",
        tmp_path / "study",
        tmp_path / "out.csv",
        "--device",
        "cpu",
        "--all-series",
        "--submission",
    )
    done = command("ich-predict", *arguments, sample, cold=True)  # or an import that only warm Pythons have is missed
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    assert max(map(len, table)) <= 80 and last.startswith("3 images, 1 not used")
    slices, studies, submission = (pd.read_csv(tmp_path / f"out{s}.csv") for s in ("", "-studies", "-submission"))
    assert slices[["call_any", *SETS]].isna().any(axis=1).tolist() == [False, False, True], "the last cannot be read"
    assert studies["slices"].to_list() == [2] and studies[SETS].isin(["present", "absent", "undecided"]).all(axis=None)
    assert submission["ID"].to_list() == pd.read_csv(sample)["ID"].to_list()
    of = slices.set_index("SOPInstanceUID").loc[["ID_b", "ID_a"], list(LABELS)]
    assert submission["Label"].to_numpy() == pytest.approx(of.to_numpy().ravel(), abs=1e-9)
    done = command("ich-predict", *arguments, tmp_path / "nowhere.csv")
    assert done.returncode == 1 and "not a sample submission" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    "A patient's export, and the patient's one right series."
    folder, rng = tmp_path_factory.mktemp("export"), make_rng(5, 0)
    names = ["thick", "noisy", "coronal", "contrast", "scout", "capture", "report"]
    write_export(folder, draw_head(rng), [], names, shrink=2)
    return folder


def test_the_answer_is_that_of_the_right_series_alone(trained, export):
    model = load_model(trained / "model", "cpu")
    whole, alone = (predict_study(model, path) for path in (export, export / "thick"))
    used = whole[whole["error"].isna()]
    assert used["SeriesDescription"].unique().tolist() == ["thick"] and len(alone) == 16
    pd.testing.assert_frame_equal(used[LOGITS].reset_index(drop=True), alone[LOGITS])
    one, other = (summarize_studies(t, model.card)[list(LABELS)] for t in (whole, alone))
    pd.testing.assert_frame_equal(one, other)
    assert whole.loc[whole["SeriesDescription"].eq("noisy"), "error"].str.startswith("series not used: noise").all()


def test_ordinary_series_have_the_logits_of_the_cache(trained, tmp_path):
    model, rows = load_model(trained / "model", "cpu"), read_stage(trained, "slices.parquet")
    rows = rows[rows["error"].isna() & rows["rows"].eq(rows["columns"])]
    rows = rows[rows["SeriesInstanceUID"].eq(rows["SeriesInstanceUID"].iloc[0])]
    card = model.card | {"geometry": measure_geometry(rows)}
    dicom_dir = find_dataset(tiny_phantom()).dicom_dir
    table = predict_study(model._replace(card=card), [dicom_dir / f for f in rows["file"]], all_series=True)
    hu, near = Cache(trained / "cache"), find_neighbors(rows).loc[table["SOPInstanceUID"]]
    addresses = input_addresses(near, model.settings.neighbors)
    batch = hu.gather(addresses.ravel())
    logits = predict_logits(model, batch, np.arange(addresses.size).reshape(addresses.shape))
    np.testing.assert_array_equal(table[LOGITS].to_numpy(), logits)


def test_the_command_takes_several_inputs_and_spares_other_files(trained, export, command, tmp_path):
    files, model = sorted((export / "thick").iterdir()), trained / "model"
    done = command("ich-predict", model, *files, tmp_path / "a.csv", "--device", "cpu")
    assert done.returncode == 0 and "* thick" in done.stdout, done.stderr[-2000:]
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    series = pd.read_csv(tmp_path / "a-series.csv")
    assert series["used"].tolist() == [True] and series["SeriesDescription"].tolist() == ["thick"]
    (tmp_path / "b.csv").write_text("mine,not yours\n")
    for out, why in (("b.csv", "there is another file of that name"), ("in", "one that ends in .csv")):
        done = command("ich-predict", model, files[0], "--out", tmp_path / out, "--device", "cpu")
        assert done.returncode == 1 and why in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "b.csv").read_text() == "mine,not yours\n"
    done = command("ich-predict", model, export / "coronal", tmp_path / "c.csv", "--device", "cpu")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "no usable series in 16 images, e.g. coronal: not axial" in last
    assert not (tmp_path / "c.csv").exists() and "Traceback" not in done.stderr


def test_text_of_a_file_does_no_harm():
    table = pd.DataFrame({"a": ["=HYPERLINK(1)", "\x1b[31mred", None, "plain"], "z_mm": [-1.0, 2.0, 3.0, 4.0]})
    got = make_harmless(table)
    assert got["a"].tolist()[:2] == ["'=HYPERLINK(1)", r"\x1b[31mred"] and got["z_mm"].tolist() == [-1.0, 2, 3, 4]
    assert got["a"].iloc[3] == "plain" and pd.isna(got["a"].iloc[2])


def test_without_a_square_study_to_show_one_line_says_so(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    table = read_stage(trained, "slices.parquet")
    save_table(table.assign(columns=table["rows"] + 1), tmp_path / "run" / "slices.parquet")
    with pytest.raises(InputError, match="no held-out study has square slices"):
        predict_held_out(tmp_path / "run", tiny_phantom())


def test_held_out_studies_are_found_without_a_study_uid(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    save_table(read_stage(run, "slices.parquet").assign(StudyInstanceUID=""), run / "slices.parquet")
    rows = read_stage(run, "predictions.parquet")
    rows["StudyInstanceUID"] = "no StudyInstanceUID: " + rows["PatientID"]
    save_table(rows, run / "predictions.parquet")
    assert len(predict_held_out(run, tiny_phantom())) and len(view_held_out(run, tiny_phantom()))
    assert "brain window (40, 80) HU" in (run / "tables" / "captions.csv").read_text()


def test_a_series_that_is_asked_for_is_the_answer(trained, export, tmp_path, capsys):
    uids = {name: pydicom.dcmread(next((export / name).iterdir())).SeriesInstanceUID for name in ("thick", "noisy")}
    ask = partial(ich_predict, str(trained / "model"), [str(export)], device="cpu")
    ask(str(tmp_path / "a.csv"), series=str(uids["noisy"]))
    slices = pd.read_csv(tmp_path / "a.csv")
    assert slices.loc[slices["any"].notna(), "SeriesDescription"].unique().tolist() == ["noisy"]
    assert "used, though noise" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match=f"--series 1.2.3: no readable series.*{uids['thick']}") as error:
        ask(str(tmp_path / "b.csv"), series="1.2.3")
    assert "\n" not in str(error.value) and not (tmp_path / "b.csv").exists()


def test_no_codec_and_no_escape_code_of_a_file_reaches_screen_or_table(trained, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k, named in enumerate(HOSTILE_SETS):
        place = ["-120", "-120", str(5 * k)]
        ds = make_dataset(SOPInstanceUID=f"1.2.{k}", SpecificCharacterSet=named.split("\\"), ImagePositionPatient=place)
        ds.add_new("PatientID", "LO", b"P")
        ds.add_new("SeriesDescription", "LO", b"\\ud800\x1b[31mred")
        ds.add_new("StudyInstanceUID", "UI", b"1.2\x1b[2J\x1b]0;title\x07")
        (tmp_path / "in" / f"{k}.dcm").write_bytes(to_bytes(ds))
    out = str(tmp_path / "out.csv")
    ich_predict(str(trained / "model"), [str(tmp_path / "in")], out, device="cpu", all_series=True)
    shown = capsys.readouterr()
    assert "1.2" in shown.out and "\x1b" not in shown.out + shown.err and "\x07" not in shown.out
    slices = pd.read_csv(out)
    assert slices["any"].notna().all() and len(slices) == len(HOSTILE_SETS)
    for path in tmp_path.glob("out*.csv"):
        assert not {"\x1b", "\x07"} & set(path.read_text()), path.name
