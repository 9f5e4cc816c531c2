"""Evaluation: equal to scikit-learn, undefined where undefined, fitted on others, sized for 100,000 slices."""

import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binom
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from ich_fastai.tiny import tiny_cohort
from ich_fastai.calibrate import conformal_bound, correct_for_sampling, correct_logits, cross_fit, score_levels
from ich_fastai.calibrate import split_patients
from ich_fastai.evaluate import evaluate, headline_table, say_difference, weighted_ratio
from ich_fastai.explain import explain
from ich_fastai.predict import make_submission, save_submission
from ich_fastai.core import InputError
from ich_fastai.labels import LABELS, read_labels
from ich_fastai.metrics import METRICS, fit_logistic, label_metrics, mean_metrics, metrics_table, rank_metrics
from ich_fastai.metrics import resample_patients, weighted_log_loss
from ich_fastai.tiny import tiny_phantom


def draw(n=300, n_patients=40, seed=0, digits=None):
    "Labels, probabilities and patients of a simulated label; `digits` rounds, so that scores tie."
    rng = np.random.default_rng(seed)
    patient = np.r_[np.arange(n_patients), rng.integers(n_patients, size=n - n_patients)]
    p = expit(rng.normal(size=n) + rng.normal(size=n_patients)[patient] - 1)
    return (rng.random(n) < p).astype(int), p if digits is None else np.round(p, digits), patient


def by_sklearn(y, p, w, threshold):
    "What scikit-learn says, for weights by slice."
    fpr, tpr, _ = sk.roc_curve(y, p, sample_weight=w, drop_intermediate=False)
    return {
        "auc": sk.roc_auc_score(y, p, sample_weight=w),
        "average_precision": sk.average_precision_score(y, p, sample_weight=w),
        "sensitivity_at_specificity_0.9": tpr[fpr <= 0.1 + 1e-9].max(),
        "sensitivity_at_specificity_0.95": tpr[fpr <= 0.05 + 1e-9].max(),
        "log_loss": sk.log_loss(y, p, sample_weight=w, labels=[0, 1]),
        "brier": sk.brier_score_loss(y, p, sample_weight=w),
        "sensitivity": sk.recall_score(y, p >= threshold, sample_weight=w),
        "specificity": sk.recall_score(y, p >= threshold, sample_weight=w, pos_label=0),
    }


@pytest.mark.parametrize("digits", [None, 2, 1, 0], ids=["no ties", "few ties", "many ties", "zeros and ones"])
@pytest.mark.parametrize("kind", ["patients", "whole numbers", "fractions"])
def test_every_metric_equals_scikit_learn(digits, kind):
    for seed in range(5):
        y, p, patient = draw(seed=seed, digits=digits)
        rng = np.random.default_rng(seed)
        weights = {
            "patients": resample_patients(40, 5, seed),
            "whole numbers": rng.integers(1, 5, (3, 40)),
            "fractions": rng.uniform(0.1, 3, (3, 40)),
        }[kind]
        ours = label_metrics(y, p, patient, weights, 0.3)
        for b, w in enumerate(weights[:, patient]):
            expected = by_sklearn(y, p, w, 0.3)
            assert {m: ours[m][b] for m in expected} == pytest.approx(expected, abs=1e-9)


def test_constant_predictions_and_calibration_error():
    y, p, patient = draw()
    one = np.ones((1, 40))
    constant = label_metrics(y, np.full(len(y), y.mean()), patient, one, 0.5)
    assert constant["auc"][0] == 0.5 and constant["average_precision"][0] == pytest.approx(y.mean(), abs=1e-9)
    assert constant["calibration_error"][0] == pytest.approx(0, abs=1e-9) and np.isnan(constant["calibration_slope"][0])
    seen, said = calibration_curve(y, p, n_bins=10, strategy="quantile")
    assert label_metrics(y, p, patient, one, 0.5)["calibration_error"][0] == pytest.approx(
        np.abs(seen - said).mean(), abs=1e-9
    )  # 300 slices: bins of 30


@pytest.mark.parametrize("y", [0, 1], ids=["no positive", "no negative"])
def test_one_class_is_undefined_not_zero(y):
    table = metrics_table(
        np.full((12, 6), y),
        np.tile(np.linspace(0.1, 0.9, 12)[:, None], 6),
        np.arange(12) // 2,
        np.full((12, 6), 0.5),
        n_boot=50,
    )
    undefined = table[table["value"].isna()]
    assert {"auc", "average_precision", "calibration_slope"} <= set(undefined["metric"]) and undefined[
        "note"
    ].str.len().gt(0).all()
    assert undefined[["low", "high"]].isna().all().all()
    assert ("specificity" in set(undefined["metric"])) == (y == 1) and ("sensitivity" in set(undefined["metric"])) == (
        y == 0
    )
    assert table.loc[table["metric"] == "log_loss", "value"].notna().all()


@pytest.mark.parametrize(
    "n, patients, note",
    [(0, 0, "no slice"), (5, 1, "one patient"), (6, 3, "positives in one patient only")],
    ids=["nothing", "one patient", "one positive patient"],
)
def test_too_little_data_says_so(n, patients, note):
    y = np.zeros((n, 6), int)
    y[:2] = 1
    table = metrics_table(
        y, np.full((n, 6), 0.5), np.arange(n) % max(patients, 1) if patients == 1 else np.arange(n) // 2, n_boot=20
    )
    auc = table[table["metric"] == "auc"]
    assert auc["note"].str.startswith(note).all() and auc[["low", "high"]].isna().all().all()


def test_intervals_are_those_of_a_loop_over_resamples():
    y, p, patient = draw(seed=3, digits=2)
    six, probabilities = np.tile(y[:, None], 6), np.tile(p[:, None], 6)
    table = metrics_table(six, probabilities, patient, n_boot=100, seed=5).set_index(["label", "metric"])
    codes = pd.factorize(patient)[0]
    losses, aucs = [], []
    for w in resample_patients(40, 100, 5)[1:]:
        rows = np.repeat(np.arange(len(y)), w[codes])
        losses.append(weighted_log_loss(six[rows], probabilities[rows]))
        aucs.append(sk.roc_auc_score(y[rows], p[rows]))
    assert table.loc[("any", "auc"), ["low", "high"]].to_list() == pytest.approx(
        np.percentile(aucs, [2.5, 97.5]), abs=1e-9
    )
    assert table.loc[("all", "weighted_log_loss"), ["low", "high"]].to_list() == pytest.approx(
        np.percentile(losses, [2.5, 97.5]), abs=1e-9
    )


def test_constants_on_the_real_labels(real_data):
    y = read_labels(real_data / "rsna" / "stage_1_train.csv.gz").to_numpy()
    natural = y.mean(0)
    balanced = natural / natural[-1] / 2
    scores = [weighted_log_loss(y, np.broadcast_to(p, y.shape)) for p in (natural, balanced, np.full(6, 0.5))]
    assert [round(s, 4) for s in scores] == [0.2320, 0.3520, 0.6931]
    assert correct_for_sampling(balanced[None], natural[-1] / (1 - natural[-1]))[0] == pytest.approx(natural, abs=1e-12)


def test_nothing_sees_the_patients_it_is_reported_on():
    rng = np.random.default_rng(0)
    patients = rng.integers(60, size=2000)
    x = rng.normal(size=(2000, 6)) * 2
    y = (rng.random((2000, 6)) < expit(x - 1)).astype(int)
    part = split_patients(patients % 3, patients, y[:, -1])
    for options in ({"sensitivity": 0.9}, {"sensitivity": 0.5, "coverage": 0.8}):
        ours = cross_fit(y, x, patients, part, **options)
        for k in range(3):
            here = part == k
            other = cross_fit(np.where(here[:, None], rng.integers(2, size=y.shape), y), x, patients, part, **options)
            assert all((other[name][here] == ours[name][here]).all() for name in ours), (
                "labels of the part leaked into it"
            )
            assert (other["p"][~here] != ours["p"][~here]).any() and (
                other["threshold"][~here] != ours["threshold"][~here]
            ).any()


@pytest.mark.parametrize("folds", [3, 1])
def test_no_slice_or_study_is_scored_by_a_fit_to_its_own_patient(folds):
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 20)
    y = (rng.random((1200, 6)) < 0.3).astype(int)
    predictions = pd.DataFrame(
        {
            "PatientID": patient,
            "StudyInstanceUID": patient * 2 + rng.integers(2, size=1200),
            "fold": patient % folds,
            "keep_rate": 1.0,
        }
    )
    predictions = predictions.assign(
        **{f"logit_{label}": x for label, x in zip(LABELS, rng.normal(size=(6, 1200)) + y.T, strict=True)}
    )

    def score(y):
        return score_levels(predictions.assign(**dict(zip(LABELS, y.T, strict=True))))

    ours = score(y)
    for level, d in ours.items():
        for k in np.unique(d["part"]):
            here = d["part"] == k
            turned = np.isin(patient, d["patients"][here])[:, None]
            other = score(np.c_[np.where(turned, 1 - y[:, :5], y[:, :5]), y[:, -1]])[
                level
            ]  # `any` stays: it deals the halves of a single fold
            assert (other["part"] == d["part"]).all()
            assert all(
                (other[name][here] == d[name][here]).all() for name in ("p", "threshold", "present", "absent")
            ), (level, "leaked")
            assert (other["p"][~here] != d["p"][~here]).any()


def test_each_fold_has_its_own_undersampling_undone():
    rng = np.random.default_rng(0)
    x, keep_rate, fold = rng.normal(size=(40, 6)), np.repeat([0.3, 0.6], 20), np.repeat([4, 1], 20)
    p = expit(np.c_[x[:, :5], x.max(1) + 1])
    sampled = p / (p[:, -1:] + keep_rate[:, None] * (1 - p[:, -1:]))
    predictions = pd.DataFrame(logit(sampled), columns=[f"logit_{label}" for label in LABELS]).assign(
        fold=fold, keep_rate=keep_rate
    )
    assert expit(correct_logits(predictions)) == pytest.approx(p, abs=1e-12)


def test_shares_and_differences_say_what_they_cannot():
    weights = resample_patients(6, 200)
    assert weighted_ratio(weights, np.arange(6), np.zeros(6), np.zeros(6), "none is called") == (
        None,
        None,
        None,
        "none is called",
    )
    assert weighted_ratio(weights, np.zeros(6, int), np.ones(6), np.ones(6))[1:] == (
        None,
        None,
        "one patient: no interval",
    )
    assert weighted_ratio(weights, np.arange(6), np.ones(6), np.ones(6)) == (
        1,
        1,
        1,
        "all resamples are equal: the interval is too narrow",
    )
    value, low, high, note = weighted_ratio(weights, np.arange(6), np.array([1, 0, 1, 0, 1, 1]), np.ones(6))
    assert value == pytest.approx(4 / 6) and low < value < high and note == ""
    assert [say_difference(*i) for i in ((0.1, 0.2), (-0.2, -0.1), (0, 0.2), (None, None))] == [
        "higher",
        "lower",
        "no difference",
        "no interval",
    ]


def test_a_single_fold_is_halved_by_patient():
    patients = np.repeat([f"p{i}" for i in range(9)], 4)
    positive = (np.arange(36) < 16).astype(int)
    half = split_patients(np.zeros(36), patients, positive)
    table = pd.DataFrame({"patient": patients, "half": half, "positive": positive})
    assert (table.groupby("patient")["half"].nunique() == 1).all()
    assert table.groupby("half")["positive"].sum().to_list() == [8, 8]
    shuffled = np.random.default_rng(0).permutation(36)
    assert (split_patients(np.zeros(36), patients[shuffled], positive[shuffled]) == half[shuffled]).all()


def test_calibration_mends_what_was_bent():
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(400), 10)
    truth = rng.normal(size=(4000, 6)) + rng.normal(size=(400, 1))[patients] - 1
    y = (rng.random(truth.shape) < expit(truth)).astype(int)
    fitted = cross_fit(y, 2 * truth + 1, patients, patients % 4)
    for k in range(5):  # `any` is no OR here
        assert fit_logistic(logit(fitted["p"][:, k]), y[:, k]) == pytest.approx((1, 0), abs=0.1)
        assert sk.log_loss(y[:, k], fitted["p"][:, k]) == pytest.approx(
            sk.log_loss(y[:, k], expit(truth[:, k])), abs=0.003
        )
    called = fitted["p"] >= fitted["threshold"]
    assert (called & (y == 1)).sum(0) / y.sum(0) == pytest.approx(np.full(6, 0.9), abs=0.04)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_conformal_sets_keep_their_promise(coverage):
    kept = []
    for seed in range(400):
        y, p, patient = draw(n=600, n_patients=80, seed=seed)
        old, ours = (patient < 40) & (y == 1), (patient >= 40) & (y == 1)
        bound = conformal_bound(logit(p[old]), patient[old], coverage, seed)
        kept.append(pd.Series(logit(p[ours]) >= bound).groupby(patient[ours]).mean().mean())
    assert coverage - 0.01 <= np.mean(kept) <= coverage + 0.06


def test_100_000_slices_in_bounded_memory():
    rng = np.random.default_rng(0)
    patient = rng.integers(2500, size=100_000)
    y = (rng.random((100_000, 6)) < 0.1).astype(int)
    p = expit(rng.normal(size=y.shape) + y - 2)
    tracemalloc.start()
    table = metrics_table(y, p, patient, np.full(y.shape, 0.2), n_boot=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == 6 * len(METRICS) + 1 and table[["value", "low", "high"]].notna().all().all()
    assert peak < 1.5e9


def draw_clustered(n_patients, seed):
    "Slices of a patient share what the model sees of them and what it does not."
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), rng.integers(1, 20, n_patients))
    seen, hidden = rng.normal(0, 1, (2, n_patients))[:, patient]
    x = seen + rng.normal(0, 0.7, len(patient)) - 1.5
    return (rng.random(len(patient)) < expit(x + hidden)).astype(int), expit(x), patient


def auc_and_log_loss(y, p, unit, weights):
    return np.stack([rank_metrics(y, p, unit, weights, ())["auc"], mean_metrics(y, p, unit, weights)["log_loss"]])


def test_intervals_by_patient_cover_the_truth_and_those_by_slice_do_not():
    y, p, patient = draw_clustered(100_000, seed=10**6)
    truth = auc_and_log_loss(y, p, patient, np.ones((1, 100_000)))[:, 0]
    n, covered = 200, {"patient": np.zeros(2), "slice": np.zeros(2)}
    for seed in range(n):
        y, p, patient = draw_clustered(120, seed)
        for way, unit in (("patient", patient), ("slice", np.arange(len(y)))):
            low, high = np.percentile(
                auc_and_log_loss(y, p, unit, resample_patients(unit.max() + 1, 200, seed))[:, 1:], [2.5, 97.5], axis=1
            )
            covered[way] += (low <= truth) & (truth <= high)
    least, most = (
        binom.ppf(0.001, n, 0.93),
        binom.ppf(0.999, n, 0.97),
    )  # a method that covers 93% to 97% falls outside once in 1,000 times
    assert ((least <= covered["patient"]) & (covered["patient"] <= most)).all(), covered
    assert (covered["slice"] < least).all(), covered


def test_rank_metrics_do_not_depend_on_the_chunk():
    y, p, patient = draw(n=9000, seed=2, digits=2)
    weights = resample_patients(40, 1100)
    whole = rank_metrics(y, p, patient, weights)
    for b in (0, 500, 888, 889, 1100):  # 8,000,000 // 9,000 = 888 rows a chunk
        assert whole["auc"][b] == rank_metrics(y, p, patient, weights[b : b + 1])["auc"][0]


def test_submission_follows_the_sample(tmp_path):
    sample = tmp_path / "sample.csv"
    sample.write_text("ID,Label\n" + "".join(f"ID_{s}_{label},0.5\n" for s in "cab" for label in LABELS))
    p = np.random.default_rng(0).uniform(size=(4, 6))
    table = make_submission([f"ID_{s}" for s in "abcd"], p, sample)
    assert table["ID"].to_list() == pd.read_csv(sample)["ID"].to_list() and list(table.columns) == ["ID", "Label"]
    assert table["Label"].to_list() == p[[2, 0, 1]].ravel().tolist()
    with pytest.raises(InputError, match="sample.csv: 6 of its rows have no prediction, e.g. ID_b_epidural"):
        make_submission(["ID_a", "ID_c"], p[:2], sample)
    predicted = pd.DataFrame(p, columns=LABELS).assign(SOPInstanceUID=[f"ID_{s}" for s in "abcd"])
    written = pd.read_csv(save_submission(predicted, sample, tmp_path / "submission.csv"))
    assert written["ID"].to_list() == table["ID"].to_list() and written["Label"].to_numpy() == pytest.approx(
        table["Label"].to_numpy(), abs=1e-12
    )
    with pytest.raises(InputError, match="6 rows have no probability from 0 to 1, e.g. ID_c_epidural"):
        save_submission(
            predicted.assign(
                **{label: predicted[label].where(predicted["SOPInstanceUID"] != "ID_c") for label in LABELS}
            ),
            sample,
            tmp_path / "no.csv",
        )
    assert not (tmp_path / "no.csv").exists()
    sample.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has the columns a, b; a sample submission has ID,Label"):
        make_submission(["ID_a"], p[:1], sample)


@pytest.fixture(scope="module")
def simulated_run(tmp_path_factory):
    "A run folder of the tiny cohort with simulated predictions for two folds: no training needed."
    run_dir = tmp_path_factory.mktemp("evaluate")
    for name in ("labels.parquet", "slices.parquet", "cohort.parquet", "cache"):
        source = tiny_cohort() / name
        shutil.copytree(source, run_dir / name) if source.is_dir() else shutil.copy(source, run_dir)
    return run_dir


def write_predictions(run_dir, rows, folds):
    "predictions.parquet and a trained-looking, untrained model of these cohort rows."
    import torch

    from ich_fastai.batches import Settings, named_windows
    from ich_fastai.model import build_model, make_card, save_model

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    ids = rows[["SOPInstanceUID", "PatientID", "StudyInstanceUID", "fold", *LABELS]].reset_index(drop=True)
    logits = 2 * rows[list(LABELS)].to_numpy(float) - 1 + rng.normal(size=(len(rows), 6))
    ids.assign(
        **{f"logit_{label}": logits[:, k].astype("float32") for k, label in enumerate(LABELS)}, keep_rate=0.4
    ).to_parquet(run_dir / "predictions.parquet")
    card = make_card(
        Settings(image_size=96, windows=named_windows(["brain"])),
        256,
        [{"fold": int(f), "keep_rate": 0.4} for f in folds],
    )
    save_model(build_model("resnet10t", 3), card, run_dir / "model")


def test_the_stage_writes_its_files(simulated_run):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    metrics = evaluate(simulated_run, tiny_phantom(), n_boot=50)
    explain(simulated_run, tiny_phantom(), n_boot=50)
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all()
    headline = headline_table(simulated_run)
    assert (
        len(headline.to_string(index=False, line_width=80).splitlines()[0]) <= 80
        and not headline.isin(["nan"]).any().any()
    )
    index = pd.read_csv(simulated_run / "tables" / "index.csv")
    assert len(index) >= 4 and all((simulated_run / "figures" / f).is_file() for f in index["figure"])
    assert index["caption"].str.contains("Synthetic data").all()
    model = json.loads((simulated_run / "model" / "model.json").read_text())
    assert set(model["corrections"]["calibration"]) == set(LABELS) and model["corrections"]["keep_rate"] == 0.4
    assert model["thresholds"]["slice"]["any"]["threshold"] > 0
    pointing = pd.read_csv(simulated_run / "tables" / "pointing.csv")
    assert pointing["value"].dropna().between(0, 1).all() and pointing["n"].sum() > 0


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_stage_survives_too_little_data(simulated_run, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    rows = {
        "no positive": cohort[(cohort["fold"] == 0) & (cohort["any"] == 0)],
        "one patient": cohort[cohort["PatientID"] == cohort["PatientID"].iloc[0]],
        "one slice": cohort.head(1),
    }[which]
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    metrics = evaluate(tmp_path / "run", None, n_boot=20)
    explain(tmp_path / "run", None, n_boot=20)
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all()
    assert not np.isinf(metrics[["value", "low", "high"]].astype(float)).any().any()
    assert "NaN" not in (tmp_path / "run" / "model" / "model.json").read_text()


def test_without_predictions_it_names_the_notebook(tmp_path):
    with pytest.raises(InputError, match="predictions.parquet: not there; notebook 12_train makes it"):
        evaluate(tmp_path)


def test_evaluate_imports_no_torch():
    import subprocess
    import sys

    subprocess.run(
        [
            sys.executable,
            "-c",
            "import ich_fastai.evaluate, sys; assert 'torch' not in sys.modules and 'fastai' not in sys.modules",
        ],
        check=True,
    )


@pytest.mark.parametrize("wrong", [{"wanted_sensitivity": 1.2}, {"coverage": 90}])
def test_a_share_that_is_none_is_one_line(simulated_run, wrong):
    with pytest.raises(InputError, match="must be a share above 0 and up to 1"):
        evaluate(simulated_run, None, n_boot=20, **wrong)
