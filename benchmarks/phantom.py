"""How fast the phantom is made, what solves it, how near it is to real slices, and what a network makes of those.

What solves it: the header alone, simple rules, a small network. That network has seen only the phantom.

Usage: python benchmarks/phantom.py [--patients 160] [--epochs 24] [--real FOLDER]
FOLDER holds rsna/; the environment's ICH_REAL_DATA by default. Scores on the phantom are out of fold, split by patient;
intervals are 95%, bootstrap by patient. Real slices are scored by the mean of the folds' networks.
"""

import argparse
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
from scipy.stats import ks_2samp
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ich_fastai.dicom import read_slice
from ich_fastai.labels import LABELS, read_labels
from ich_fastai.phantom import make_phantom

BINS = np.arange(-20, 102, 2)  # HU


def read_hu(path):
    "HU (H, W) int16 of a readable slice, what lies outside of the usual range cut off."
    return np.clip(read_slice(path)[0], -1024, 3071)


def noise_of(hu):
    "Noise, HU: the median local standard deviation (7 x 7) inside tissue of 0 to 80 HU; nan where that is little."
    x = np.clip(hu, -100, 200).astype(np.float32)
    inside = cv2.erode(((x > 0) & (x < 80)).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    variance = cv2.blur(x * x, (7, 7)) - cv2.blur(x, (7, 7)) ** 2
    return float(np.sqrt(np.median(variance[inside]))) if inside.sum() > 2000 else np.nan


def looks_of(ds, hu):
    "What real and synthetic slices are compared by: position, mm; brain fraction, share of 0 to 80 HU; noise, HU."
    return dict(
        series=ds.SeriesInstanceUID,
        z_mm=float(ds.ImagePositionPatient[2]),
        brain=float(((hu > 0) & (hu < 80)).mean()),
        noise=noise_of(hu),
    )


def read_all(data):
    "Small images (n, 96, 96) HU, histograms (n, bins), header table, looks and truth of the readable slices."
    truth = pd.read_parquet(data / "truth.parquet")
    truth = truth[~truth.traps.str.contains("truncated")].reset_index(drop=True)
    small, histograms, headers, looks = [], [], [], []
    for row in truth.itertuples():
        path = data / "stage_1_train_images" / f"{row.SOPInstanceUID}.dcm"
        ds = pydicom.dcmread(path)
        hu = read_hu(path)
        small.append(cv2.resize(hu, (96, 96), interpolation=cv2.INTER_AREA))
        histograms.append(np.histogram(hu, BINS)[0] * float(ds.PixelSpacing[0]) ** 2)
        headers.append(
            header(ds, path.stat().st_size) | dict(order=row.Index, padded=int(ds.pixel_array.min() == -2000))
        )
        looks.append(looks_of(ds, hu))
    return np.stack(small), np.array(histograms, np.float32), pd.DataFrame(headers), pd.DataFrame(looks), truth


def read_real(folder):
    "Small images, looks and labels of the real slices; their pixels stay in memory."
    labels, small, looks = read_labels(folder / "stage_1_train.csv.gz"), [], []
    for path in sorted((folder / "stage_1_train_images").glob("*.dcm")):
        ds = pydicom.dcmread(path)
        hu = read_hu(path)
        small.append(cv2.resize(hu, (96, 96), interpolation=cv2.INTER_AREA))
        looks.append(looks_of(ds, hu) | labels.loc[path.stem].to_dict())
    return np.stack(small), pd.DataFrame(looks)


def header(ds, size):
    "What a file's tags, size and name tell, positions aside (where in the head a slice lies is honest information)."
    return dict(
        size=size,
        bits=ds.BitsStored,
        signed=ds.PixelRepresentation,
        spacing=float(ds.PixelSpacing[0]),
        tilt=float(ds.ImageOrientationPatient[5]),
        x=float(ds.ImagePositionPatient[0]),
        y=float(ds.ImagePositionPatient[1]),
        intercept=float(ds.RescaleIntercept),
        rows=ds.Rows,
        implicit=ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2",
        name=int(str(ds.SOPInstanceUID)[3:], 16) % 4096,
    )


def resamples(y, patients, n_boot=500):
    "Row numbers of bootstrap samples, drawn by patient, that hold both classes."
    rng, rows = np.random.default_rng(0), pd.Series(np.arange(len(y))).groupby(np.asarray(patients)).apply(np.array)
    drawn = (np.concatenate(rows.iloc[rng.integers(0, len(rows), len(rows))].tolist()) for _ in range(n_boot))
    return [k for k in drawn if 0 < y[k].mean() < 1]


def show_aucs(scores, y, patients):
    "Print each score's AUC, and how far the last one is above the others on the same resamples."
    drawn = {
        name: np.array([roc_auc_score(y[k], score[k]) for k in resamples(y, patients)])
        for name, score in scores.items()
    }
    best = list(scores)[-1]
    print(f"n {len(y)}, {y.sum()} positive, {len(set(patients))} patients")
    for name, score in scores.items():
        auc, (low, high) = roc_auc_score(y, score), np.quantile(drawn[name], (0.025, 0.975))
        print(f"{name:40s} AUC any {auc:.3f} [{low:.3f}, {high:.3f}]")
        if name != best:
            gap = roc_auc_score(y, scores[best]) - auc
            low, high = np.quantile(drawn[best] - drawn[name], (0.025, 0.975))
            print(f"{'':40s} the network is above it by {gap:.3f} [{low:.3f}, {high:.3f}]")


class Network(torch.nn.Module):
    "Four convolutions, then the mean and the maximum of each feature: one channel in, six logits out."

    def __init__(self):
        super().__init__()
        layers, n = [], 1
        for m in (16, 32, 64, 128):
            layers += [
                torch.nn.Conv2d(n, m, 3, stride=2 if n == 1 else 1, padding=1, bias=False),
                torch.nn.BatchNorm2d(m),
                torch.nn.ReLU(),
            ]
            layers += [torch.nn.MaxPool2d(2)] if n > 1 else []
            n = m
        self.body, self.head = torch.nn.Sequential(*layers), torch.nn.Linear(2 * n, 6)

    def forward(self, x):
        f = self.body(x)
        return self.head(torch.cat([f.amax((2, 3)), f.mean((2, 3))], 1))


def as_input(x):
    "Small images in HU to the network's input (n, 1, 96, 96)."
    return torch.from_numpy(np.clip(x.astype(np.float32) / 80, 0, 1.25))[:, None] - 0.4


def train_network(x, y, epochs):
    "A trained network; mirrored and shifted images."
    torch.manual_seed(0)
    net, steps, rng = Network().to(memory_format=torch.channels_last), epochs * (len(x) // 32), np.random.default_rng(0)
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
    for step in range(steps):
        k = torch.from_numpy(rng.choice(len(x), 32))
        batch = torch.roll(x[k].flip(3) if step % 2 else x[k], tuple(rng.integers(-6, 7, 2).tolist()), (2, 3))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(batch), y[k])
        opt.zero_grad()
        loss.backward()
        opt.step()
        plan.step()
    return net.eval()


def network_scores(x, y, folds, epochs, real):
    "Out-of-fold logits (n, 6) of the phantom's slices, and the folds' mean logits of the real ones."
    x, y, real = as_input(x), torch.from_numpy(y.astype(np.float32)), as_input(real)
    out, out_real = np.zeros((len(x), len(LABELS))), np.zeros((len(real), len(LABELS)))
    for train, valid in folds:
        net = train_network(x[train], y[train], epochs)
        with torch.no_grad():
            out[valid] = net(x[valid]).numpy()
            out_real += net(real).numpy() / len(folds) if len(real) else 0
    return out, out_real


def total_variation(a, b):
    "Total variation distance between the histograms of two sets of images, 0 to 80 HU in steps of 2."
    a, b = (np.histogram(v, np.arange(0, 82, 2))[0] for v in (a, b))
    return 0.5 * np.abs(a / a.sum() - b / b.sum()).sum()


def below_top(looks):
    "Each slice's distance (mm) below the highest slice with brain (fraction above .02) of its series."
    top = looks[looks.brain > 0.02].groupby("series").z_mm.max()
    return looks.series.map(top) - looks.z_mm


def compare_looks(x, looks, x_real, real):
    "Print the distances between the phantom and the real slices: HU, brain fraction by position, noise."
    distance = total_variation(x, x_real)
    print(f"\nHU histogram 0 to 80 HU at 96 px: total variation distance to {len(real)} real slices {distance:.3f}")
    one = real[real.groupby("series")["series"].transform("size") > 1]
    bins = np.arange(-10, 151, 20)
    ours, theirs = (t.groupby(pd.cut(below_top(t), bins), observed=False).brain for t in (looks, one))
    table = dict(phantom=ours.mean(), low=ours.quantile(0.1), high=ours.quantile(0.9), real=theirs.mean())
    table = pd.DataFrame(table).dropna()
    print(
        f"brain fraction by mm below the highest brain slice, beside {one.series.nunique()} real series: mean absolute"
    )
    print(
        f"difference {(table.phantom - table.real).abs().mean():.3f}; low and high: the phantom's quantiles .1 and .9"
    )
    print(table.round(3).to_string())
    a, b = looks.noise.dropna(), real.noise.dropna()
    print("noise, HU, median [10th, 90th percentile]")
    for name, v in (("phantom", a), ("real", b)):
        print(f"  {name} {v.median():.2f} [{v.quantile(0.1):.2f}, {v.quantile(0.9):.2f}] (n {len(v)})")
    print(f"  Kolmogorov-Smirnov distance {ks_2samp(a, b).statistic:.3f}")


def show_transfer(scores, real):
    "Print the AUCs of the real slices and draw the scores along the real series."
    print("\nA network that has seen only the phantom, on real slices (one patient has all positives: no interval)")
    size = real.groupby("series")["series"].transform("size")
    for label in LABELS:
        y = real[label].to_numpy()
        if 0 < y.sum() < len(y):
            k = LABELS.index(label)
            series = (size == size.max()).to_numpy()
            print(
                f"  {label:16s} AUC {roc_auc_score(y, scores[:, k]):.3f}  n {len(y)}, {y.sum()} positive;"
                f"  within the series {roc_auc_score(y[series], scores[series, k]):.3f}  n {series.sum()}"
            )
    p = 1 / (1 + np.exp(-scores[:, LABELS.index("any")]))
    drawn = real.assign(p=p)[size == size.max()].sort_values("z_mm")
    print("  along the series, from the skull base up: p(any), and the labels")
    for row in drawn.itertuples():
        names = ", ".join(s for s in LABELS[:-1] if getattr(row, s))
        print(f"  {row.z_mm:7.1f} mm {row.p:.2f} {'#' * round(row.p * 40):40s} {names}")
    single = p[(size == 1).to_numpy()]
    print(f"  the {len(single)} single slices, all without bleeding: p(any)", *(f"{v:.2f}" for v in np.sort(single)))


def make_and_read(n_patients):
    "What `read_all` gives of a new phantom; prints how fast it was made."
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        data = make_phantom(Path(tmp) / "phantom", n_patients)
        seconds, cores = time.perf_counter() - start, len(os.sched_getaffinity(0))
        read = read_all(data)
    used, truth = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), read[-1]
    print(f"{len(truth)} slices, {n_patients} patients, any {truth['any'].mean():.3f}")
    print(f"made in {seconds:.1f} s, {len(truth) / seconds / cores:.1f} slices/s/core on {cores} cores")
    print(f"{len(truth) / used:.1f} slices a second of processor time")
    return read


def score_without_pictures(headers, histograms, y, folds):
    "Name: the score of each slice, by what a network should not need."
    tree = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    by_histogram = cross_val_predict(linear, np.sqrt(histograms), y, cv=folds, method="decision_function")
    return {
        "header, gradient-boosted tree": cross_val_predict(tree, headers, y, cv=folds, method="predict_proba")[:, 1],
        "pixels of 50 to 90 HU, count": histograms[:, (BINS[:-1] >= 50) & (BINS[:-1] < 90)].sum(1),
        "histogram, logistic regression": by_histogram,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--real", default=os.environ.get("ICH_REAL_DATA", ""))
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    x, histograms, headers, looks, truth = make_and_read(args.patients)
    y, patients = truth["any"].to_numpy(), truth.PatientID.to_numpy()
    folds = list(GroupKFold(4).split(x, y, patients))
    scores = score_without_pictures(headers, histograms, y, folds)
    start = time.perf_counter()
    x_real, real = read_real(Path(args.real) / "rsna") if args.real else (np.zeros((0, 96, 96)), None)
    out, out_real = network_scores(x, truth[list(LABELS)].to_numpy(), folds, args.epochs, x_real)
    scores[f"small network, 96 px, {args.epochs} epochs"] = out[:, LABELS.index("any")]
    show_aucs(scores, y, patients)
    print(f"network: {time.perf_counter() - start:.0f} s for {len(folds)} folds")
    if args.real:
        compare_looks(x, looks, x_real, real)
        show_transfer(out_real, real)


if __name__ == "__main__":
    main()
