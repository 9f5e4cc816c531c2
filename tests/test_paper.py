"""The paper's page: its numbers beside ours, each with a verdict or the reason why there is none."""

import numpy as np
import pandas as pd
import pytest

from ich_fastai.labels import LABELS, read_combinations
from ich_fastai.metrics import simulate_scores
from ich_fastai.paper import compare_paper, derivation, make_paper, read_paper


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


def test_the_flow_to_194_082_is_recounted_only_where_every_positive_slice_is_there(tmp_path):
    labels = read_combinations()
    cohort = labels.assign(clean=True, in_sample=False)
    positives = np.flatnonzero(labels["any"])
    cohort.loc[positives[:62], "clean"] = False
    cohort.loc[[*positives[62:], *np.flatnonzero(labels["any"] == 0)[: len(positives) - 62]], "in_sample"] = True
    assert derivation(labels, cohort)["this data"].to_list() == read_paper()["value"].loc[
        ["slices", "normal", "positive"]
    ].to_list() + [62, 97_041, 194_082]
    assert (derivation(labels, cohort)["verdict"] == "equal").all()
    cohort.loc[positives[0], "clean"] = True
    assert (
        derivation(labels, cohort)["verdict"].iloc[3]
        == "different: the rule is inferred from the arithmetic (notebook 09)"
    )
    part = derivation(labels, cohort.drop(positives[100:]))
    assert part["this data"].isna().to_list() == [False] * 3 + [True] * 3
    assert (
        part["verdict"].iloc[-1]
        == "not computable from these files: 97,003 of 97,103 slices with hemorrhage have no readable file here"
    )
    assert (
        compare_paper(labels, cohort.drop(positives[100:]))
        .set_index("what")
        .loc["slices after undersampling", "verdict"]
        == part["verdict"].iloc[-1]
    )
