"""Evaluation: equal to scikit-learn, undefined where undefined, fitted on others, sized for 100,000 slices."""

import json
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binom
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from ich_fastai.calibrate import Fitted, calibrate, correct_logits, cross_fit
from ich_fastai.calibrate import fit_decisions, order_logits, pool_slices, score_levels, slice_lengths
from ich_fastai.calibrate import split_patients
from ich_fastai.core import InputError, save_json
from ich_fastai.evaluate import evaluate, headline_table, level_metrics, read_predictions
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.metrics import METRICS, RANKS, SAME, Estimate, draw_patients, find_estimate, fit_logistic, label_metrics
from ich_fastai.metrics import mean_metrics, metrics_table, rank_metrics, say_difference
from ich_fastai.tiny import simulate_scores
from ich_fastai.metrics import weighted_log_loss, weighted_ratio
from ich_fastai.tiny import tiny_phantom


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
    for seed in range(2):
        y, p, patient = simulate_scores(300, 40, seed, digits=digits)
        rng = np.random.default_rng(seed)
        draws = {
            "patients": draw_patients(patient, 5, seed)[1],
            "whole numbers": rng.integers(1, 5, (3, 40)),
            "fractions": rng.uniform(0.1, 3, (3, 40)),
        }[kind]
        ours = label_metrics(y, p, patient, draws, 0.3)
        for b, w in enumerate(draws[:, patient]):
            expected = by_sklearn(y, p, w, 0.3)
            assert {m: ours[m][b] for m in expected} == pytest.approx(expected, abs=1e-9)


def test_constant_predictions():
    y, p, patient = simulate_scores(300, 40)
    constant = label_metrics(y, np.full(len(y), y.mean()), patient, np.ones((1, 40)), 0.5)
    assert constant["auc"][0] == 0.5 and constant["average_precision"][0] == pytest.approx(y.mean(), abs=1e-9)
    assert constant["calibration_error"][0] < 0.05 and np.isnan(constant["calibration_slope"][0])


def calibration_errors(y, p, patient, draws):
    return mean_metrics(y, p, patient, draws)["calibration_error"]


def test_calibration_error_of_single_slices_is_that_of_kumar():
    y, p, patient = simulate_scores(300, 300)
    seen, said = calibration_curve(y, p**2, n_bins=10, strategy="quantile")  # 300 slices: bins of 30
    bins = np.searchsorted(np.quantile(p**2, np.linspace(0, 1, 11))[1:-1], p**2)
    noise = np.array([np.var((p**2 - y)[bins == k], ddof=1) / 30 for k in range(10)])
    expected = np.mean((seen - said) ** 2 - noise) ** 0.5
    assert calibration_errors(y, p**2, patient, np.ones((1, 300)))[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bend", [1.0, 1.5], ids=["no error", "overconfident"])
def test_intervals_of_the_calibration_error_cover_the_truth(bend):
    y, p, patient = simulate_scores(200_000, 20_000, seed=10**6)
    truth = calibration_errors(y, expit(bend * logit(p)), patient, np.ones((1, 20_000)))[0]
    covered = 0
    for seed in range(100):
        y, p, patient = simulate_scores(1200, 120, seed)
        found = find_estimate(calibration_errors(y, expit(bend * logit(p)), *draw_patients(patient, 100, seed)))
        covered += found.low <= truth + 1e-3 and truth <= found.high  # 1e-3: noise of the truth
    assert covered >= binom.ppf(0.001, 100, 0.93)


@pytest.mark.parametrize("n, n_patients, center", [(3000, 60, -7), (4000, 300, -1)], ids=["7 positive", "a third"])
def test_calibration_slopes_of_draws_are_those_of_refitting(n, n_patients, center):
    y, p, patient = simulate_scores(n, n_patients, 2, center=center)
    patient, draws = draw_patients(patient, 200)
    x = 2 * logit(p) + 3
    slopes = label_metrics(y, expit(x), patient, draws)["calibration_slope"]
    refit = np.array([fit_logistic(np.repeat(x, w), np.repeat(y, w))[0] for w in draws[:, patient]])
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y)
    assert slopes[0] == pytest.approx(refit[0], abs=1e-9) == pytest.approx(peer.coef_[0, 0], abs=1e-4)
    ours, theirs = find_estimate(slopes), find_estimate(refit)
    width = theirs.high - theirs.low
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.01 * width)
    assert abs(slopes - refit)[np.isfinite(refit)].max() < 0.01 * width


@pytest.mark.parametrize(
    "y, turned", [([0, 0, 1, 1], 0), ([1, 1, 0, 0], 0), ([0, 0, 0, 0], 1)], ids=["separated", "inverted", "one class"]
)
@pytest.mark.parametrize("n", [1, 10_000])
def test_no_slope_where_a_cut_separates(y, turned, n):
    x, y = np.repeat([-2.0, -1, 1, 2], n), np.repeat(y, n)
    assert np.isnan(fit_logistic(x, y)).all()
    y[turned * n] = 1 - y[turned * n]  # one slice makes the answer finite
    assert np.isfinite(fit_logistic(x, y)).all()


@pytest.mark.parametrize("y", [0, 1], ids=["no positive", "no negative"])
def test_one_class_is_undefined_not_zero(y):
    p = np.tile(np.linspace(0.1, 0.9, 12)[:, None], 6)
    table = metrics_table(np.full((12, 6), y), p, np.arange(12) // 2, np.full((12, 6), 0.5), n_boot=50)
    undefined = table[table["value"].isna()]
    assert {"auc", "average_precision", "calibration_slope"} <= set(undefined["metric"])
    assert undefined["note"].str.startswith("undefined: no ").all()  # of the calibration error: no bin of two patients
    assert undefined[["low", "high"]].isna().all().all()
    assert ("specificity" in set(undefined["metric"])) == (y == 1)
    assert ("sensitivity" in set(undefined["metric"])) == (y == 0)
    assert table.loc[table["metric"] == "log_loss", "value"].notna().all()


def test_an_interval_of_rounding_errors_is_marked_as_too_narrow():
    table = metrics_table(np.zeros((9, 6)), np.full((9, 6), 0.1), np.arange(9), n_boot=20)
    assert set(table.loc[table["value"].notna(), "metric"]) == {
        "log_loss",
        "brier",
        "calibration_error",
        "weighted_log_loss",
    }
    assert (table.loc[table["value"].notna(), "note"] == SAME).all()


def test_ranks_need_no_calibration_and_say_what_they_need():
    y, p, patient = simulate_scores(center=np.full(6, -1.0))
    table = metrics_table(y, np.full(p.shape, np.nan), patient, score=logit(p), n_boot=20).set_index("metric")
    assert table.loc[list(RANKS), "value"].notna().all()
    assert (table.drop(list(RANKS))["note"] == "needs other patients to fit on: there are none").all()


def test_an_estimate_says_what_it_has_also_after_a_table():
    both, value, neither = Estimate(0.5, 0.25, 0.75), Estimate(0.5, why="one patient"), Estimate(why="no slice")
    table = pd.DataFrame([both, value, neither])  # None becomes nan
    for estimates in ((both, value, neither), [Estimate(*row) for row in table.itertuples(index=False)]):
        assert [str(e) for e in estimates] == ["0.500 (0.250 to 0.750)", "0.500", "no slice"]
        assert [(e.has_value, e.has_interval) for e in estimates] == [(True, True), (True, False), (False, False)]
    assert find_estimate(np.array([0.5])).why and not find_estimate(np.array([0.5])).has_interval


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
    y, p, patient = simulate_scores(300, 40, 3, digits=2)
    six, probabilities = np.tile(y[:, None], 6), np.tile(p[:, None], 6)
    table = metrics_table(six, probabilities, patient, n_boot=100, seed=5).set_index(["label", "metric"])
    codes, draws = draw_patients(patient, 100, 5)
    losses, aucs = [], []
    for w in draws[1:]:
        rows = np.repeat(np.arange(len(y)), w[codes])
        losses.append(weighted_log_loss(six[rows], probabilities[rows]))
        aucs.append(sk.roc_auc_score(y[rows], p[rows]))
    assert table.loc[("any", "auc"), ["low", "high"]].to_list() == pytest.approx(
        np.percentile(aucs, [2.5, 97.5]), abs=1e-9
    )
    assert table.loc[("all", "weighted_log_loss"), ["low", "high"]].to_list() == pytest.approx(
        np.percentile(losses, [2.5, 97.5]), abs=1e-9
    )


def test_nothing_sees_the_patients_it_is_reported_on():
    rng = np.random.default_rng(0)
    patients = rng.integers(60, size=900)
    x = order_logits(rng.normal(size=(900, 6)) * 2)
    y = (rng.random((900, 6)) < expit(x - 1)).astype(int)
    fold = patients % 3
    part = split_patients(fold, patients)
    for options, parts in (({"sensitivity": 0.9}, [(0, 0)]), ({"sensitivity": 0.5, "coverage": 0.8}, [(1, 5)])):
        ours = cross_fit(y, x, patients, fold, **options)
        for f, k in parts:
            here, others = (fold == f) & (part == k), (fold == f) & (part != k)
            other = cross_fit(np.where(here[:, None], rng.integers(2, size=y.shape), y), x, patients, fold, **options)
            for name, a, b in zip(Fitted._fields, ours, other, strict=True):
                assert np.array_equal(a[~others], b[~others]), "labels of the part leaked into it, or another fold"
                assert (a[others] != b[others]).any(), name


def train_on_others(features, y, fold):
    "Logits of each fold by a network of its own, here a ridge regression, trained on the labels of the other folds."
    x = np.empty((len(y), 6))
    for f in np.unique(fold):
        a, of = features[fold != f], y[fold != f]
        weights = np.linalg.solve(a.T @ a + 3 * np.eye(a.shape[1]), a.T @ (4.0 * of - 2))
        x[fold == f] = features[fold == f] @ weights
    return x


def test_no_label_reaches_its_own_patient_through_the_networks_of_other_folds():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 10)
    features = np.c_[np.ones(600), rng.normal(size=(600, 8)) + rng.normal(size=(60, 8))[patient]]
    y = (rng.random((600, 6)) < expit(features[:, :1] - 1 + features[:, 1:7])).astype(int)
    ids = pd.DataFrame({"PatientID": patient, "StudyInstanceUID": patient, "fold": patient % 2, "keep_rate": 1.0})

    def report(y):  # labels to all that is reported, the networks trained anew
        x = train_on_others(features, y, ids["fold"].to_numpy())
        both = dict(zip(LOGITS, x.T, strict=True)) | dict(zip(LABELS, y.T, strict=True))
        return score_levels(ids.assign(**both))

    ours = report(y)
    turned = report(np.where((patient == 7)[:, None], 1 - y, y))
    for level, d in ours.items():
        mine, elsewhere = d.patients == 7, d.fold == 0
        for name in Fitted._fields:
            assert np.array_equal(getattr(turned[level], name)[mine], getattr(d, name)[mine]), (level, name)
        assert (turned[level].calibrated[elsewhere] != d.calibrated[elsewhere]).any(), "the networks were not trained"


@pytest.mark.parametrize("folds", [3, 1])
def test_no_slice_or_study_is_scored_by_a_fit_to_its_own_patient(folds):
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 20)
    y = (rng.random((1200, 6)) < 0.3).astype(int)
    study = patient * 2 + rng.integers(2, size=1200)
    ids = pd.DataFrame({"PatientID": patient, "StudyInstanceUID": study, "fold": patient % folds, "keep_rate": 1.0})
    predictions = ids.assign(**dict(zip(LOGITS, rng.normal(size=(6, 1200)) + y.T, strict=True)))

    def score(y):
        return score_levels(predictions.assign(**dict(zip(LABELS, y.T, strict=True))))

    ours = score(y)
    for level, d in ours.items():
        here = split_patients(d.fold, d.patients) == 4
        turned = np.isin(patient, d.patients[here])[:, None]
        other = score(np.where(turned, 1 - y, y))[level]
        for name in Fitted._fields:
            assert np.array_equal(getattr(other, name)[here], getattr(d, name)[here]), (level, name, "leaked")
        assert (other.calibrated[~here] != d.calibrated[~here]).any()


def test_parts_with_maps_of_their_own_do_not_change_the_ranks():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(90), 20)
    x = rng.normal(size=(1800, 6)) + rng.normal(size=(90, 6))[patient]
    y = (rng.random(x.shape) < expit(x - 2 + (patient % 2)[:, None])).astype(int)  # more positives in one part
    ids = pd.DataFrame({"PatientID": patient, "StudyInstanceUID": patient, "fold": patient % 2, "keep_rate": 1.0})
    predictions = ids.assign(**dict(zip(LOGITS, x.T, strict=True)), **dict(zip(LABELS, y.T, strict=True)))
    levels = score_levels(predictions)
    metrics = level_metrics(levels, n_boot=20)
    value = metrics.set_index(["level", "probabilities", "label", "metric"])["value"]
    for level, d in levels.items():
        for label, k in (("intraventricular", 2), ("any", 5)):
            auc = sk.roc_auc_score(d.y[:, k], d.x[:, k])
            assert value[level, "calibrated", label, "auc"] == pytest.approx(auc, abs=1e-9)
            for metric in RANKS if label != "any" else ():  # `any` is raised to the OR of the five before calibration
                kinds = (value[level, kind, label, metric] for kind in ("calibrated", "corrected"))
                assert next(kinds) == pytest.approx(next(kinds), abs=1e-12)
    auc = value["slice", "calibrated", "intraventricular", "auc"]
    assert f"{auc:.3f} (" in headline_table(metrics).set_index("result").loc["intraventricular, AUC"].iloc[0]


def test_each_fold_has_its_own_undersampling_undone():
    rng = np.random.default_rng(0)
    x, keep_rate, fold = rng.normal(size=(40, 6)), np.repeat([0.3, 0.6], 20), np.repeat([4, 1], 20)
    p = expit(np.c_[x[:, :5], x.max(1) + 1])
    sampled = p / (p[:, -1:] + keep_rate[:, None] * (1 - p[:, -1:]))
    predictions = pd.DataFrame(logit(sampled), columns=LOGITS).assign(fold=fold, keep_rate=keep_rate)
    assert expit(correct_logits(predictions)) == pytest.approx(p, abs=1e-12)


def test_shares_and_differences_say_what_they_cannot():
    six, draws = draw_patients(np.arange(6), 200)
    assert weighted_ratio(draws, six, np.zeros(6), np.zeros(6), "none is called") == Estimate(why="none is called")
    assert weighted_ratio(draws, np.zeros(6, int), np.ones(6), np.ones(6)).why == "one patient: no interval"
    assert weighted_ratio(draws, six, np.ones(6), np.ones(6)) == Estimate(1, 1, 1, SAME)
    share = weighted_ratio(draws, six, np.array([1, 0, 1, 0, 1, 1]), np.ones(6))
    assert share.value == pytest.approx(4 / 6) and share.low < share.value < share.high and share.why == ""
    intervals = ((0.1, 0.2), (-0.2, -0.1), (0, 0.2), (1e-17, 2e-17), (None, None), (np.nan, np.nan))
    assert [say_difference(Estimate(0.1, *interval)) for interval in intervals] == [
        "higher",
        "lower",
        "not resolved",
        "equal",
        "no interval",
        "no interval",
    ]


def test_a_folds_patients_are_dealt_into_ten_parts_without_their_labels():
    patients, fold = np.repeat([f"p{i}" for i in range(45)], 4), np.repeat(np.arange(45) % 2, 4)
    part = split_patients(fold, patients)
    table = pd.DataFrame({"patient": patients, "part": part, "fold": fold})
    assert (table.groupby("patient")["part"].nunique() == 1).all()
    sizes = table.groupby(["fold", "part"])["patient"].nunique()
    assert len(sizes) == 20 and sizes.min() >= 2 and sizes.max() <= 3
    shuffled = np.random.default_rng(0).permutation(len(patients))
    assert (split_patients(fold[shuffled], patients[shuffled]) == part[shuffled]).all()


def simulate_or(n_patients, seed, noise=1.0, bend=(1.0, 0.0)):
    "Five labels and their OR with RSNA's prevalences, about, and bent, noisy logits of all six; 10 slices a patient."
    rng, patient = np.random.default_rng(seed), np.repeat(np.arange(n_patients), 10)
    t = np.array([-7, -4.6, -4.9, -4.6, -4.6]) + 1.6 * rng.normal(size=(n_patients, 1))[patient]
    t = t + 1.5 * rng.normal(size=(len(patient), 5))
    y, t_any = (rng.random(t.shape) < expit(t)).astype(int), logit(1 - np.prod(expit(-t), axis=1))
    return np.c_[y, y.max(1)], bend[0] * (np.c_[t, t_any] + noise * rng.normal(size=(len(t), 6))) + bend[1], patient


def test_calibration_mends_what_was_bent():
    y, x, patient = simulate_or(2000, 1, noise=0.0, bend=(2.0, 1.0))
    right = expit((x - 1) / 2)
    fitted = cross_fit(y, order_logits(x), patient, 0 * patient)
    for k in range(1, 6):
        assert fit_logistic(logit(fitted.calibrated[:, k]), y[:, k]) == pytest.approx((1, 0), abs=0.15)
        assert sk.log_loss(y[:, k], fitted.calibrated[:, k]) == pytest.approx(
            sk.log_loss(y[:, k], right[:, k]), abs=0.003
        )
    called = fitted.calibrated >= fitted.threshold
    assert ((called & (y == 1)).sum(0) / y.sum(0))[1:] == pytest.approx(np.full(5, 0.9), abs=0.04)


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_any_is_the_or_of_the_five_and_as_frequent_as_it_says(noise):
    y, x, patient = simulate_or(4000, 0, noise, (1.5, 0.5))
    ids = pd.DataFrame({"PatientID": patient, "StudyInstanceUID": patient, "fold": 0, "keep_rate": 1.0})
    both = dict(zip(LOGITS, x.T, strict=True)) | dict(zip(LABELS, y.T, strict=True))
    for level, d in score_levels(ids.assign(**both)).items():
        assert (d.calibrated[:, -1:] >= d.calibrated[:, :-1]).all()
        assert d.calibrated.mean(0)[1:] == pytest.approx(d.y.mean(0)[1:], rel=0.03), level  # epidural: 290 slices
        assert fit_logistic(logit(d.calibrated[:, -1]), d.y[:, -1])[0] == pytest.approx(1, abs=0.05), level


def test_a_study_is_as_suspicious_however_thin_it_is_cut():
    rng, n, mm = np.random.default_rng(0), 64, 140.0
    z = np.arange(n) * mm / n
    near = np.linalg.cholesky(np.exp(-(((z[:, None] - z) / 12) ** 2) / 2) + 1e-6 * np.eye(n))
    noise = 0.7 * rng.normal(size=(300, n))
    whole = 0.7 * rng.normal(size=(300, 1)) - 3 + rng.normal(size=(300, n)) @ near.T + noise
    mean = {"sharp mean": [], "largest": []}
    for cut in (8, 16, 32, 64):
        x, at = whole[:, 32 // cut :: 64 // cut], np.tile(z[32 // cut :: 64 // cut], 300)
        study = np.repeat(np.arange(300), cut)
        lengths = slice_lengths(pd.DataFrame({"StudyInstanceUID": study, "z_mm": at}))
        for name, s in (("sharp mean", pool_slices(x.reshape(-1, 1), study, lengths)[:, 0]), ("largest", x.max(1))):
            mean[name].append(expit(1.4 * s + (1.2 if name == "sharp mean" else 0)).mean())  # as calibration has it
    assert np.ptp(mean["sharp mean"]) < 0.03 < 0.1 < np.ptp(mean["largest"]), mean


def test_slices_count_for_their_length_and_all_the_same_where_it_is_unknown():
    rows = pd.DataFrame({"StudyInstanceUID": "a", "SeriesInstanceUID": list("aaabbb"), "z_mm": [0, 5, 10, 0, 1, 2.0]})
    assert slice_lengths(rows).tolist() == [5, 5, 5, 1, 1, 1]
    x, study = np.arange(12.0).reshape(6, 2), np.zeros(6, int)
    once = pool_slices(x, study, slice_lengths(rows))
    twice, doubled = pd.concat([rows, rows]), np.r_[x, x]
    assert pool_slices(doubled, np.zeros(12, int), slice_lengths(twice)) == pytest.approx(
        once, abs=0.4
    )  # ends count half
    for unknown in (rows.drop(columns="z_mm"), rows.assign(z_mm=np.nan), rows.assign(z_mm=3.0)):
        assert len(set(slice_lengths(unknown))) == 1
    assert slice_lengths(rows.iloc[:0]).shape == (0,) and pool_slices(x[:0], study[:0], np.ones(0)).shape == (0, 2)
    far = slice_lengths(rows.assign(z_mm=[0, 5, 10, 0, 1, 900.0]))
    assert far[-1] <= 3 * 900 and np.isfinite(far).all()


def test_what_is_delivered_is_near_what_was_evaluated(simulated_run, write_predictions, tmp_path):
    shutil.copytree(simulated_run, tmp_path / "run")
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(tmp_path / "run", cohort[cohort["fold"] < 2], (0, 1))
    evaluate(tmp_path / "run", None, n_boot=20)
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    table = pd.read_csv(tmp_path / "run" / "tables" / "delivered.csv")
    for level, d in score_levels(read_predictions(tmp_path / "run")).items():
        here = d.fold == 0  # the model is the network of fold 0
        fit = fit_decisions(d.y[here], d.x[here], d.patients[here], level=level)
        apart = abs(calibrate(d.x[here], fit.slope, fit.intercept) - d.calibrated[here])
        rows = table[table["level"] == level]
        assert rows["value"].to_numpy() == pytest.approx(apart.mean(0), abs=1e-9)
        assert rows["largest"].to_numpy() == pytest.approx(apart.max(0), abs=1e-9)
        assert card["corrections"]["largest_distance_to_evaluated"][level] == pytest.approx(apart.max(), abs=1e-9)


def test_a_model_of_several_networks_is_fitted_on_all_their_folds_and_says_what_was_not_evaluated(
    simulated_run, write_predictions, tmp_path
):
    run_dir = shutil.copytree(simulated_run, tmp_path / "run")
    rows = pd.read_parquet(run_dir / "cohort.parquet").query("fold < 2")
    write_predictions(run_dir, rows, (0, 1))
    path = run_dir / "model" / "model.json"
    card = json.loads(path.read_text())
    card["training"]["folds"][1]["keep_rate"] = 0.1  # the other's is 0.4
    save_json(card | {"networks": ["weights.safetensors", "weights-2.safetensors"]}, path, checked=True)
    evaluate(run_dir, None, n_boot=20)
    corrections = json.loads(path.read_text())["corrections"]
    assert corrections["fitted_on"] == {"slices": len(rows), "patients": rows["PatientID"].nunique(), "networks": 2}
    assert corrections["keep_rate"] == pytest.approx(0.2)
    assert set(corrections["largest_distance_to_evaluated"].values()) == {None}
    table = pd.read_csv(run_dir / "tables" / "delivered.csv")
    assert table["value"].isna().all() and table["note"].str.contains("mean of 2 networks was not evaluated").all()
    d = score_levels(read_predictions(run_dir))["slice"]
    fit = fit_decisions(d.y, d.x, d.patients)
    assert corrections["calibration"]["any"]["slope"] == pytest.approx(fit.slope[-1])


def test_every_result_has_n_prevalence_and_an_interval_or_says_why_not(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    evaluate(simulated_run, None, n_boot=20)
    for name in ("metrics.csv", *(f"tables/{n}.csv" for n in ("thresholds", "conformal", "reliability", "delivered"))):
        table = pd.read_csv(simulated_run / name, keep_default_na=False, na_values=[""])
        assert {"n", "prevalence", "low", "high", "note"} <= set(table), name
        assert table[["n"]].notna().all().all(), name
        assert (table["low"].notna() | table["note"].str.len().gt(0)).all(), name


def test_100_000_slices_in_bounded_memory():
    rng = np.random.default_rng(0)
    patient = rng.integers(2500, size=100_000)
    y = (rng.random(100_000) < 0.1).astype(int)
    p = expit(rng.normal(size=y.shape) + y - 2)
    patient, draws = draw_patients(patient, 1000)
    tracemalloc.start()
    found = label_metrics(y, p, patient, draws, 0.2)  # a label; a table does one after the other
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(found) == set(METRICS) and all(np.isfinite(values).all() for values in found.values())
    assert peak < 2e8, "a chunk of draws at a time; 1,001 rows of 100,000 would be 400 MB"


def auc_and_log_loss(y, p, unit, draws):
    return np.stack([rank_metrics(y, p, unit, draws, ())["auc"], mean_metrics(y, p, unit, draws)["log_loss"]])


def test_intervals_by_patient_cover_the_truth_and_those_by_slice_do_not():
    y, p, patient = simulate_scores(1_000_000, 100_000, seed=10**6, hidden=1)
    truth = auc_and_log_loss(y, p, patient, np.ones((1, 100_000)))[:, 0]
    n, covered = 100, {"patient": np.zeros(2), "slice": np.zeros(2)}
    for seed in range(n):
        y, p, patient = simulate_scores(1200, 120, seed, hidden=1)
        for way, unit in (("patient", patient), ("slice", np.arange(len(y)))):
            drawn = auc_and_log_loss(y, p, *draw_patients(unit, 200, seed))
            low, high = np.percentile(drawn[:, 1:], [2.5, 97.5], axis=1)
            covered[way] += (low <= truth) & (truth <= high)
    least = binom.ppf(0.001, n, 0.93)  # a method that covers 93% falls below it once in 1,000 times
    assert (covered["slice"] < least).all() and (least <= covered["patient"]).all(), covered


def test_rank_metrics_do_not_depend_on_the_chunk():
    y, p, patient = simulate_scores(9000, 40, 2, digits=2)
    draws = draw_patients(patient, 1100)[1]
    whole = rank_metrics(y, p, patient, draws)
    for b in (0, 500, 888, 889, 1100):  # 8,000,000 // 9,000 = 888 rows a chunk
        assert whole["auc"][b] == rank_metrics(y, p, patient, draws[b : b + 1])["auc"][0]


def test_the_stage_writes_its_files(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    metrics = evaluate(simulated_run, tiny_phantom(), n_boot=50)
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all()
    first = ["level", "label", "probabilities", "metric", "value", "low", "high"]
    assert list(metrics) == [*first, "n", "n_positive", "n_patients", "prevalence", "note"]
    undefined = metrics.assign(value=metrics["value"].mask(metrics["label"].eq("epidural")))
    each = headline_table(metrics, [undefined, undefined]).set_index("result")["networks alone"]
    assert each["epidural, AUC"] == "" and "nan" not in " ".join(each) and " to " in each["any, AUC by slice"]
    headline = headline_table(metrics)
    assert len(headline.to_string(index=False, line_width=80).splitlines()[0]) <= 80
    assert not headline.isin(["nan"]).any().any()
    captions = pd.read_csv(simulated_run / "tables" / "captions.csv").set_index("figure")["caption"]
    for name in ("auc.svg", "reliability.svg"):
        assert (simulated_run / "figures" / name).is_file() and "Synthetic data" in captions[name]
    card = json.loads((simulated_run / "model" / "model.json").read_text())
    assert set(card["corrections"]["calibration"]) == set(LABELS) and card["corrections"]["keep_rate"] == 0.4
    assert card["thresholds"]["slice"]["any"]["threshold"] > 0


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_evaluation_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    metrics = evaluate(tmp_path / "run", None, n_boot=20)
    assert metrics.loc[metrics["value"].isna(), "note"].str.len().gt(0).all()
    assert not np.isinf(metrics[["value", "low", "high"]].astype(float)).any().any()
    assert "NaN" not in (tmp_path / "run" / "model" / "model.json").read_text()


def test_without_predictions_it_names_the_notebook(tmp_path):
    with pytest.raises(InputError, match="predictions.parquet: not there; notebook 12_train makes it"):
        evaluate(tmp_path)


def test_evaluate_imports_no_torch():
    code = "import ich_fastai.evaluate, sys; assert 'torch' not in sys.modules and 'fastai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrong", [{"wanted_sensitivity": 1.2}, {"coverage": 90}])
def test_a_share_that_is_none_is_one_line(simulated_run, wrong):
    with pytest.raises(InputError, match="must be 0.01 to 1.0"):
        evaluate(simulated_run, None, n_boot=20, **wrong)
