"""The comparison of arms: paired differences as a loop gives them, and reasons where nothing can be computed."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sk

from ich_fastai.calibrate import correct_for_sampling, score_levels
from ich_fastai.core import InputError
from ich_fastai.evaluate import level_metrics
from ich_fastai.imbalance import compare, compare_arms, read_arms, table_2
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.metrics import draw_patients, weighted_log_loss
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


def write_arm(folder, arm, ids, logits, keep_rate):
    "predictions.parquet and model.json of an arm, as notebook 12 writes them."
    (folder / "model").mkdir(parents=True)
    predictions = ids.assign(keep_rate=keep_rate, **dict(zip(LOGITS, logits.T, strict=True)))
    predictions.to_parquet(folder / "predictions.parquet")
    balance, weights = arm.split("+")
    card = {"settings": {"balance": balance, "class_weights": weights}}
    (folder / "model" / "model.json").write_text(json.dumps(card))


def write_run(run_dir, arms=ARMS, **options):
    "A run folder with simulated arms: undersampling shifts, class weights add noise, and nothing else."
    ids, p = simulate(**options)
    rng = np.random.default_rng(1)
    for i, arm in enumerate(arms):
        keep_rate = R if arm.startswith("undersample") else 1.0
        x = logit(p / (p[:, -1:] + keep_rate * (1 - p[:, -1:]))) + rng.normal(0, 1, p.shape) * arm.endswith("inverse")
        rows = rng.permutation(len(ids))  # each arm in an order of its own
        write_arm(run_dir / "arms" / arm if i else run_dir, arm, ids.iloc[rows], x[rows], keep_rate)
    return ids, p


def test_paired_differences_are_those_of_a_loop_over_resamples(tmp_path):
    write_run(tmp_path)
    compare(tmp_path, n_boot=100, seed=5)
    table = pd.read_csv(tmp_path / "tables" / "imbalance_differences.csv")
    table = table.set_index(["arm", "probabilities", "minus", "label", "metric"])
    main, none = (
        pd.read_parquet(folder / "predictions.parquet") for folder in (tmp_path, tmp_path / "arms" / "none+none")
    )
    none = none.set_index("SOPInstanceUID").loc[main["SOPInstanceUID"]]
    y, p = main[list(LABELS)].to_numpy(), correct_for_sampling(expit(main[LOGITS].to_numpy()), R)
    q, (codes, draws) = expit(none[LOGITS].to_numpy()), draw_patients(main["PatientID"], 100, 5)
    losses, aucs = [], []
    for w in draws:
        rows = np.repeat(np.arange(len(y)), w[codes])
        losses.append(weighted_log_loss(y[rows], p[rows]) - weighted_log_loss(y[rows], q[rows]))
        aucs.append(sk.roc_auc_score(y[rows, 2], p[rows, 2]) - sk.roc_auc_score(y[rows, 2], q[rows, 2]))
    for key, values in ((("all", "weighted_log_loss"), losses), (("intraventricular", "auc"), aucs)):
        row = table.loc[(ARMS[0], "corrected", "none+none", *key)]
        assert row[["value", "low", "high"]].to_list() == pytest.approx(
            [values[0], *np.percentile(values[1:], [2.5, 97.5])], abs=1e-9
        )
        assert row["says"] == ("higher" if row["low"] > 0 else "lower" if row["high"] < 0 else "not resolved")


def test_the_correction_gives_back_what_undersampling_took(tmp_path):
    ids, p = write_run(tmp_path, arms=("none+none", "undersample+none"))
    arms = compare_arms(read_arms(tmp_path), n_boot=200)
    assert arms.corrected == ("undersample+none",) and arms.reference == "none+none"
    loss = {
        (arm, kind): values["all"]["weighted_log_loss"]
        for arm, kinds in arms.values.items()
        for kind, values in kinds.items()
    }
    natural = loss["none+none", "raw"]
    assert natural[0] == pytest.approx(weighted_log_loss(ids[list(LABELS)].to_numpy(), p), abs=1e-9)
    assert loss["undersample+none", "corrected"] == pytest.approx(natural, abs=1e-9)
    assert (loss["undersample+none", "raw"] - natural).min() > 0.05
    found = compare(tmp_path, n_boot=200)["imbalance_words"].set_index("comparison")["weighted log loss"]
    assert found["undersample+none minus none+none, corrected"] == "equal: 0.000 (0.000 to 0.000)"
    assert found["undersample+none: corrected minus raw"].startswith("better: -0.")


def test_the_main_arm_is_measured_as_notebook_22_measures_it(tmp_path):
    write_run(tmp_path)
    table = table_2(compare_arms(read_arms(tmp_path), n_boot=100, seed=3)).query("arm == @ARMS[0]")
    levels = score_levels(pd.read_parquet(tmp_path / "predictions.parquet"))
    metrics = level_metrics(levels, n_boot=100, seed=3).query("level == 'slice'")
    both = table.merge(metrics, on=["label", "metric", "probabilities"])
    assert len(both) == 2 * (5 * 6 + 1) and both["value_x"].notna().all()
    assert both[["value_x", "low_x", "high_x"]].to_numpy() == pytest.approx(
        both[["value_y", "low_y", "high_y"]].to_numpy(), abs=1e-12
    )


@pytest.mark.parametrize(
    "arms, options, says",
    [
        (ARMS[:1], {}, "undersample+inverse: corrected minus raw"),
        (("none+none",), {}, "none: one arm was run, without undersampling"),
        (ARMS[:2], {}, "none+inverse minus undersample+inverse, corrected"),
        (ARMS, {"prevalence": False}, "no interval: undefined: no positive"),
        (ARMS, {"n_patients": 1}, "one patient: no interval"),
        (ARMS[:1], {"n_patients": 1, "each": 1}, "one patient: no interval"),
    ],
    ids=["one arm", "nothing to correct", "another reference", "no positive", "one patient", "one slice"],
)
def test_what_cannot_be_computed_says_why(tmp_path, arms, options, says):
    write_run(tmp_path, arms, **options)
    compare(tmp_path, n_boot=30)
    tables = {p.stem: pd.read_csv(p, keep_default_na=False) for p in (tmp_path / "tables").glob("*.csv")}
    for name in ("table_2", "imbalance_differences"):
        missing = tables[name][(tables[name]["value"] == "") | (tables[name]["low"] == "")]
        assert missing["note"].str.len().gt(0).all(), name
    words = [str(v) for name in ("imbalance", "imbalance_words") for v in tables[name].to_numpy().flat]
    assert any(says in word for word in words) and not any("nan" in word for word in words)
    for name, table in tables.items():
        assert not table.map(lambda v: str(v).lower() in ("nan", "inf", "<na>", "none")).any().any(), name
    figures = {"imbalance.svg"} | ({"imbalance_differences.svg", "imbalance_labels.svg"} if len(arms) > 1 else set())
    assert figures == {p.name for p in (tmp_path / "figures").iterdir()}


def test_the_short_table_has_a_row_per_arm_and_says_its_numbers(tmp_path):
    write_run(tmp_path)
    compare(tmp_path, n_boot=50)
    short = pd.read_csv(tmp_path / "tables" / "imbalance.csv", dtype=str)
    twice = {f"undersample+{weights}, {kind}" for weights in ("none", "inverse") for kind in ("raw", "corrected")}
    assert set(short["arm"]) == {"none+none", "none+inverse"} | twice
    numbers = short.drop(columns=["arm", "slices", "patients", "prevalence", "note"]).stack()
    assert len(numbers) == 6 * 4 and numbers.str.fullmatch(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)").all()
    assert (short[["slices", "patients"]] == ["480", "60"]).all().all()


def test_an_arm_of_another_cohort_is_refused(tmp_path):
    ids, p = write_run(tmp_path, arms=ARMS[:1])
    write_arm(tmp_path / "arms" / "none+none", "none+none", ids.iloc[1:], logit(p[1:]), 1.0)
    with pytest.raises(InputError, match=r"none\+none: its slices are not the main arm"):
        compare(tmp_path)
