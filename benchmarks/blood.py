"""Does a network see the blood, or where in the head a slice lies?

python benchmarks/blood.py --real FOLDER [--work FOLDER] [--seeds 3] [--folds 2] [--report]

FOLDER holds phe_sich/ (see data/README.md). Three ways to train: on the phantom alone, on real patients alone, on the
phantom and then on real patients. Each network scores real patients that it has not seen. Every training is a cell:
its scores and a JSON line of facts are written at once, and the same command goes on with the cells that are missing.
"""

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from ich_fastai.batches import Augment, Settings, SliceBatches, slice_loaders
from ich_fastai.cohort import make_cohort
from ich_fastai.core import read_stage, write_file
from ich_fastai.dicom import DicomError, Window, read_slice
from ich_fastai.external import PICTURE_SETS, PictureSet, import_pictures, to_picture
from ich_fastai.labels import LABELS
from ich_fastai.model import build_model, make_loss
from ich_fastai.phantom import make_phantom
from ich_fastai.train import FollowEpochs, StopOnNonFinite, make_learner

warnings.filterwarnings("ignore")

N_PATIENTS = 400  # of the phantom
BURNED = Window(40, 120)
AUGMENT = Augment(degrees=15, zoom=0.2, shift=0.08, noise_hu=8)
WINDOWS = {"brain": (40, 80), "blood": (55, 50), "wide": (40, 120)}
ANY = LABELS.index("any")
ARMS = {"phantom": 12_000, "real": 6_000, "phantom, then real": 6_000}  # images that a training sees


def export_phantom(data_dir, folder):
    "The first study of each synthetic patient as 8-bit pictures, through the same window as the real ones."
    (folder / "slices").mkdir(parents=True, exist_ok=True)
    truth = pd.read_parquet(data_dir / "truth.parquet")
    first = truth.groupby("PatientID")["StudyInstanceUID"].transform("min")
    rows = []
    for row in truth[truth["StudyInstanceUID"] == first].to_dict("records"):
        try:
            hu = read_slice(data_dir / "stage_1_train_images" / f"{row['SOPInstanceUID']}.dcm")[0]
        except DicomError:
            continue
        cv2.imwrite(str(folder / "slices" / f"{row['SOPInstanceUID']}.png"), to_picture(hu, BURNED))
        named = {"slice": row["SOPInstanceUID"], "patient": row["PatientID"], "number": row["index"]}
        rows.append(named | {label: row[label] for label in LABELS})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


def prepare(options):
    "Run folders of the phantom and of the real set."
    work = options.work
    if not (work / "phantom" / "cohort.parquet").is_file():
        data_dir = make_phantom(work / "dicom", N_PATIENTS, 11, slices_per_series=(10, 14), workers=1)
        export_phantom(data_dir, work / "pictures")
        import_pictures(work / "pictures", work / "phantom", PictureSet(BURNED), n_folds=20)
    if not (work / "real" / "cache").is_dir():
        import_pictures(options.real / "phe_sich", work / "real", PICTURE_SETS["phe_sich"])
    make_cohort(work / "real", n_folds=options.folds)


def relative_height(cohort):
    "0 at the lowest slice of a series, 1 at its highest."
    position = cohort.groupby("SeriesInstanceUID")["position"]
    return cohort["position"] / position.transform("max").clip(lower=1)


def balance(cohort, seed):
    "Rows to train on: all positives, as many negatives at the same heights, as many from anywhere."
    rng, rows = np.random.default_rng(seed), cohort[cohort["clean"]]
    bins = np.minimum((relative_height(rows) * 10).astype(int), 9)
    positive, negative = rows["any"] == 1, rows["any"] == 0
    near = [
        rng.choice(rows.index[negative & (bins == k)], n)
        for k, n in bins[positive].value_counts().items()
        if (negative & (bins == k)).any()
    ]
    far = rng.choice(rows.index[negative], positive.sum())
    return rows.loc[np.concatenate([rows.index[positive], *near, far])]


def train(run_dir, fold, settings, labels, start=None):
    "A network trained on all folds but one; `labels`: what it learns from."
    cohort = read_stage(run_dir, "cohort.parquet")
    rows = balance(cohort[cohort["fold"] != fold], settings.seed).assign(in_sample=True)
    both = pd.concat([rows, cohort[cohort["fold"] == fold]], ignore_index=True)
    dls = slice_loaders(both, run_dir / "cache", fold, settings, augment=AUGMENT)
    torch.manual_seed(settings.seed)
    network = build_model(settings.arch, settings.n_in, "" if start else settings.pretrained_from)
    if start:
        network.load_state_dict(start)
    weights = pd.Series([float(label in labels) * len(LABELS) / len(labels) for label in LABELS])
    learner = make_learner(dls, network, make_loss(weights), [FollowEpochs(), StopOnNonFinite()])
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(settings.epochs, settings.lr)
    return learner.model.eval()


@torch.no_grad()
def score(network, rows, cache_dir, settings):
    "Logits of `any` of these slices."
    batches = SliceBatches(rows, cache_dir, replace(settings, batch_size=64), train=False)
    return torch.cat([network(x)[:, ANY] for x, _ in batches]).numpy()


def same_height_auc(y, s, height):
    "AUC over the pairs of a positive and a negative slice in the same tenth of the series."
    bins, won, pairs = np.minimum((height * 10).astype(int), 9), 0.0, 0
    for k in range(10):
        a, b = s[(bins == k) & (y == 1)], s[(bins == k) & (y == 0)]
        if len(a) and len(b):
            won, pairs = (
                won + roc_auc_score(np.r_[np.ones(len(a)), np.zeros(len(b))], np.r_[a, b]) * len(a) * len(b),
                pairs + len(a) * len(b),
            )
    return won / pairs


def run_cell(arm, seed, fold, options):
    "Train, score the held-out real patients, write both."
    work, name = options.work, f"{arm.replace(', then ', '-')}-{seed}" + ("" if fold is None else f"-{fold}")
    table, weights = work / "cells" / f"{name}.parquet", work / "cells" / f"{name}.safetensors"
    if table.is_file():
        return
    settings = Settings(
        arch=options.arch,
        pretrained_from=options.start,
        image_size=options.size,
        windows=WINDOWS,
        neighbors=0,
        epochs=1,
        epoch_size=ARMS[arm],
        lr=options.lr,
        seed=seed,
        balance="undersample",
    )
    start, clock = time.perf_counter(), time.process_time()
    if arm == "phantom":
        network = train(work / "phantom", 0, settings, LABELS)
    else:
        begin = load_file(work / "cells" / f"phantom-{seed}.safetensors") if arm != "real" else None
        network = train(
            work / "real", fold, replace(settings, lr=options.lr / 2) if begin else settings, ("any",), begin
        )
    rows = read_stage(work / "real", "cohort.parquet").assign(height=relative_height)
    rows = rows if fold is None else rows[rows["fold"] == fold]
    rows = rows.assign(bare=score(network, rows, work / "real" / "cache", settings))
    facts = {
        "arm": arm,
        "seed": seed,
        "fold": fold,
        "images": ARMS[arm],
        "n": len(rows),
        "seconds": round(time.perf_counter() - start),
    }
    facts |= {
        "cpu_seconds": round(time.process_time() - clock),
        "auc": round(roc_auc_score(rows["any"], rows["bare"]), 4),
    }
    facts |= {"same_height": round(same_height_auc(*(rows[c].to_numpy() for c in ("any", "bare", "height"))), 4)}
    write_file(weights, lambda p: save_file({k: v.contiguous() for k, v in network.state_dict().items()}, p))
    write_file(table, lambda p: rows[["SOPInstanceUID", "PatientID", "any", "fold", "height", "bare"]].to_parquet(p))
    with (work / "results.jsonl").open("a") as f:
        print(json.dumps(facts), file=f, flush=True)
    print(json.dumps(facts), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/blood"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=2, help="of the real patients")
    parser.add_argument("--arch", default="tf_efficientnet_lite0")
    parser.add_argument("--start", default="lite0", help="pretrained_from of the first training")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    prepare(options)
    for seed in range(options.seeds):
        run_cell("phantom", seed, None, options)
    for seed in range(options.seeds):
        for fold in range(options.folds):
            run_cell("phantom, then real", seed, fold, options)
            run_cell("real", seed, fold, options)


if __name__ == "__main__":
    main()
