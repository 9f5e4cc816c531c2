"""The paper's page: its numbers beside ours, each with a verdict or the reason why there is none."""

import numpy as np
import pandas as pd
import pytest

from ich_fastai.labels import LABELS, read_combinations
from ich_fastai.tiny import simulate_scores
from ich_fastai.paper import compare_paper, make_paper


@pytest.mark.parametrize("n, bleed", [(480, True), (480, False), (1, True)], ids=["some", "no positive", "one slice"])
def test_every_number_of_the_paper_has_a_verdict(tmp_path, n, bleed):
    y = simulate_scores(n, min(n, 60), center=np.full(5, -2.0))[0] * bleed
    labels = pd.DataFrame(np.c_[y, y.any(1)], columns=list(LABELS), dtype="uint8").rename_axis("SOPInstanceUID")
    labels.to_parquet(tmp_path / "labels.parquet")
    cohort = labels.assign(clean=True, in_sample=labels["any"] == 1).reset_index()
    cohort.to_parquet(tmp_path / "cohort.parquet")
    assert make_paper(tmp_path)["verdict"].str.len().gt(0).all()
    for path in (tmp_path / "tables").glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        assert not table.map(lambda v: str(v).lower() in ("nan", "inf", "<na>", "none")).any().any(), path.name
    assert {"table_1.svg", "heat_map.svg"} <= {p.name for p in (tmp_path / "figures").iterdir()}


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
