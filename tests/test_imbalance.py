"""The comparison of arms: differences as a loop gives them, seeds' luck no effect, reasons where there is no number."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import t as student
from sklearn import metrics as sk

from ich_fastai.arms import read_arms
from ich_fastai.calibrate import correct_for_sampling, score_levels
from ich_fastai.core import InputError
from ich_fastai.evaluate import level_metrics
from ich_fastai.imbalance import ONE_SEED, compare, compare_arms, table_2, widen
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.metrics import draw_patients, find_estimate, rank_metrics, say_difference, weighted_log_loss
from ich_fastai.tiny import simulate_scores

ARMS = ("undersample+inverse", "none+inverse", "none+none", "undersample+none")
R = 0.2  # share of the normal slices that undersampling keeps


def simulate(n_patients=60, each=8, prevalence=True, seed=0):
    "Ids, labels and the true probabilities of simulated patients; `any` is the OR of the five."
    y, p, patient = simulate_scores(n_patients * each, n_patients, seed, center=np.full(5, -2.0))
    p = np.c_[p, 1 - (1 - p).prod(1)]
    y = np.c_[y, y.any(1)] * prevalence
    names = [f"ID_{i}" for i in np.random.default_rng(seed).permutation(len(y))]
    ids = pd.DataFrame({"SOPInstanceUID": names, "PatientID": patient, "StudyInstanceUID": patient})
    return ids.assign(fold=patient % 2, **dict(zip(LABELS, y.T, strict=True))), p


def write_run(run_dir, arms=ARMS, seeds=2, luck=0.0, **options):
    "A run folder with simulated arms: undersampling shifts, class weights and seeds add noise, and nothing else."
    ids, p = simulate(**options)
    rng = np.random.default_rng(1)
    for arm in arms:
        keep_rate = R if arm.startswith("undersample") else 1.0
        x = logit(p / (p[:, -1:] + keep_rate * (1 - p[:, -1:]))) + rng.normal(0, 1, p.shape) * arm.endswith("inverse")
        for seed in range(seeds):
            folder = run_dir / "arms" / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            rows, noisy = rng.permutation(len(ids)), x + luck * rng.normal(size=p.shape)
            columns = dict(zip(LOGITS, noisy[rows].T, strict=True))  # each in an order of its own
            ids.iloc[rows].assign(keep_rate=keep_rate, **columns).to_parquet(folder / "predictions.parquet")
    return ids, p


def read_differences(run_dir):
    table = pd.read_csv(run_dir / "tables" / "imbalance_differences.csv", keep_default_na=False)
    return table.set_index(["arm", "probabilities", "minus", "label", "metric"])


def test_differences_are_those_of_a_loop_over_resamples(tmp_path):
    write_run(tmp_path, (ARMS[0], "none+none"), seeds=3, luck=0.5)
    compare(tmp_path, n_boot=60, seed=5)
    tables = {(arm, seed): table for arm, seed, table in read_arms(tmp_path)}
    first = next(iter(tables.values()))
    y, (codes, draws) = first[list(LABELS)].to_numpy(), draw_patients(first["PatientID"], 60, 5)
    p = {
        (arm, k): correct_for_sampling(expit(tables[arm, k][LOGITS].to_numpy()), R if arm == ARMS[0] else 1.0)
        for arm in (ARMS[0], "none+none")
        for k in range(3)
    }
    for key, measure in {
        ("all", "weighted_log_loss"): lambda y, p: weighted_log_loss(y, p),
        ("intraventricular", "auc"): lambda y, p: sk.roc_auc_score(y[:, 2], p[:, 2]),
    }.items():
        drawn = [np.repeat(np.arange(len(y)), w[codes]) for w in draws]
        m = np.array([[measure(y[rows], of[rows]) for rows in drawn] for of in p.values()]).reshape(2, 3, -1)
        gap, widths = m[0].mean(0) - m[1].mean(0), lambda x: np.subtract(*np.percentile(x, [97.5, 2.5])) / 3.919928
        seeds = m[:, :, 0].var(1, ddof=1) / 3
        own = sum(widths((m[a, k] - m[a].mean(0))[1:]) ** 2 for a in (0, 1) for k in range(3)) / 2 / 3
        parts = np.array([*seeds, max(widths(gap[1:]) ** 2 - own, 0)])
        freedom = parts.sum() ** 2 / (parts**2 / [2, 2, 59]).sum()
        half = student.ppf(0.975, freedom) * parts.sum() ** 0.5
        row = read_differences(tmp_path).loc[(ARMS[0], "corrected", "none+none", *key)]
        assert row[["value", "low", "high"]].astype(float).to_list() == pytest.approx(
            [gap[0], gap[0] - half, gap[0] + half], abs=1e-7
        )
        assert row["says"] == ("higher" if gap[0] > half else "lower" if gap[0] < -half else "not resolved")


def count_findings(auc, k, splits):
    "Share of differences of two arms of k seeds that leave 0 out, of seeds of one arm: over both levels, of one seed."
    rng, found = np.random.default_rng(0), []
    for _ in range(splits):
        rows = rng.permutation(len(auc))
        a, b = auc[rows[:k]], auc[rows[k : 2 * k]]
        gap, one = a.mean(0) - b.mean(0), a[0] - b[0]
        both, alone = widen(find_estimate(gap), gap, (a, b), 20), find_estimate(one)
        found.append([say_difference(e) in ("higher", "lower") for e in (both, alone)])
    return np.mean(found, 0)


def test_the_luck_of_a_seed_is_not_reported_as_an_effect_of_an_arm():
    "Forty seeds as unlike as the five that were trained: standard deviation .07, patients alone .035."
    measured = [0.863, 0.843, 0.792, 0.706, 0.882]
    rng = np.random.default_rng(0)
    for k in (3, 5):
        auc = rng.normal(np.mean(measured), np.std(measured, ddof=1), (40, 1)) * np.ones(301)
        auc[:, 1:] += rng.normal(0, 0.025, (40, 300)) + rng.normal(0, 0.025, 300)
        both, alone = count_findings(auc, k, 400)
        assert both < 0.08 and alone > 0.2, (k, both, alone)
    five = np.array(measured)[:, None] + rng.normal(0, 0.03, (5, 301)) * (np.arange(301) > 0)
    for a in range(5):
        for b in set(range(5)) - {a}:
            gap = five[a] - five[b]
            found = widen(find_estimate(gap), gap, (five[[a]], five[[b]]), 20)
            assert not found.has_interval and found.why == "one seed an arm: no interval"


def simulate_equal(rng, k, patients, effect=0.0):
    "AUCs (k, b) of two arms on the same patients, who are hard or easy; seeds differ in skill and in what they see."
    y, p, patient = simulate_scores(12 * patients, patients, int(rng.integers(1e9)), hidden=1)
    patient, draws = draw_patients(patient, 100, 0)
    out = []
    for shift in (0.0, effect):
        skill = np.exp(rng.normal(shift, 0.25, k))[:, None]
        noise = rng.normal(0, 0.7, (k, patients))[:, patient] + rng.normal(0, 0.5, (k, len(y)))
        out.append(np.stack([rank_metrics(y, s, patient, draws, ())["auc"] for s in logit(p) * skill + noise]))
    return out


def test_equal_arms_are_found_different_as_often_as_said_and_unlike_ones_more_often():
    rng, n = np.random.default_rng(0), 25
    found = {0.0: [], -1.5: []}
    for effect, says in found.items():
        for _ in range(50 if effect else 150):
            a, b = simulate_equal(rng, 3, n, effect)
            gap = a.mean(0) - b.mean(0)
            says.append(say_difference(widen(find_estimate(gap), gap, (a, b), n)) != "not resolved")
    assert np.mean(found[0.0]) < 0.09 and np.mean(found[-1.5]) > 0.5, {k: np.mean(v) for k, v in found.items()}


def test_the_correction_gives_back_what_undersampling_took(tmp_path):
    ids, p = write_run(tmp_path, arms=("none+none", "undersample+none"))
    arms = compare_arms(read_arms(tmp_path), n_boot=50)
    assert arms.corrected == ("undersample+none",) and arms.reference == "none+none"
    loss = {
        (arm, kind): values["all"]["weighted_log_loss"].mean(0)
        for arm, kinds in arms.values.items()
        for kind, values in kinds.items()
    }
    natural = loss["none+none", "raw"]
    assert natural[0] == pytest.approx(weighted_log_loss(ids[list(LABELS)].to_numpy(), p), abs=1e-9)
    assert loss["undersample+none", "corrected"] == pytest.approx(natural, abs=1e-9)
    assert (loss["undersample+none", "raw"] - natural).min() > 0.05
    found = compare(tmp_path, n_boot=50)["imbalance_words"].set_index("comparison")["weighted log loss"]
    assert found["undersample+none minus none+none, corrected"] == "equal: 0.000 (0.000 to 0.000)"
    assert found["undersample+none: corrected minus raw"].startswith("better: -0.")


def test_one_seed_is_measured_as_notebook_22_measures_it(tmp_path):
    write_run(tmp_path, seeds=1)
    table = table_2(compare_arms(read_arms(tmp_path), n_boot=100, seed=3)).query("arm == @ARMS[0]")
    arm, _, first = next(t for t in read_arms(tmp_path) if t[0] == ARMS[0])
    metrics = level_metrics(score_levels(first), n_boot=100, seed=3).query("level == 'slice'")
    both = table.merge(metrics, on=["label", "metric", "probabilities"])
    assert len(both) == 2 * (5 * 6 + 1) and both["value_x"].notna().all()
    assert both[["value_x", "low_x", "high_x"]].to_numpy() == pytest.approx(
        both[["value_y", "low_y", "high_y"]].to_numpy(), abs=1e-12
    )
    assert table["note"].str.startswith(ONE_SEED).all()


@pytest.mark.parametrize(
    "arms, options, says",
    [
        (ARMS[:1], {}, ("undersample+inverse: corrected minus raw",)),
        (ARMS, {"seeds": 1}, ("(one seed an arm: no interval)", ONE_SEED)),
        (("none+none",), {}, ("none: one arm was run, without undersampling",)),
        (ARMS[:2], {}, ("undersample+inverse minus none+inverse, corrected",)),
        (ARMS, {"prevalence": False}, ("no interval: undefined: no positive",)),
        (ARMS, {"n_patients": 1}, ("one patient: no interval",)),
        (ARMS[:1], {"n_patients": 1, "each": 1}, ("one patient: no interval",)),
    ],
    ids=["one arm", "one seed", "nothing to correct", "another reference", "no positive", "one patient", "one slice"],
)
def test_what_cannot_be_computed_says_why(tmp_path, arms, options, says):
    write_run(tmp_path, arms, **options)
    compare(tmp_path, n_boot=20)
    tables = {p.stem: pd.read_csv(p, keep_default_na=False) for p in (tmp_path / "tables").glob("*.csv")}
    for name in ("table_2", "imbalance_differences"):
        missing = tables[name][(tables[name]["value"] == "") | (tables[name]["low"] == "")]
        assert missing["note"].str.len().gt(0).all(), name
    words = [str(v) for name in ("imbalance", "imbalance_words") for v in tables[name].to_numpy().flat]
    assert not [text for text in says if not any(text in word for word in words)]
    assert not any("nan" in word for word in words)
    for name, table in tables.items():
        assert not table.map(lambda v: str(v).lower() in ("nan", "inf", "<na>", "none")).any().any(), name
    figures = {"imbalance.svg"} | ({"imbalance_differences.svg", "imbalance_labels.svg"} if len(arms) > 1 else set())
    assert figures == {p.name for p in (tmp_path / "figures").iterdir()}


def test_the_short_table_has_a_row_per_arm_and_says_its_numbers(tmp_path):
    write_run(tmp_path, luck=0.3)
    compare(tmp_path, n_boot=20)
    constant, *short = pd.read_csv(tmp_path / "tables" / "imbalance.csv", dtype=str).to_dict("records")
    y = next(read_arms(tmp_path))[-1][list(LABELS)].to_numpy()
    loss = weighted_log_loss(y, np.broadcast_to(y.mean(0), y.shape))
    assert constant["arm"].startswith("a constant") and constant["weighted log loss"] == f"{loss:.3f}"
    short = pd.DataFrame(short)
    twice = {f"undersample+{weights}, {kind}" for weights in ("none", "inverse") for kind in ("raw", "corrected")}
    assert set(short["arm"]) == {"none+none", "none+inverse"} | twice
    numbers = short.drop(columns=["arm", "seeds", "slices", "patients", "prevalence", "note"]).stack()
    one = r"\d\.\d{3}"
    assert len(numbers) == 6 * 4
    assert numbers.str.fullmatch(rf"{one} \({one} to {one}\); seeds {one} to {one}").all()
    assert (short[["seeds", "slices", "patients"]] == ["2", "480", "60"]).all().all()


def test_an_arm_of_another_cohort_is_refused(tmp_path):
    write_run(tmp_path, arms=ARMS[:1], seeds=2)
    path = tmp_path / "arms" / ARMS[0] / "seed-1" / "predictions.parquet"
    pd.read_parquet(path).iloc[1:].to_parquet(path)
    with pytest.raises(InputError, match="seed-1: its slices are not those of the first"):
        compare(tmp_path)
