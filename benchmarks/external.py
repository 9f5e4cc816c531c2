"""Real slices: a network of the phantom, one trained on a part of the patients, and a plain fastai script beside it.

python benchmarks/external.py MODEL --real FOLDER [--work FOLDER] [--seconds 120] [--folds 2] [--seeds 1]

MODEL is the model/ folder of a phantom run, FOLDER holds phe_sich/. All three score every slice of the fold that is
held out; the last two are trained on the other patients, from the same ImageNet weights, with the same architecture at
the same size. The fastai script is what tutorials show: PNG files, `vision_learner`, `aug_transforms`, `fine_tune`; and
once more with all layers trained by one cycle at the project's learning rate. It trains for about --seconds of
processor time; the project gets about what it took, in which it must also score the fold.
AUC of `any` by slice, over pairs that one network scored, of all and of those in the same tenth of their series;
intervals are 95%, by patient, of the mean over seeds. What is finished is kept in the work folder.
"""

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import CancelValidException, Callback
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, Normalize, Resize, aug_transforms
from fastai.vision.all import noop, vision_learner

from ich_fastai.adopt import adopt, frame_heads
from ich_fastai.batches import Settings
from ich_fastai.cohort import make_cohort
from ich_fastai.controls import auc_at_same_position, relative_height
from ich_fastai.core import read_stage, write_file
from ich_fastai.datasets import open_dataset
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.metrics import draw_patients, find_estimate, say_difference
from ich_fastai.network import build_model
from ich_fastai.model import load_model
from ich_fastai.sequence import smooth_logits
from ich_fastai.train import fit
from ich_fastai.validate import ask_all

warnings.filterwarnings("ignore")

LITE = {"arch": "tf_efficientnet_lite0", "pretrained_from": "lite0"}
ANY = LOGITS[LABELS.index("any")]
SMOOTH = 0.33  # weight of a neighbor, as by default
RATE = 1e-3  # highest learning rate of the project, as in its demo
TRAINED = ("fastai", "fastai, one cycle", "ours")
WARM_UP = 320  # images, to learn how many fit into the seconds


class NoValidation(Callback):
    "The script's time goes into training alone."

    def before_validate(self):
        raise CancelValidException


def prepare(options):
    "The real slices as a run folder, heads of one size; the rows of its cohort, with where in the series they lie."
    run = options.work / "framed"
    if not (run / "cohort.parquet").is_file():
        set_of = options.real / "phe_sich"
        adopt(open_dataset("phe_sich", set_of), options.work / "loose")
        make_cohort(options.work / "loose", n_folds=options.folds)
        frame_heads(options.work / "loose", run)
    cohort = read_stage(run, "cohort.parquet")
    return cohort.assign(height=relative_height(cohort))


def make_peer(cohort, fold, options):
    "The script's learner, on the patients outside the fold."
    folder = options.real / "phe_sich" / "slices"
    rows = cohort.assign(path=[folder / f"{name}.png" for name in cohort["SOPInstanceUID"]])
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ColReader("path"),
        get_y=ColReader("any"),
        splitter=lambda t: (np.flatnonzero(t["fold"] != fold), np.flatnonzero(t["fold"] == fold)),
        item_tfms=Resize(options.size),
        batch_tfms=[*aug_transforms(), Normalize.from_stats([0.5] * 3, [0.5] * 3)],  # as lite0 was trained
    )
    dls = block.dataloaders(rows, bs=32, num_workers=0)
    learner = vision_learner(dls, LITE["arch"], pretrained=False, cbs=[NoValidation()], path=options.work)
    theirs, ours = learner.model, build_model(LITE["arch"], 3, LITE["pretrained_from"])
    theirs[0].load_state_dict(ours[0].state_dict())  # the body; the head is fastai's own start
    return learner


def time_of(work):
    "Processor seconds of a call, and what it gave."
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def run_peer(name, cohort, fold, seed, options):
    "Logits of the fold by the script, as its tutorials train or by one cycle at the project's rate; what it took."
    torch.manual_seed(seed)
    np.random.seed(seed)
    outside = cohort["fold"] != fold
    few = pd.concat([cohort[outside].sample(WARM_UP, random_state=0), cohort[~outside].head(1)], ignore_index=True)
    learner, short = make_peer(cohort, fold, options), make_peer(few, fold, options)
    n = len(learner.dls.train_ds)
    with learner.no_bar(), learner.no_logging(), short.no_bar(), short.no_logging():
        epoch = time_of(lambda: short.fit(1))[0] * n / WARM_UP
        epochs = max(2, round(options.seconds / epoch))
        ways = {"fastai": lambda: learner.fine_tune(epochs - 1)}  # and one with the body frozen
        ways["fastai, one cycle"] = lambda: learner.fit_one_cycle(epochs, RATE)
        seconds, _ = time_of(ways[name])
        learner.remove_cb(NoValidation)
        x = learner.get_preds(act=noop)[0].double().numpy()
    return x[:, 1] - x[:, 0], {"images": n * epochs, "seconds": round(seconds)}


def run_ours(cohort, fold, seed, seconds, options):
    "Logits of the fold by `fit`, and what it took, scoring included."
    run, out = options.work / "framed", options.work / f"ours-{seed}-{fold}"
    settings = Settings(**LITE, image_size=options.size, lr=RATE, epochs=1, epoch_size=WARM_UP, seed=seed)
    settings = replace(settings, balance="none", class_weights="none")
    short, _ = time_of(lambda: fit(run, settings, out=out, folds=[fold]))
    long, _ = time_of(lambda: fit(run, replace(settings, epoch_size=2 * WARM_UP), out=out, folds=[fold]))
    images = WARM_UP + int((seconds - short) / (long - short) * WARM_UP) // 32 * 32
    took, table = time_of(lambda: fit(run, replace(settings, epoch_size=images), out=out, folds=[fold]))
    of = table.set_index("SOPInstanceUID")[ANY]
    x = of.loc[cohort.loc[cohort["fold"] == fold, "SOPInstanceUID"]].to_numpy(np.float64)
    return x, {"images": images, "seconds": round(took)}


def run_cells(cohort, options):
    "A table of scores for each seed and fold."
    for seed in range(options.seeds):
        for fold in range(options.folds):
            took = {}
            for name in TRAINED:
                path = options.work / "cells" / f"{name}-{seed}-{fold}.parquet"
                if not path.is_file():
                    how = (cohort, fold, seed)
                    found = (
                        run_ours(*how, took[TRAINED[0]], options) if name == "ours" else run_peer(name, *how, options)
                    )
                    rows = cohort.loc[cohort["fold"] == fold, ["SOPInstanceUID"]].assign(x=found[0], **found[1])
                    write_file(path, lambda p, rows=rows: rows.to_parquet(p))
                facts = pd.read_parquet(path)[["images", "seconds"]].iloc[0].astype(int).to_dict()
                took[name] = facts["seconds"]
                print(json.dumps({"by": name, "seed": seed, "fold": fold} | facts), flush=True)


def ask_phantom(options):
    "What the phantom's model says, as `ich-validate` asks it, by slice."
    model, dataset = load_model(options.model, "cpu"), open_dataset("phe_sich", options.real / "phe_sich")
    answers = ask_all(model, dataset, options.work / "answers")
    return answers.set_index("id")[ANY]


def read_scores(cohort, options):
    "name: scores of all slices, one array a seed."
    phantom = cohort["SOPInstanceUID"].map(ask_phantom(options)).to_numpy(np.float64)
    found = {"closeness to the middle": [-np.abs(cohort["height"].to_numpy() - 0.5)], "phantom": [phantom]}
    for seed in range(options.seeds):
        for name in TRAINED:
            paths = [options.work / "cells" / f"{name}-{seed}-{fold}.parquet" for fold in range(options.folds)]
            table = pd.concat(map(pd.read_parquet, paths)).set_index("SOPInstanceUID")
            x = table.loc[cohort["SOPInstanceUID"], ["x"]].to_numpy(np.float64)
            near = smooth_logits(x, cohort["SeriesInstanceUID"], cohort["z_mm"], SMOOTH)
            found.setdefault(name, []).append(x[:, 0])
            found.setdefault(f"{name}, with the slices beside it", []).append(near[:, 0])
    return found


def report(cohort, options):
    "The table, and the paired differences."
    (patient, draws), y = draw_patients(cohort["PatientID"].to_numpy(), options.n_boot), cohort["any"].to_numpy()
    place = (cohort["fold"] + cohort["height"]).to_numpy() / options.folds
    print(f"{len(y):,} slices of {draws.shape[1]} patients, {y.sum()} positive; {options.seeds} seeds")
    aucs = {}
    for name, seeds in read_scores(cohort, options).items():
        for pairs, bins in (("all", options.folds), ("same position", 10 * options.folds)):
            each = np.array([auc_at_same_position(y, s, place, patient, draws, bins) for s in seeds])
            aucs[name, pairs] = each.mean(0)
            print(f"| {name} | {pairs} | {find_estimate(each.mean(0))} | {np.round(each[:, 0], 3).tolist()} |")
    beside = ", with the slices beside it"
    compared = [(f"ours{more}", f"{peer}{more}") for peer in TRAINED[:2] for more in ("", beside)]
    compared.append(("phantom", "fastai"))
    for a, b in [*compared, ("ours" + beside, "phantom"), ("phantom", "closeness to the middle")]:
        for pairs in ("all", "same position"):
            gap = find_estimate(aucs[a, pairs] - aucs[b, pairs])
            print(f"{pairs}: {a}, minus {b}: {gap} {say_difference(gap)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/external"))
    parser.add_argument("--seconds", type=float, default=120, help="of processor time for a training of the script")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=96, help="px")
    parser.add_argument("--n-boot", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cohort = prepare(options)
    run_cells(cohort, options)
    report(cohort, options)


if __name__ == "__main__":
    main()
