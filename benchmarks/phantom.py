"""How fast the phantom is made, and what solves it: the header alone, simple rules, a small network. Also its distance from real slices where given.

Usage: python benchmarks/phantom.py [--patients 80] [--epochs 16] [--real FOLDER with rsna/stage_1_train_images, or env ICH_REAL_DATA]
All scores are out of fold, split by patient; intervals are 95%, bootstrap by patient.
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ich_fastai.phantom import make_phantom

BINS = np.arange(-20, 102, 2)  # HU


def hu_of(ds, trap=""):
    "HU (H, W) int16 of a readable slice; the wrapped intercept repaired."
    hu = ds.pixel_array.astype(np.int32) * int(float(ds.RescaleSlope)) + int(float(ds.RescaleIntercept))
    return ((hu + 1000) % 4096 - 1000 if "wrapped" in trap else np.clip(hu, -1024, 3071)).astype(np.int16)


def read_all(data):
    "Small images (n, 96, 96) HU, histograms (n, bins), header table and truth of the readable slices."
    truth = pd.read_parquet(data / "truth.parquet")
    truth = truth[~truth.traps.str.contains("truncated")].reset_index(drop=True)
    small, histograms, headers = [], [], []
    for row in truth.itertuples():
        path = data / "stage_1_train_images" / f"{row.SOPInstanceUID}.dcm"
        ds = pydicom.dcmread(path)
        hu = hu_of(ds, row.traps)
        small.append(cv2.resize(hu, (96, 96), interpolation=cv2.INTER_AREA))
        histograms.append(np.histogram(hu, BINS)[0] * float(ds.PixelSpacing[0]) ** 2)
        headers.append(header(ds, path.stat().st_size))
    return np.stack(small), np.array(histograms, np.float32), pd.DataFrame(headers), truth


def header(ds, size):
    "What a file tells without its pixels, positions aside (where in the head a slice lies is honest information)."
    return dict(
        size=size, bits=ds.BitsStored, signed=ds.PixelRepresentation, spacing=float(ds.PixelSpacing[0]), tilt=float(ds.ImageOrientationPatient[5]),
        x=float(ds.ImagePositionPatient[0]), y=float(ds.ImagePositionPatient[1]), intercept=float(ds.RescaleIntercept), rows=ds.Rows,
        implicit=ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2", name=int(str(ds.SOPInstanceUID)[3:], 16) % 4096,
    )


def auc(y, score, patients, n_boot=500):
    "AUC with its interval."
    rng, rows = np.random.default_rng(0), pd.Series(np.arange(len(y))).groupby(np.asarray(patients)).apply(np.array)
    drawn = []
    for _ in range(n_boot):
        k = np.concatenate(rows.iloc[rng.integers(0, len(rows), len(rows))].tolist())
        if 0 < y[k].mean() < 1:
            drawn.append(roc_auc_score(y[k], score[k]))
    return roc_auc_score(y, score), *np.quantile(drawn, (0.025, 0.975))


class Network(torch.nn.Module):
    "Four convolutions, then the mean and the maximum of each feature: one channel in, six logits out."

    def __init__(self):
        super().__init__()
        layers, n = [], 1
        for m in (16, 32, 64, 128):
            layers += [torch.nn.Conv2d(n, m, 3, padding=1, bias=False), torch.nn.BatchNorm2d(m), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
            n = m
        self.body, self.head = torch.nn.Sequential(*layers), torch.nn.Linear(2 * n, 6)

    def forward(self, x):
        f = self.body(x)
        return self.head(torch.cat([f.amax((2, 3)), f.mean((2, 3))], 1))


def network_scores(x, y, folds, epochs):
    "Out-of-fold logits of `any`."
    x = torch.from_numpy(np.clip(x.astype(np.float32) / 80, 0, 1.25))[:, None] - 0.4
    y, out = torch.from_numpy(y.astype(np.float32)), np.zeros(len(x))
    for train, valid in folds:
        torch.manual_seed(0)
        net, steps, rng = Network(), epochs * (len(train) // 32), np.random.default_rng(0)
        opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
        for step in range(steps):
            k = torch.from_numpy(rng.choice(train, 32))
            batch = torch.roll(x[k].flip(3) if step % 2 else x[k], tuple(rng.integers(-6, 7, 2).tolist()), (2, 3))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(batch), y[k])
            opt.zero_grad()
            loss.backward()
            opt.step()
            plan.step()
        net.eval()
        with torch.no_grad():
            out[valid] = net(x[valid])[:, 5].numpy()
    return out


def distance_to_real(x, folder):
    "Total variation distance between the HU histograms inside the head, 0 to 80 HU, phantom beside real; counts."
    real = []
    for path in sorted((folder / "rsna" / "stage_1_train_images").glob("*.dcm")):
        real.append(cv2.resize(hu_of(pydicom.dcmread(path)), (96, 96), interpolation=cv2.INTER_AREA))
    bins = np.arange(0, 82, 2)
    a, b = (np.histogram(v, bins)[0] / np.histogram(v, bins)[0].sum() for v in (x, np.stack(real)))
    return 0.5 * np.abs(a - b).sum(), len(real)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--real", default=os.environ.get("ICH_REAL_DATA", ""))
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        data = make_phantom(Path(tmp) / "phantom", args.patients)
        seconds = time.perf_counter() - start
        x, histograms, headers, truth = read_all(data)
        cores = len(os.sched_getaffinity(0))
        print(f"{len(truth)} slices, {args.patients} patients, any {truth['any'].mean():.3f}")
        print(f"made in {seconds:.1f} s, {len(truth) / seconds / cores:.1f} slices/s/core on {cores} cores")
    y, patients = truth["any"].to_numpy(), truth.PatientID.to_numpy()
    folds = list(GroupKFold(4).split(x, y, patients))
    blood = histograms[:, (BINS[:-1] >= 50) & (BINS[:-1] < 90)].sum(1)
    tree = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    scores = {
        "header, gradient-boosted tree": cross_val_predict(tree, headers, y, cv=folds, method="predict_proba")[:, 1],
        "pixels of 50 to 90 HU, count": blood,
        "histogram, logistic regression": cross_val_predict(linear, np.sqrt(histograms), y, cv=folds, method="decision_function"),
    }
    start = time.perf_counter()
    labels = truth[["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]].to_numpy()
    scores[f"small network, 96 px, {args.epochs} epochs"] = network_scores(x, labels, folds, args.epochs)
    for name, score in scores.items():
        value, low, high = auc(y, score, patients)
        print(f"{name:40s} AUC any {value:.3f} [{low:.3f}, {high:.3f}]  n {len(y)}, {y.sum()} positive, {len(set(patients))} patients")
    print(f"network: {time.perf_counter() - start:.0f} s for {len(folds)} folds")
    if args.real:
        tv, n = distance_to_real(x, Path(args.real))
        print(f"HU histogram 0 to 80 HU at 96 px: total variation distance to {n} real slices {tv:.3f}")


if __name__ == "__main__":
    main()
