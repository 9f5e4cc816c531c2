"""Does a network see the blood, or where in the head a slice lies?

python benchmarks/blood.py --real FOLDER [--work FOLDER] [--seeds 3] [--folds 2] [--report]

FOLDER holds phe_sich/. Three ways to train: on the phantom alone, on real patients alone, on the phantom and then on
real patients; the last also with twins: each positive slice once more, painted over and called negative. Each network
scores real patients that it has not seen, as they are and with what is dense inside the
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

from ich_fastai.adopt import adopt, frame_heads
from ich_fastai.batches import Augment, Settings, SliceBatches, slice_loaders
from ich_fastai.cache import SHARD_ROWS, Cache, save_settings, shard_paths
from ich_fastai.cohort import make_cohort
from ich_fastai.core import Window, read_stage, write_file
from ich_fastai.controls import FAINT, auc_at_same_position, find_blobs, paint_over, relative_height
from ich_fastai.datasets import find_facts, open_pictures
from ich_fastai.dicom import DicomError, read_slice
from ich_fastai.external import PICTURE_SETS, PictureSet, to_picture
from ich_fastai.labels import LABELS
from ich_fastai.metrics import Estimate, draw_patients, find_estimate
from ich_fastai.network import build_model, start_at
from ich_fastai.model import make_loss
from ich_fastai.phantom import make_phantom
from ich_fastai.learner import FollowEpochs, StopOnNonFinite, make_learner

warnings.filterwarnings("ignore")

N_PATIENTS = 400  # of the phantom
BURNED = Window(40, 120)
AUGMENT = Augment(degrees=15, zoom=0.12, shift=0.05, noise_hu=8, width=0.15, center=0.1)
WINDOWS = {"brain": (40, 80), "blood": (55, 50), "wide": (40, 120)}
ANY = LABELS.index("any")
BOTH, TWINS = "phantom, then real", "phantom, then real and twins"
ARMS = {"phantom": 14_000, "real": 5_000, BOTH: 5_000, TWINS: 5_000}  # images that a training sees
AWAY = 100  # shards of painted slices are numbered from here in the cache that holds both


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


def import_pictures(folder, run_dir, about, n_folds=5):
    "A set of pictures as a run folder."
    adopt(open_pictures(about, folder, None, find_facts("phe_sich")), run_dir)
    make_cohort(run_dir, n_folds=n_folds)


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
        paint_run(work / "real", work / "painted", work / "twins")


def add_cupping(run_dir):
    """Tissue brighter near bone, by 0 to 28 HU a series, in a seam of 6 to 16 mm: what beam hardening leaves.

    Of the real patients four are 11 to 14 HU brighter there, the phantom never: a network trained without it calls each
    slice of theirs subdural.
    """
    cohort, cache, rng = read_stage(run_dir, "cohort.parquet"), Cache(run_dir / "cache"), np.random.default_rng(0)
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


def paint_run(run_dir, out_dir, twins_dir):
    "The run's cache with all slices painted over, once for all networks; and one that holds both."
    cache = Cache(run_dir / "cache")
    for path in sorted(cache.folder.glob("shard-*.npy")):
        number, n = int(path.stem[6:]), len(np.load(path, mmap_mode="r"))
        hu = cache.gather(number * SHARD_ROWS + np.arange(n))
        painted = paint_over(hu, find_blobs(hu, **FAINT))
        write_file(shard_paths(out_dir, number)[0], lambda p, x=painted: np.save(p, x))
        for n, source in ((number, path), (number + AWAY, shard_paths(out_dir, number)[0])):
            shard_paths(twins_dir, n)[0].parent.mkdir(parents=True, exist_ok=True)
            shard_paths(twins_dir, n)[0].symlink_to(source.resolve())
    save_settings(out_dir, cache.size)
    save_settings(twins_dir, cache.size)


def balance(cohort, seed):
    "Rows to train on: all positives, as many negatives at the same heights, as many from anywhere."
    rng, rows = np.random.default_rng(seed), cohort[cohort["clean"]]
    bins = pd.Series(relative_height(cohort) * 10, cohort.index).loc[rows.index].astype(int)
    positive, negative = rows["any"] == 1, rows["any"] == 0
    near = [
        rng.choice(rows.index[negative & (bins == k)], n)
        for k, n in bins[positive].value_counts().items()
        if (negative & (bins == k)).any()
    ]
    far = rng.choice(rows.index[negative], positive.sum())
    return rows.loc[np.concatenate([rows.index[positive], *near, far])]


def add_twins(rows):
    "The rows, and each positive once more: painted over, and negative."
    twins = rows[rows["any"] == 1].drop_duplicates("SOPInstanceUID")
    return pd.concat([rows, twins.assign(any=0, address=twins["address"] + AWAY * SHARD_ROWS)])


def train(run_dir, fold, settings, labels, start=None, twins_dir=None):
    "A network trained on all folds but one; `labels`: what it learns from, the others weigh nothing."
    cohort = read_stage(run_dir, "cohort.parquet")
    rows = balance(cohort[cohort["fold"] != fold], settings.seed).assign(in_sample=True)
    rows = add_twins(rows) if twins_dir else rows
    both = pd.concat([rows, cohort[cohort["fold"] == fold]], ignore_index=True)
    dls = slice_loaders(both, twins_dir or run_dir / "cache", fold, settings, augment=AUGMENT)
    torch.manual_seed(settings.seed)
    network = build_model(settings.arch, settings.n_in, "" if start else settings.pretrained_from)
    network.load_state_dict(start) if start else start_at(network, rows[list(LABELS)].mean())
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


def aucs(rows, column, n_boot):
    "AUC of all pairs, and of those at the same height, among slices that the same network scored: (b,) each."
    fold = rows["fold"].to_numpy()
    n_folds, (patient, draws) = fold.max() + 1, draw_patients(rows["PatientID"].to_numpy(), n_boot)
    y, s = rows["any"].to_numpy(), rows[column].to_numpy(np.float64)
    place = (fold + rows["height"].to_numpy()) / n_folds
    return [auc_at_same_position(y, s, place, patient, draws, n_folds * k) for k in (1, 10)]


def held_out(work, fold):
    "The real slices of a fold, of all where it is None: who, what and where they are."
    cohort = read_stage(work / "real", "cohort.parquet")
    cohort = cohort.assign(height=relative_height(cohort))
    return cohort.assign(fold=0) if fold is None else cohort[cohort["fold"] == fold]


def cell_name(arm):
    return arm.replace(", then ", "-").replace(" and ", "-")


def run_cell(arm, seed, fold, options):
    "Train, score the held-out real patients, write both."
    work, name = options.work, f"{cell_name(arm)}-{seed}" + ("" if fold is None else f"-{fold}")
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
        network = train(work / "real", fold, settings, ("any",), begin, work / "twins" if arm == TWINS else None)
    rows = held_out(work, fold)
    caches = {"bare": work / "real" / "cache", "painted": work / "painted"}
    rows = rows.assign(**{name: score(network, rows, cache, settings) for name, cache in caches.items()})
    facts = {"arm": arm, "seed": seed, "fold": fold, "images": ARMS[arm], "lr": settings.lr, "size": options.size}
    facts |= {"n": len(rows), "seconds": round(time.perf_counter() - start)}
    facts |= {"cpu_seconds": round(time.process_time() - clock)}
    for column in caches:
        facts[column] = [round(float(a[0]), 4) for a in aucs(rows.assign(fold=0), column, 0)]
    write_file(weights, lambda p: save_file({k: v.contiguous() for k, v in network.state_dict().items()}, p))
    kept = ["SOPInstanceUID", "PatientID", "any", "fold", "height", "bare", "painted"]
    write_file(table, lambda p: rows[kept].to_parquet(p))
    with (work / "results.jsonl").open("a") as f:
        print(json.dumps(facts), file=f)
    print(json.dumps(facts), flush=True)


def rule_rows(work):
    "What needs no network: closeness to the middle of the series, area of what is dense inside the skull."
    rows, scores = held_out(work, None), {"closeness to the middle": {}, "area of dense blobs": {}}
    for column, cache_dir in (("bare", work / "real" / "cache"), ("painted", work / "painted")):
        hu = Cache(cache_dir).gather(rows["address"].to_numpy())
        scores["closeness to the middle"][column] = -np.abs(rows["height"] - 0.5)
        scores["area of dense blobs"][column] = find_blobs(hu).sum((1, 2))
    return {name: [rows.assign(**columns)] for name, columns in scores.items()}


def report(options):
    "The table: the mean over seeds with its interval, and the least and the largest seed."
    found, height = rule_rows(options.work), held_out(options.work, None).set_index("SOPInstanceUID")["height"]
    for arm in ARMS:
        name, seeds = cell_name(arm), []
        for seed in range(options.seeds):
            paths = [options.work / "cells" / f"{name}-{seed}.parquet"]
            if arm != "phantom":
                paths = [options.work / "cells" / f"{name}-{seed}-{fold}.parquet" for fold in range(options.folds)]
            if all(path.is_file() and path.stat().st_size for path in paths):
                rows = pd.concat(map(pd.read_parquet, paths)).sort_values("SOPInstanceUID", ignore_index=True)
                seeds.append(rows.assign(height=rows["SOPInstanceUID"].map(height)))
        found |= {arm: seeds} if seeds else {}
    draws_of = {}
    for arm, seeds in found.items():
        cells = [f"{arm} ({len(seeds)})"]
        for column in ("bare", "painted"):
            drawn = [aucs(rows, column, options.n_boot) for rows in seeds]
            for k, values in enumerate(np.array(drawn).swapaxes(0, 1)):  # (seeds, b) each
                draws_of[arm, column, k] = values.mean(0)
                spread = f"; {values[:, 0].min():.3f} to {values[:, 0].max():.3f}" if len(values) > 1 else ""
                cells.append(f"{find_estimate(values.mean(0))}{spread}")
        print("| " + " | ".join(cells) + " |")
    for arm in ("phantom", "real", TWINS):
        for column in ("bare", "painted"):
            if (arm, column, 1) in draws_of and (BOTH, column, 1) in draws_of:
                gap: Estimate = find_estimate(draws_of[BOTH, column, 1] - draws_of[arm, column, 1])
                print(f"at the same height, {column}, {BOTH} minus {arm}: {gap}")


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
        for fold in range(options.folds):
            for arm in ("real", BOTH, TWINS):
                run_cell(arm, seed, fold, options)
    report(options)


if __name__ == "__main__":
    main()
