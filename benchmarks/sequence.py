"""What do the other slices of a series add? None, smoothing, and a small recurrent network, on one phantom.

python benchmarks/sequence.py [--work FOLDER] [--patients 260] [--phantom 23] [--seeds 3] [--units 64] [--smooth 0.33]

Half of the phantom's patients train the slice network, the other half are held out. The recurrent network reads the
slice network's features, or its logits alone; fitted within the held-out patients, each read by one that has not seen
it. The last arm is the mistake: fitted on the patients that the slice network was trained on. Differences are paired,
by patient, means over seeds. Each step writes a file: the same command goes on with what is missing.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from ich_fastai.batches import Settings, SliceBatches
from ich_fastai.calibrate import cross_fit, order_logits
from ich_fastai.cohort import make_cohort
from ich_fastai.core import read_stage, write_file
from ich_fastai.ingest import ingest
from ich_fastai.labels import LABELS, find_dataset, read_labels, tabulate_labels
from ich_fastai.metrics import draw_patients, find_estimate, rank_metrics, say_difference, weighted_log_losses
from ich_fastai.model import load_model
from ich_fastai.phantom import make_phantom
from ich_fastai.recurrent import cross_fit_series, fit_network, keep_features, make_scans, run_network
from ich_fastai.train import fit

warnings.filterwarnings("ignore")

SETTINGS = dict(image_size=96, neighbors=0, epochs=10, epoch_size=1000, balance="none", class_weights="none")
ARMS = ("none", "smoothing", "GRU (features)", "GRU (logits)", "GRU, in-sample features")


def prepare(options):
    "The phantom, its cache and its cohort in two folds; a slice network for each seed."
    work = options.work
    data_dir = make_phantom(work / "phantom", options.patients, options.phantom, slices_per_series=(16, 22), workers=1)
    if not (work / "run" / "cohort.parquet").is_file():
        dataset = find_dataset(data_dir)
        tabulate_labels(read_labels(dataset.labels_csv), work / "run")
        ingest(dataset.dicom_dir, work / "run" / "cache", size=128, workers=1)
        make_cohort(work / "run", n_folds=2)
    for seed in range(options.seeds):
        out = work / f"seed-{seed}"
        if not (out / "model" / "model.json").is_file():
            fit(work / "run", Settings(seed=seed, **SETTINGS), out=out)


@torch.no_grad()
def see(model, rows, cache_dir):
    "Logits and features of slices."
    batches = SliceBatches(rows, cache_dir, model.settings, train=False)
    with keep_features(model.network) as seen:
        logits = torch.cat([model.network(x) for x, _ in batches])
    return logits.double().numpy(), torch.cat(seen).numpy()


def read_series(seed, options):
    "Logits of each arm for the held-out slices, and the part of the patients."
    path = options.work / f"arms-{seed}.npz"
    if path.is_file():
        return dict(np.load(path))
    cohort, cache = read_stage(options.work / "run", "cohort.parquet"), options.work / "run" / "cache"
    model = load_model(options.work / f"seed-{seed}" / "model", "cpu")
    sets = []
    for rows in (cohort[cohort["fold"] == 0], cohort[cohort["fold"] != 0]):
        logits, features = see(model, rows, cache)
        where = rows["SeriesInstanceUID"], rows["z_mm"], options.smooth
        y, patients = rows[list(LABELS)].to_numpy(), rows["PatientID"].to_numpy()
        scans = make_scans(logits, features, *where), make_scans(logits, logits, *where)
        sets.append((logits, *scans, y, patients))
    (logits, by_features, by_logits, y, patients), (_, in_sample, _, y_seen, seen) = sets
    found, start = {"none": logits, "smoothing": by_features.base}, time.process_time()
    for name, scans in (("GRU (features)", by_features), ("GRU (logits)", by_logits)):
        added, part, _, facts = cross_fit_series(scans, y, patients, options.units, seed=seed)
        found[name] = scans.base + added
        print(f"seed {seed}, {name}: {facts}, {time.process_time() - start:.0f} processor s so far", flush=True)
    network, facts = fit_network(in_sample, y_seen, seen, np.ones(len(seen), bool), options.units, seed=seed)
    found[ARMS[-1]] = by_features.base + run_network(network, by_features)
    print(f"seed {seed}, {ARMS[-1]}: {facts}, {time.process_time() - start:.0f} processor s so far", flush=True)
    write_file(path, lambda p: np.savez(p.open("wb"), part=part, **found))
    return found | {"part": part}


def measure(found, rows, n_boot):
    "Draws of AUC by label and of two log losses, for each arm: {(arm, metric): (b,)}."
    y, patients = rows[list(LABELS)].to_numpy(np.int64), rows["PatientID"].to_numpy()
    patient, draws = draw_patients(patients, n_boot)
    values = {}
    for arm in ARMS:
        x, part = found[arm], found["part"] if arm.startswith("GRU (") else np.zeros(len(y), int)
        for k, label in enumerate(LABELS):
            values[arm, label] = rank_metrics(y[:, k], x[:, k], patient, draws)["auc"]
        values[arm, "log loss"] = weighted_log_losses(y, expit(x), patient, draws)
        calibrated = cross_fit(y, order_logits(x), patients, part).calibrated
        values[arm, "log loss, calibrated"] = weighted_log_losses(y, calibrated, patient, draws)
    return values


def report(options):
    "The tables: each arm, and its differences from smoothing."
    cohort = read_stage(options.work / "run", "cohort.parquet")
    rows = cohort[cohort["fold"] == 0]
    seeds = [measure(read_series(seed, options), rows, options.n_boot) for seed in range(options.seeds)]
    count = rows.groupby("PatientID")[list(LABELS)].max().sum()
    print(f"{len(rows):,} slices of {rows['PatientID'].nunique()} patients; patients with: {count.to_dict()}")
    step = rows.sort_values("z_mm").groupby("SeriesInstanceUID")["z_mm"].diff().median()
    print(f"{step:.1f} mm from slice to slice; {(cohort['fold'] != 0).sum():,} slices to train on")
    metrics = ("any", "log loss", "log loss, calibrated")
    print("| arm | " + " | ".join(f"{m}; seeds" for m in metrics) + " |")
    for arm in ARMS:
        cells = []
        for metric in metrics:
            drawn = np.array([values[arm, metric] for values in seeds])
            cells.append(f"{find_estimate(drawn.mean(0))}; {drawn[:, 0].min():.3f} to {drawn[:, 0].max():.3f}")
        print(f"| {arm} | " + " | ".join(cells) + " |")
    for before, after in (("none", "smoothing"), *(("smoothing", arm) for arm in ARMS[2:])):
        print(f"\n{after} minus {before}")
        for metric in (*LABELS, *metrics[1:]):
            gaps = np.array([values[after, metric] - values[before, metric] for values in seeds])
            gap = find_estimate(gaps.mean(0))
            print(f"| {metric} | {gap} | {say_difference(gap)} | {', '.join(f'{g:+.3f}' for g in gaps[:, 0])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--patients", type=int, default=260)
    parser.add_argument("--phantom", type=int, default=23, help="its seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--smooth", type=float, default=0.33)
    parser.add_argument("--n-boot", type=int, default=500)
    options = parser.parse_args()
    prepare(options)
    report(options)


if __name__ == "__main__":
    main()
