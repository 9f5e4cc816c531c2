"""The whole chain through papermill on the tiny phantom: contracts, resume, failures."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from conftest import CANARY, PROJECT, find_canaries

from ich_fastai.core import InputError
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.inputs import prepare_data
from ich_fastai.reproduce import STAGES, declared_parameters, parse_settings, reproduce


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    "What `reproduce` sets in it, here in the tests' own process, is taken back."
    monkeypatch.setenv("IN_TEST", "1")


def test_the_chain_runs_and_prints_headline_and_report(tiny_run):
    run_dir, done = tiny_run
    assert re.search(r"Report: \S*index\.html", done.stdout)
    assert "synthetic" in done.stdout and "any" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "Report: " not in line) <= 80
    assert [line.split()[0] for line in done.stdout.splitlines() if re.match(r"\d\d_", line)] == list(STAGES)


def test_the_chain_names_nobody(tiny_run):
    run_dir, done = tiny_run
    planted = [path for path in (run_dir / "data" / "stage_1_train_images").iterdir() if len(find_canaries(path)) == 3]
    written = [p for p in run_dir.rglob("*") if p.is_file() and run_dir / "data" not in p.parents]
    assert len(planted) > 50 and {".parquet", ".npy", ".csv", ".ipynb", ".html", ".png"} <= {p.suffix for p in written}
    assert not [p.name for p in written if find_canaries(p)]
    assert CANARY not in done.stdout + done.stderr


def test_the_parameters_arrived_in_each_notebook(tiny_run):
    run_dir, _ = tiny_run
    given = {*json.loads((run_dir / "manifest.json").read_text())["parameters"], "data_dir", "labels_csv", "run_dir"}
    for name in (n for n in STAGES if given & set(declared_parameters(n))):
        cells = json.loads((run_dir / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        tags = [c["metadata"].get("tags", []) for c in cells]
        assert sum("parameters" in t for t in tags) == 1
        assert tags.index(["injected-parameters"]) == next(i for i, t in enumerate(tags) if "parameters" in t) + 1, (
            "injected after the defaults"
        )


def test_cohort_and_predictions_keep_their_contracts(tiny_run):
    run_dir, _ = tiny_run
    slices, cohort, predictions = (
        pd.read_parquet(run_dir / f"{name}.parquet") for name in ("slices", "cohort", "predictions")
    )
    assert cohort["SOPInstanceUID"].is_unique and predictions["SOPInstanceUID"].is_unique
    assert slices["error"].notna().any(), "the phantom's truncated file is a row with its error"
    flow = pd.read_csv(run_dir / "tables" / "flow.csv", index_col="step")["slices"]
    assert flow["with a file"] - flow["readable, not excluded"] == slices["error"].notna().sum(), (
        "it has a file, and is lost to being unreadable"
    )
    assert set(predictions["SOPInstanceUID"]) <= set(cohort["SOPInstanceUID"])
    assert cohort.groupby("PatientID")["fold"].nunique().max() == 1
    both = predictions.merge(cohort, on="SOPInstanceUID", suffixes=("", "_cohort"))
    assert (both["fold"] == both["fold_cohort"]).all() and (both["PatientID"] == both["PatientID_cohort"]).all()
    for fold in predictions["fold"].unique():
        assert set(cohort.loc[cohort["fold"] == fold, "SOPInstanceUID"]) == set(
            predictions.loc[predictions["fold"] == fold, "SOPInstanceUID"]
        ), "the natural mix"
    assert predictions[[*LABELS, *LOGITS]].notna().all().all()


def test_no_pickles_no_progress_bars_and_a_complete_manifest(tiny_run):
    run_dir, _ = tiny_run
    cells = json.loads((run_dir / "notebooks" / "12_train.ipynb").read_text())["cells"]
    assert "slice/s" not in json.dumps(cells) and "\\r" not in json.dumps([c.get("outputs") for c in cells])
    assert not [p for p in run_dir.rglob("*") if p.suffix in (".pkl", ".pickle", ".joblib")]
    assert (run_dir / "model" / "weights.safetensors").is_file()
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert set(manifest["seconds"]) == set(STAGES) and manifest["synthetic"]
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["inputs"]["labels_sha256"]) and manifest["inputs"]["dicom_files"] > 0
    assert manifest["versions"]["torch"] and manifest["parameters"]["n_patients"]


def test_every_reported_number_has_n_prevalence_and_interval(tiny_run):
    run_dir, _ = tiny_run
    metrics = pd.read_csv(run_dir / "metrics.csv")
    assert metrics["value"].notna().any()
    known = metrics[metrics["value"].notna()]
    assert known[["n", "n_patients", "prevalence"]].notna().all().all()
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all(), "an undefined number says why"
    assert (known["low"].fillna(known["value"]) <= known["high"].fillna(known["value"])).all()


def test_the_report_is_plain_html_with_its_notices(tiny_run):
    run_dir, _ = tiny_run
    pages = [run_dir / "index.html", *(run_dir / "notebooks" / f"{name}.html" for name in STAGES)]
    for page in pages:
        text = page.read_text()
        assert "<script" not in text and "data is synthetic" in text and "Not a medical device" in text
        assert not re.search(r'(?:src|<link[^>]*href)="https?://', text)
    index = pages[0].read_text()
    for target in re.findall(r'(?:href|src)="((?!http)[^"#]+)"', index):
        assert (run_dir / target).is_file(), target
    studies = {f"viewer/{path.name}" for path in (run_dir / "viewer").glob("*.html")}
    assert studies and studies <= set(re.findall(r'href="([^"]+)"', index))
    assert re.search(r"<td>nan</td>", index) is None


def test_resume_refuses_other_parameters_and_skips_what_is_done(tiny_run, command):
    run_dir, _ = tiny_run  # other data: test_faults
    with pytest.raises(InputError, match=r"ran with other parameters \(seed\)"):
        reproduce("tiny", out=run_dir, resume=True, settings={"seed": 7})
    before = (run_dir / "predictions.parquet").stat().st_mtime_ns
    done = command("ich-reproduce", "--preset", "tiny", "--out", run_dir, "--resume")
    assert done.returncode == 0 and (run_dir / "predictions.parquet").stat().st_mtime_ns == before


def test_another_phantom_in_the_same_folder_takes_the_old_cache_with_it(tmp_path):
    for n in (1, 2):
        data = prepare_data(None, tmp_path, {"n_patients": n, "slices_per_series": [5, 5]})
        assert json.loads((data / "phantom.json").read_text())["n_patients"] == n and not (tmp_path / "cache").exists()
        (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="n_patients=0: must be 1 to 100000"):
        prepare_data(None, tmp_path, {"n_patients": 0})
    assert (tmp_path / "data" / "phantom.json").is_file() and (tmp_path / "cache").is_dir(), "a typo deletes nothing"


def test_from_refuses_parameters_that_would_not_be_those_of_the_kept_notebooks(tiny_run):
    run_dir, _ = tiny_run
    before = (run_dir / "manifest.json").read_bytes()
    for name, notebook in (("epochs", "12_train"), ("n_patients", "make_phantom")):
        with pytest.raises(InputError, match=rf"{notebook} ran with other parameters \({name}\)"):
            reproduce("tiny", out=run_dir, first="40", settings={name: 3})
    assert (run_dir / "manifest.json").read_bytes() == before and (run_dir / "data" / "phantom.json").is_file()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"preset": "nothing"}, "no such preset; there are demo, paper, strong, tiny"),
        ({"set": "epoch=3"}, "parameter epoch: no notebook declares it"),
        ({"set": "epochs=many"}, "is not of type int"),
        ({"set": "epochs"}, "write it as name=value"),
        ({"set": "arms=[a"}, "not valid YAML"),
        ({"set": "run_dir=elsewhere"}, "parameter run_dir: the run sets it; use --data, --dataset and --out"),
        ({"first": "99"}, "no such stage"),
        ({"first": "10", "last": "08"}, "comes after"),
        ({"preset": "paper"}, "--data"),
        ({"preset": "paper", "data": "nowhere"}, "nowhere: no such folder"),
        ({"data": "{empty}"}, "has no stage_1_train.csv"),
        ({"out": "{file}/run"}, "cannot be written"),
        ({"resume": True, "out": "{empty}/fresh"}, "nothing to resume"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(tmp_path, wrong, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    there = {name: str(tmp_path / name) for name in ("file", "empty")}
    given = {k: v.format(**there) if isinstance(v, str) else v for k, v in wrong.items()}
    with pytest.raises(InputError) as error:
        settings = parse_settings([given.pop("set")] if "set" in given else None)
        reproduce(**{"preset": "tiny", "out": tmp_path / "run", "settings": settings} | given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_says_it_in_one_line_and_fails(command, tmp_path):
    done = command("ich-reproduce", "--preset", "tiny", "--out", tmp_path / "run", "--set", "epoch=3")
    assert done.returncode == 1 and re.fullmatch(r".*parameter epoch: no notebook declares it.*\n", done.stderr)


def test_a_failing_notebook_names_cell_and_error_and_resumes(command, tiny_run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "stage_1_train_images").symlink_to(tiny_run[0] / "data" / "stage_1_train_images")
    labels = (tiny_run[0] / "data" / "stage_1_train.csv").read_text()
    (data / "stage_1_train.csv").write_text(labels.replace("epidural,", "extradural,", 1))
    arguments = ["--preset", "tiny", "--data", data, "--out", tmp_path / "run", "--until", "01"]
    done = command("ich-reproduce", *arguments)
    assert done.returncode == 1 and re.search(
        r"01_labels, cell \d+: .*stage_1_train\.csv: 1 slice with a row that is not", done.stderr
    )
    assert "Traceback" not in done.stderr
    (data / "stage_1_train.csv").write_text(labels)
    done = command("ich-reproduce", *arguments, "--resume")
    assert (
        done.returncode == 0
        and (tmp_path / "run" / "labels.parquet").is_file()
        and (tmp_path / "run" / "index.html").is_file()
    )


def test_a_stage_is_a_notebook_that_the_run_gives_its_folder():
    folders = {p.stem for p in (PROJECT / "nbs").glob("*.ipynb") if "run_dir" in declared_parameters(p.stem)}
    assert set(STAGES) <= folders


def test_papermill_runs_a_notebook_from_any_folder_and_writes_nothing_else(tmp_path):
    "In a Python and a kernel as a user has them, not in a warm one."
    before = {p: p.read_bytes() for p in (PROJECT / "ich_fastai").glob("*.py")}
    source = PROJECT / "nbs" / "01_labels.ipynb"
    call = [sys.executable, "-m", "papermill", source, tmp_path / "out.ipynb", "-p", "seed", "7"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.read_bytes() for p in (PROJECT / "ich_fastai").glob("*.py")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
