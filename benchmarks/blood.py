"""Does a network see the blood, or where in the head a slice lies?

python benchmarks/blood.py --real FOLDER [--work FOLDER] [--seeds 3] [--folds 2] [--report]

FOLDER holds phe_sich/. Three ways to train: on the phantom alone, on real patients alone, on the phantom and then on
real patients. Each network scores real patients that it has not seen, as they are and with what is dense inside the
skull painted over by brain. AUC is of all pairs of a positive and a negative slice that one network scored, and of
those in the same tenth of their series; intervals are 95%, by patient. Each training is a cell: scores and a JSON
line of facts are written at once, and the same command goes on with the cells that are missing. --report trains none.
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

from ich_fastai.batches import Augment, Settings, SliceBatches, slice_loaders
from ich_fastai.cache import SHARD_ROWS, open_cache, save_settings, shard_paths
from ich_fastai.cohort import make_cohort
from ich_fastai.core import read_stage, write_file
from ich_fastai.dicom import DicomError, Window, read_slice
from ich_fastai.external import PICTURE_SETS, PictureSet, frame_heads, import_pictures, to_picture
from ich_fastai.labels import LABELS
from ich_fastai.metrics import Estimate, draw_patients, find_estimate, rank_metrics
from ich_fastai.model import build_model, make_loss
from ich_fastai.phantom import make_phantom
from ich_fastai.train import FollowEpochs, StopOnNonFinite, make_learner

warnings.filterwarnings("ignore")

N_PATIENTS = 400  # of the phantom
BURNED = Window(40, 120)
AUGMENT = Augment(degrees=15, zoom=0.12, shift=0.05, noise_hu=8, width=0.15, center=0.1)
WINDOWS = {"brain": (40, 80), "blood": (55, 50), "wide": (40, 120)}
ANY = LABELS.index("any")
ARMS = {"phantom": 14_000, "real": 5_000, "phantom, then real": 5_000}  # images that a training sees
DENSE = 11  # HU above the slice's brain: blood, and also calcium and veins


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
    "Run folders of the phantom and of the real set, heads of one size; the real one painted over, too."
    work = options.work
    if not (work / "phantom" / "cohort.parquet").is_file():
        data_dir = make_phantom(work / "dicom", N_PATIENTS, 11, slices_per_series=(10, 14), workers=1)
        export_phantom(data_dir, work / "pictures")
        import_pictures(work / "pictures", work / "loose" / "phantom", PictureSet(BURNED), n_folds=20)
        frame_heads(work / "loose" / "phantom", work / "phantom")
        add_cupping(work / "phantom")
    if not (work / "real" / "cohort.parquet").is_file():
        import_pictures(options.real / "phe_sich", work / "loose" / "real", PICTURE_SETS["phe_sich"])
        frame_heads(work / "loose" / "real", work / "real")
    make_cohort(work / "real", n_folds=options.folds)
    if not (work / "painted" / "cache.json").is_file():
        paint_cache(work / "real" / "cache", work / "painted")


def add_cupping(run_dir):
    """Tissue brighter near bone, by 0 to 28 HU a series, in a seam of 6 to 16 mm: what beam hardening leaves.

    Of the real patients four are 11 to 14 HU brighter there, the phantom never: a network trained without it calls each
    slice of theirs subdural.
    """
    cohort, cache, rng = read_stage(run_dir, "cohort.parquet"), open_cache(run_dir / "cache"), np.random.default_rng(0)
    shards = {int(path.stem[6:]): np.load(path) for path in sorted(cache.folder.glob("shard-*.npy"))}
    for _, rows in cohort.groupby("SeriesInstanceUID"):
        height, reach = rng.uniform(0, 28), rng.uniform(8, 20)
        for address in rows["address"].tolist():
            hu = shards[address // SHARD_ROWS][address % SHARD_ROWS]
            far = cv2.distanceTransform((hu < 100).astype(np.uint8), cv2.DIST_L2, 5)
            seam = np.rint(height * np.exp(-far / reach)).astype(np.int16)
            hu += np.where((hu > -20) & (hu < 100), seam, 0).astype(np.int16)
    for number, pixels in shards.items():
        write_file(shard_paths(cache.folder, number)[0], lambda p, x=pixels: np.save(p, x))


def find_inside(hu):
    "Where the brain may be: within the largest outline of bone, its gaps closed as far as needed, away from bone."
    bone = (hu > 100).astype(np.uint8)
    near = cv2.dilate(bone, np.ones((7, 7), np.uint8)) > 0
    tissue = cv2.morphologyEx(((hu > 0) & (hu < 100)).astype(np.uint8), cv2.MORPH_OPEN, np.ones((9, 9), np.uint8)) > 0
    padded = np.pad(bone, 48)
    for gap in (5, 15, 31, 45):
        ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (gap, gap))
        closed = np.ascontiguousarray(cv2.morphologyEx(padded, cv2.MORPH_CLOSE, ellipse)[48:-48, 48:-48])
        outlines = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        inside = np.zeros_like(bone)
        if outlines:
            cv2.drawContours(inside, [max(outlines, key=cv2.contourArea)], -1, 1, -1)
        inside = (inside > 0) & ~near
        if inside.sum() > 0.6 * (tissue & ~near).sum():
            break
    return inside


def find_dense(hu):
    "(where the brain may be, where it is dense over 12 px or more, the brain's median HU)."
    inside = find_inside(hu)
    tissue = inside & (hu > 15) & (hu < 60)
    if tissue.sum() < 200:
        return inside, np.zeros_like(inside), 0.0
    brain = float(np.median(hu[tissue]))
    smooth = cv2.GaussianBlur(np.clip(hu, -20, 100).astype(np.float32), (0, 0), 1.5)
    _, parts, stats, _ = cv2.connectedComponentsWithStats(((smooth > brain + DENSE) & inside).astype(np.uint8))
    return inside, np.isin(parts, np.flatnonzero(stats[:, 4] >= 12)[1:]), brain


def paint_over(hu):
    "The slice, and how many px of it were dense; these and 4 px around are brain of the neighborhood with its noise."
    inside, dense, brain = find_dense(hu)
    if not dense.any():
        return hu, 0
    grown = cv2.dilate(dense.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))) > 0
    hole = grown & (cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0) & (hu > brain - 8)
    x, out, tissue = hu.astype(np.float32), hu.copy(), inside & ~hole & (hu > 15) & (hu < 60)
    weight, total = (cv2.GaussianBlur(v, (0, 0), 12) for v in (tissue.astype(np.float32), x * tissue))
    near = np.where(weight > 0.02, total / np.maximum(weight, 1e-6), brain)
    noise = (x - cv2.GaussianBlur(x, (0, 0), 2))[tissue]
    out[hole] = np.rint(near[hole] + np.random.default_rng(0).choice(noise, hole.sum())).astype(np.int16)
    return out, int(dense.sum())


def paint_cache(cache_dir, out_dir):
    "The same cache with every slice painted over."
    cache = open_cache(cache_dir)
    for path in sorted(cache_dir.glob("shard-*.npy")):
        painted = np.stack([paint_over(hu)[0] for hu in np.load(path)])
        write_file(shard_paths(out_dir, int(path.stem[6:]))[0], lambda p, x=painted: np.save(p, x))
    save_settings(out_dir, cache.size)


def relative_height(cohort):
    "0 at the lowest slice of a series, 1 at its highest."
    position = cohort.groupby("SeriesInstanceUID")["position"]
    return cohort["position"] / position.transform("max").clip(lower=1)


def tenth(height):
    return np.minimum((height * 10).astype(int), 9)


def balance(cohort, seed):
    "Rows to train on: all positives, as many negatives at the same heights, as many from anywhere."
    rng, rows = np.random.default_rng(seed), cohort[cohort["clean"]]
    bins = tenth(relative_height(rows))
    positive, negative = rows["any"] == 1, rows["any"] == 0
    near = [
        rng.choice(rows.index[negative & (bins == k)], n)
        for k, n in bins[positive].value_counts().items()
        if (negative & (bins == k)).any()
    ]
    far = rng.choice(rows.index[negative], positive.sum())
    return rows.loc[np.concatenate([rows.index[positive], *near, far])]


def train(run_dir, fold, settings, labels, start=None):
    "A network trained on all folds but one; `labels`: what it learns from, the others weigh nothing."
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


def stratified_auc(y, s, patient, draws, strata):
    "AUC over the pairs within a stratum, for every draw."
    won, pairs = np.zeros(len(draws)), np.zeros(len(draws))
    for k in np.unique(strata):
        i = np.flatnonzero(strata == k)
        if 0 < y[i].sum() < len(i):
            w = draws[:, patient[i]]
            n = (w * y[i]).sum(1) * (w * (1 - y[i])).sum(1)
            won += np.where(n > 0, rank_metrics(y[i], s[i], patient[i], draws)["auc"], 0) * n
            pairs += n
    return won / pairs


def aucs(rows, s, draws, patient):
    "All pairs, and those at the same height, of slices that the same network scored: (b,) each."
    y, fold = rows["any"].to_numpy().astype(int), rows["fold"].to_numpy()
    return [stratified_auc(y, s, patient, draws, k) for k in (fold, 10 * fold + tenth(rows["height"].to_numpy()))]


def run_cell(arm, seed, fold, options):
    "Train, score the held-out real patients, write both."
    work, name = options.work, f"{arm.replace(', then ', '-')}-{seed}" + ("" if fold is None else f"-{fold}")
    table, weights = work / "cells" / f"{name}.parquet", work / "cells" / f"{name}.safetensors"
    if table.is_file():
        return
    sizes = dict(image_size=options.size, epochs=1, epoch_size=ARMS[arm], neighbors=0)
    start_from = dict(arch=options.arch, pretrained_from=options.start, lr=options.lr)
    settings = Settings(**sizes, **start_from, windows=WINDOWS, seed=seed, balance="undersample")
    start, clock = time.perf_counter(), time.process_time()
    if arm == "phantom":
        network = train(work / "phantom", 0, settings, LABELS)
    else:
        begin = load_file(work / "cells" / f"phantom-{seed}.safetensors") if arm != "real" else None
        settings = replace(settings, lr=options.lr / 2) if begin else settings
        network = train(work / "real", fold, settings, ("any",), begin)
    rows = read_stage(work / "real", "cohort.parquet").assign(height=relative_height)
    rows = rows.assign(fold=0) if fold is None else rows[rows["fold"] == fold]
    rows = rows.assign(
        bare=score(network, rows, work / "real" / "cache", settings),
        painted=score(network, rows, work / "painted", settings),
    )
    patient, draws = draw_patients(rows["PatientID"].to_numpy(), 0)
    facts = {"arm": arm, "seed": seed, "fold": fold, "images": ARMS[arm], "lr": settings.lr, "size": options.size}
    facts |= {"n": len(rows), "seconds": round(time.perf_counter() - start)}
    facts |= {"cpu_seconds": round(time.process_time() - clock)}
    for column in ("bare", "painted"):
        facts[column] = [round(float(a[0]), 4) for a in aucs(rows, rows[column].to_numpy(), draws, patient)]
    write_file(weights, lambda p: save_file({k: v.contiguous() for k, v in network.state_dict().items()}, p))
    kept = ["SOPInstanceUID", "PatientID", "any", "fold", "height", "bare", "painted"]
    write_file(table, lambda p: rows[kept].to_parquet(p))
    with (work / "results.jsonl").open("a") as f:
        print(json.dumps(facts), file=f)
    print(json.dumps(facts), flush=True)


def rule_rows(work):
    "What needs no network: distance from the middle of the series, area of what is dense inside the skull."
    rows = read_stage(work / "real", "cohort.parquet").assign(height=relative_height, fold=0)
    addresses, scores = rows["address"].to_numpy(), {"distance from the middle": {}, "area of what is dense": {}}
    for column, cache_dir in (("bare", work / "real" / "cache"), ("painted", work / "painted")):
        cache = open_cache(cache_dir)
        scores["distance from the middle"][column] = -np.abs(rows["height"] - 0.5)
        scores["area of what is dense"][column] = [find_dense(cache.gather(a))[1].sum() for a in addresses]
    return {name: [rows.assign(**columns)] for name, columns in scores.items()}


def report(options):
    "The table: the mean over seeds with its interval, and the least and the largest seed."
    found = rule_rows(options.work)
    for arm in ARMS:
        name, seeds = arm.replace(", then ", "-"), []
        for seed in range(options.seeds):
            paths = [options.work / "cells" / f"{name}-{seed}.parquet"]
            if arm != "phantom":
                paths = [options.work / "cells" / f"{name}-{seed}-{fold}.parquet" for fold in range(options.folds)]
            if all(path.is_file() for path in paths):
                seeds.append(pd.concat(map(pd.read_parquet, paths)).sort_values("SOPInstanceUID", ignore_index=True))
        found |= {arm: seeds} if seeds else {}
    draws_of = {}
    for arm, seeds in found.items():
        cells = [f"{arm} ({len(seeds)})"]
        for column in ("bare", "painted"):
            drawn = []
            for rows in seeds:
                rows = rows.sort_values("SOPInstanceUID", ignore_index=True)
                patient, draws = draw_patients(rows["PatientID"].to_numpy(), options.n_boot)
                drawn.append(aucs(rows, rows[column].to_numpy(np.float64), draws, patient))
            for k, values in enumerate(np.array(drawn).swapaxes(0, 1)):  # (seeds, b) each
                draws_of[arm, column, k] = values.mean(0)
                spread = f"; {values[:, 0].min():.3f} to {values[:, 0].max():.3f}" if len(values) > 1 else ""
                cells.append(f"{find_estimate(values.mean(0))}{spread}")
        print("| " + " | ".join(cells) + " |")
    last = "phantom, then real"
    for arm in ("phantom", "real"):
        if (arm, "bare", 1) in draws_of and (last, "bare", 1) in draws_of:
            gap: Estimate = find_estimate(draws_of[last, "bare", 1] - draws_of[arm, "bare", 1])
            print(f"at the same height, {last} minus {arm}: {gap}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/blood"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=2, help="of the real patients")
    parser.add_argument("--arch", default="tf_efficientnet_lite0")
    parser.add_argument("--start", default="lite0", help="pretrained_from of the first training")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--n-boot", type=int, default=500)
    parser.add_argument("--report", action="store_true", help="only the table of the cells that are there")
    options = parser.parse_args()
    prepare(options)
    for seed in range(0 if options.report else options.seeds):
        run_cell("phantom", seed, None, options)
    for seed in range(0 if options.report else options.seeds):
        for fold in range(options.folds):
            run_cell("phantom, then real", seed, fold, options)
            run_cell("real", seed, fold, options)
    report(options)


if __name__ == "__main__":
    main()
