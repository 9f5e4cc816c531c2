"""The paper's page: paired differences as a loop gives them, verdicts that follow from intervals, or reasons."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sk

from ich_fastai.calibrate import LOGITS, correct_for_sampling, score_levels
from ich_fastai.evaluate import level_metrics
from ich_fastai.imbalance import read_arms, run_study, save_study, table_2
from ich_fastai.core import InputError
from ich_fastai.labels import LABELS, read_combinations
from ich_fastai.metrics import draw_patients, simulate_scores, weighted_log_loss
from ich_fastai.paper import compare_paper, make_paper

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
    ids.set_index("SOPInstanceUID")[list(LABELS)].astype("uint8").to_parquet(run_dir / "labels.parquet")
    ids.assign(clean=True, in_sample=ids["any"] == 1).to_parquet(run_dir / "cohort.parquet")
    return ids, p


def test_paired_differences_are_those_of_a_loop_over_resamples(tmp_path):
    write_run(tmp_path)
    save_study(tmp_path, n_boot=100, seed=5)
    table = pd.read_csv(tmp_path / "tables" / "imbalance_differences.csv").set_index(
        ["arm", "probabilities", "minus", "label", "metric"]
    )
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
    study = run_study(read_arms(tmp_path), n_boot=200)
    assert study.corrected == ("undersample+none",)
    of = {key: values["all", "weighted_log_loss"] for key, values in study.values.items()}
    assert of["none+none", "corrected"][0] == pytest.approx(
        weighted_log_loss(ids[list(LABELS)].to_numpy(), p), abs=1e-9
    )
    assert of["undersample+none", "corrected"] == pytest.approx(of["none+none", "corrected"], abs=1e-9)
    assert (of["undersample+none", "raw"] - of["none+none", "corrected"]).min() > 0.05
    sentences = save_study(tmp_path, n_boot=200)
    start = "undersample+none against none+none, after the prior correction: weighted log loss not resolved ("
    assert any(s.startswith(start) for s in sentences)
    assert any(s.startswith("The prior correction of undersample+none: weighted log loss better (-") for s in sentences)


def test_the_main_arm_is_measured_as_notebook_22_measures_it(tmp_path):
    write_run(tmp_path)
    table = table_2(run_study(read_arms(tmp_path), n_boot=100, seed=3)).query("arm == @ARMS[0]")
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
        (ARMS[:1], {}, "Only the arm undersample+inverse was run"),
        (("none+none",), {}, "there is nothing to correct"),
        (ARMS[:2], {}, "none+inverse against undersample+inverse"),
        (ARMS, {"prevalence": False}, "AUC of any: undefined: no positive"),
        (ARMS, {"n_patients": 1}, "(one patient: no interval)"),
        (ARMS[:1], {"n_patients": 1, "each": 1}, "1 slice of 1 held-out patient,"),
    ],
    ids=["one arm", "nothing to correct", "another reference", "no positive", "one patient", "one slice"],
)
def test_what_cannot_be_computed_says_why(tmp_path, arms, options, says):
    write_run(tmp_path, arms, **options)
    save_study(tmp_path, n_boot=30)
    verdicts = make_paper(tmp_path)
    assert verdicts["verdict"].str.len().gt(0).all()
    tables = {p.stem: pd.read_csv(p, keep_default_na=False) for p in (tmp_path / "tables").glob("*.csv")}
    for name in ("table_2", "imbalance_differences"):
        missing = tables[name][(tables[name]["value"] == "") | (tables[name]["low"] == "")]
        assert missing["note"].str.len().gt(0).all(), name
    assert says in " ".join(tables["imbalance_words"]["what came out"])
    for name, table in tables.items():
        assert not table.map(lambda v: str(v).lower() in ("nan", "inf", "<na>", "none")).any().any(), name
    assert not any("nan" in sentence for sentence in tables["imbalance_words"]["what came out"])
    assert {"table_1.svg", "heat_map.svg", "imbalance.svg"} <= {p.name for p in (tmp_path / "figures").iterdir()}


def test_the_short_table_has_a_row_per_arm_and_says_its_numbers(tmp_path):
    write_run(tmp_path)
    save_study(tmp_path, n_boot=50)
    short = pd.read_csv(tmp_path / "tables" / "imbalance.csv", dtype=str)
    assert set(short["arm"]) == {"none+none", "none+inverse"} | {
        f"undersample+{w}, {kind}" for w in ("none", "inverse") for kind in ("raw", "corrected")
    }
    assert (
        short.drop(columns=["arm", "slices", "patients", "prevalence"])
        .map(lambda s: bool(pd.Series(s).str.fullmatch(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)").all()))
        .all()
        .all()
    )
    assert (short[["slices", "patients"]] == ["480", "60"]).all().all()


def test_an_arm_of_another_cohort_is_refused(tmp_path):
    ids, p = write_run(tmp_path, arms=ARMS[:1])
    write_arm(tmp_path / "arms" / "none+none", "none+none", ids.iloc[1:], logit(p[1:]), 1.0)
    with pytest.raises(InputError, match=r"none\+none: its predictions are of other slices"):
        save_study(tmp_path)


def test_the_flow_to_194_082_is_recounted_only_where_every_positive_slice_is_there():
    labels, steps = read_combinations(), ["slices", "normal", "positive", "lost", "clean", "sample"]
    cohort = labels.assign(clean=True, in_sample=False)
    positives = np.flatnonzero(labels["any"])
    cohort.loc[positives[:62], "clean"] = False
    cohort.loc[[*positives[62:], *np.flatnonzero(labels["any"] == 0)[: len(positives) - 62]], "in_sample"] = True
    table = compare_paper(labels, cohort).loc[steps]
    assert table["ours"].to_list() == [674_258, 577_155, 97_103, 62, 97_041, 194_082]
    assert (table["verdict"] == "equal").all()
    cohort.loc[positives[0], "clean"] = True
    assert compare_paper(labels, cohort)["verdict"]["lost"] == "different: the rule is inferred from the arithmetic"
    part = compare_paper(labels, cohort.drop(positives[100:])).loc[steps]
    assert part["ours"].isna().to_list() == [False] * 3 + [True] * 3
    reason = "not computable from these files: 97,003 of 97,103 slices with hemorrhage have none here"
    assert (part["verdict"].iloc[3:] == reason).all()


def test_other_labels_are_another_dataset_even_where_there_are_as_many():
    labels = read_combinations()
    labels.loc[labels.index[labels["any"] == 1][0]] = 0
    verdict = compare_paper(labels, labels.assign(clean=True, in_sample=False))["verdict"]
    assert verdict["slices"] == "equal"
    assert (verdict[["normal", "sample"]] == "different: this is another dataset").all()
