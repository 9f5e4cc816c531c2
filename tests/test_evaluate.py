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

from ich_fastai.calibrate import Fitted, conformal_bound, correct_for_sampling, correct_logits, cross_fit
from ich_fastai.calibrate import score_levels, split_patients
from ich_fastai.core import InputError
from ich_fastai.evaluate import evaluate, headline_table, level_metrics
from ich_fastai.labels import LABELS, LOGITS, read_labels
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
    for seed in range(5):
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
    return label_metrics(y, p, patient, draws)["calibration_error"]


def test_calibration_error_of_single_slices_is_that_of_kumar():
    y, p, patient = simulate_scores(300, 300)
    seen, said = calibration_curve(y, p**2, n_bins=10, strategy="quantile")  # 300 slices: bins of 30
    bins = np.searchsorted(np.quantile(p**2, np.linspace(0, 1, 11))[1:-1], p**2)
    noise = np.array([np.var((p**2 - y)[bins == k], ddof=1) / 30 for k in range(10)])
    expected = np.mean((seen - said) ** 2 - noise) ** 0.5
    assert calibration_errors(y, p**2, patient, np.ones((1, 300)))[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bend", [1.0, 1.5], ids=["no error", "overconfident"])
def test_intervals_of_the_calibration_error_cover_the_truth(bend):
    y, p, patient = simulate_scores(1_000_000, 100_000, seed=10**6)
    truth = calibration_errors(y, expit(bend * logit(p)), patient, np.ones((1, 100_000)))[0]
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
            for name, a, b in zip(Fitted._fields, ours, other, strict=True):
                assert (a[here] == b[here]).all(), "labels of the part leaked into it"
                assert (a[~here] != b[~here]).any(), name


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
        for k in np.unique(d.part):
            here = d.part == k
            turned = np.isin(patient, d.patients[here])[:, None]
            # `any` stays: it deals the halves of a single fold
            other = score(np.c_[np.where(turned, 1 - y[:, :5], y[:, :5]), y[:, -1]])[level]
            assert (other.part == d.part).all()
            for name in Fitted._fields:
                assert (getattr(other, name)[here] == getattr(d, name)[here]).all(), (level, name, "leaked")
            assert (other.calibrated[~here] != d.calibrated[~here]).any()


def test_parts_with_maps_of_their_own_do_not_change_the_ranks():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(90), 20)
    x = rng.normal(size=(1800, 6)) + rng.normal(size=(90, 6))[patient]
    y = (rng.random(x.shape) < expit(x - 2 + (patient % 2)[:, None])).astype(int)  # more positives in one part
    ids = pd.DataFrame({"PatientID": patient, "StudyInstanceUID": patient, "fold": patient % 2, "keep_rate": 1.0})
    predictions = ids.assign(**dict(zip(LOGITS, x.T, strict=True)), **dict(zip(LABELS, y.T, strict=True)))
    levels = score_levels(predictions)
    pooled = sk.roc_auc_score(y[:, 2], levels["slice"].calibrated[:, 2])
    metrics = level_metrics(levels, n_boot=20)
    value = metrics.set_index(["level", "probabilities", "label", "metric"])["value"]
    for level, d in levels.items():
        for label, k in (("intraventricular", 2), ("any", 5)):
            auc = sk.roc_auc_score(d.y[:, k], d.x[:, k])
            assert value[level, "calibrated", label, "auc"] == pytest.approx(auc, abs=1e-9)
            for metric in RANKS:
                assert value[level, "calibrated", label, metric] == value[level, "corrected", label, metric]
    auc = value["slice", "calibrated", "intraventricular", "auc"]
    assert auc - pooled > 0.02, "or there is nothing to see here"
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
        assert fit_logistic(logit(fitted.calibrated[:, k]), y[:, k]) == pytest.approx((1, 0), abs=0.1)
        assert sk.log_loss(y[:, k], fitted.calibrated[:, k]) == pytest.approx(
            sk.log_loss(y[:, k], expit(truth[:, k])), abs=0.003
        )
    called = fitted.calibrated >= fitted.threshold
    assert (called & (y == 1)).sum(0) / y.sum(0) == pytest.approx(np.full(6, 0.9), abs=0.04)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_conformal_sets_keep_their_promise(coverage):
    kept = []
    for seed in range(400):
        y, p, patient = simulate_scores(600, 80, seed)
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


def auc_and_log_loss(y, p, unit, draws):
    return np.stack([rank_metrics(y, p, unit, draws, ())["auc"], mean_metrics(y, p, unit, draws)["log_loss"]])


def test_intervals_by_patient_cover_the_truth_and_those_by_slice_do_not():
    y, p, patient = simulate_scores(1_000_000, 100_000, seed=10**6, hidden=1)
    truth = auc_and_log_loss(y, p, patient, np.ones((1, 100_000)))[:, 0]
    n, covered = 200, {"patient": np.zeros(2), "slice": np.zeros(2)}
    for seed in range(n):
        y, p, patient = simulate_scores(1200, 120, seed, hidden=1)
        for way, unit in (("patient", patient), ("slice", np.arange(len(y)))):
            drawn = auc_and_log_loss(y, p, *draw_patients(unit, 200, seed))
            low, high = np.percentile(drawn[:, 1:], [2.5, 97.5], axis=1)
            covered[way] += (low <= truth) & (truth <= high)
    # a method that covers 93% to 97% falls outside once in 1,000 times
    least, most = binom.ppf(0.001, n, 0.93), binom.ppf(0.999, n, 0.97)
    assert ((least <= covered["patient"]) & (covered["patient"] <= most)).all(), covered
    assert (covered["slice"] < least).all(), covered


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
def test_the_stage_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
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
    with pytest.raises(InputError, match="must be a share above 0 and up to 1"):
        evaluate(simulated_run, None, n_boot=20, **wrong)
