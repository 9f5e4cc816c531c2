"""What stands behind the scores: every table and figure is written, also where there is next to nothing to explain."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from ich_fastai.core import InputError, read_run_file
from ich_fastai.explain import explain, integrated_gradients, flatten_brain, score_slices, smooth_map, worst_mistakes
from ich_fastai.network import build_model
from ich_fastai.tiny import tiny_phantom


def test_the_stage_writes_its_files(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    explain(simulated_run, tiny_phantom(), n_boot=50)
    captions = pd.read_csv(simulated_run / "tables" / "captions.csv")
    assert {"evidence.png", "mistakes.png", "subgroups.svg"} <= set(captions["figure"])
    assert all((simulated_run / "figures" / f).is_file() for f in captions["figure"])
    assert captions["caption"].str.contains("Synthetic data").all()
    pointing = pd.read_csv(simulated_run / "tables" / "pointing.csv")
    assert pointing["value"].dropna().between(0, 1).all() and pointing["n"].sum() > 0
    rate = pointing.query("label == 'all' and measure == 'peak' and who == 'the map'")["value"].item()
    caption = captions.set_index("figure").loc["evidence.png", "caption"]
    assert f"lies in it on {rate:.3f}" in caption and "untrained" in caption


def test_the_sensitivity_that_was_asked_for_reaches_the_subgroups(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    path, found = simulated_run / "model" / "model.json", {}
    for wanted in (0.5, 1.0):
        card = read_run_file(path)
        path.write_text(json.dumps(card | {"thresholds": {"wanted_sensitivity": wanted}}))
        table = explain(simulated_run, n_boot=2)["subgroups"].query("metric == 'sensitivity'")
        found[wanted] = np.average(table["value"].fillna(0).astype(float), weights=table["n_positive"])
    assert found[0.5] < found[1.0] - 0.1


def test_a_mistake_is_a_wrong_call_at_the_threshold(simulated_run, write_predictions):
    cohort = pd.read_parquet(simulated_run / "cohort.parquet")
    write_predictions(simulated_run, cohort[cohort["fold"] < 2], (0, 1))
    predictions, d = pd.read_parquet(simulated_run / "predictions.parquet"), score_slices(simulated_run)
    mistakes = worst_mistakes(predictions, d, n=100)
    called = pd.Series(d.calibrated[:, -1] >= d.threshold[:, -1], index=predictions["SOPInstanceUID"])
    truth = predictions.set_index("SOPInstanceUID")["any"]
    for kind, rows in mistakes.groupby("kind"):
        assert (truth[rows["SOPInstanceUID"]] == (kind == "missed")).all()
        assert (called[rows["SOPInstanceUID"]] == (kind == "false alarm")).all()
        assert (rows["mistakes"] == ((called != truth) & (truth == (kind == "missed"))).sum()).all()
    assert len(mistakes)


@pytest.mark.parametrize("which", ["no positive", "one patient", "one slice"])
def test_the_explanation_survives_too_little_data(simulated_run, write_predictions, too_little, tmp_path, which):
    shutil.copytree(simulated_run, tmp_path / "run")
    rows = too_little(pd.read_parquet(simulated_run / "cohort.parquet"), which)
    write_predictions(tmp_path / "run", rows, (rows["fold"].iloc[0],))
    table = explain(tmp_path / "run", None, n_boot=20)["subgroups"]
    assert table.loc[table["value"].isna(), "note"].str.len().gt(0).all()


class ReadsOnePlace(torch.nn.Module):
    "Sees blood in rows 8 to 11, columns 20 to 23; the label `any` alone."

    def forward(self, x):
        logits = torch.zeros(len(x), 6)
        logits[:, 5] = torch.relu(x[:, 0, 8:12, 20:24]).sum((1, 2))
        return logits


def test_the_map_points_at_what_the_network_reads():
    x = torch.rand(2, 1, 32, 32) + 0.1  # bright everywhere, read in one place
    maps = smooth_map(integrated_gradients(ReadsOnePlace(), x, torch.zeros_like(x), ["any", "subdural"]))
    down, across = divmod(int(maps[0].argmax()), 32)
    assert 8 <= down < 12 and 20 <= across < 24
    assert maps[0, 6:14, 18:26].sum() == pytest.approx(maps[0].sum(), rel=1e-3)
    assert not maps[1].any()  # nothing speaks for this label


@pytest.mark.parametrize(
    "arch", ["resnet10t", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224"]
)
def test_any_kind_of_backbone_can_be_explained(arch):
    torch.manual_seed(0)
    network = build_model(arch, 1, image_size=64).eval()
    hu = torch.full((2, 1, 64, 64), -1000.0)
    hu[:, :, 10:50, 10:50] = 60
    x, base = (torch.clamp(pixels / 40 - 1, -1, 1) for pixels in (hu, flatten_brain(hu)))
    added = integrated_gradients(network, x, base, ["any", "epidural"])
    assert added.shape == (2, 64, 64) and np.isfinite(added).all()
    assert added[:, 10:50, 10:50].any() and not added[:, :10].any()  # air stays air: it adds nothing


def test_a_size_that_a_backbone_cannot_take_is_one_line():
    with pytest.raises(InputError, match="test_vit: does not work at image_size=65, it was made for 160") as error:
        build_model("test_vit", 3, image_size=65)
    assert "\n" not in str(error.value)
