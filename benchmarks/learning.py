"""What a training is worth: images seen, each augmentation, averaged weights and networks, mirrored slices.

python benchmarks/learning.py [--work FOLDER] [--seeds 3] [--only PART] [--report]

A phantom of 220 patients: 120 to train on, in five folds, 100 that no network sees. Small networks at 64 px. Each
training is a cell: its logits of the 100 patients are written at once, as the slices are and mirrored, and the same
command goes on with the cells that are missing. Differences are paired, with 95% intervals over seeds and patients
(notebook 25). --report trains none: it prints the tables and draws benchmarks/learning.svg.
--of RUN takes the networks of a finished run's comparison (arms/) instead, on all 220 patients.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from scipy.special import expit, logit

from ich_fastai.batches import USUAL, Settings, SliceBatches, named_windows, slice_loaders
from ich_fastai.cohort import make_cohort
from ich_fastai.core import COLORS, read_stage, save_figure, set_style, write_file
from ich_fastai.calibrate import calibrate, fit_decisions, order_logits
from ich_fastai.ensemble import join_models
from ich_fastai.imbalance import Arms, arm_rows, stack_seeds, subtract
from ich_fastai.ingest import ingest
from ich_fastai.labels import LABELS, find_dataset, read_labels, tabulate_labels
from ich_fastai.metrics import ESTIMATE, Estimate, draw_patients, find_estimate, label_metrics, say_difference
from ich_fastai.metrics import weighted_log_losses
from ich_fastai.network import build_model, start_at
from ich_fastai.model import load_model, loss_weights, make_loss
from ich_fastai.phantom import make_phantom
from ich_fastai.predict import decide
from ich_fastai.learner import AverageWeights, FollowEpochs, StopOnNonFinite, make_learner

warnings.filterwarnings("ignore")

TRAINED, UNSEEN, TEST = 120, 100, 5  # patients; the fold of those that no network sees
BASE = Settings(
    image_size=64,
    windows=named_windows(["brain", "subdural", "bone"]),
    neighbors=0,
    epochs=4,
    epoch_size=500,
    balance="none",
    class_weights="none",
)
LITE = {"arch": "tf_efficientnet_lite0", "pretrained_from": "lite0", "lr": 1e-3}
PARTS = {"turned": "degrees", "zoomed": "zoom", "shifted": "shift", "mirrored": "flip", "noise": "noise_hu"}


class FreezeBody(Callback):
    "The pretrained layers stand still in the first epoch; their norms follow the new images."

    def before_train(self):
        for p in self.learn.model[0].parameters():
            p.requires_grad_(self.epoch > 0)


def plan():
    "arm: (settings, augmentation, callbacks, fold held out)."
    arms = {"base": (BASE, USUAL, (), TEST), "not at all": (BASE, None, (), TEST)}
    arms["averaged weights"] = (BASE, USUAL, ("ema",), TEST)
    arms |= {f"fold {k}": (BASE, USUAL, (), k) for k in range(TEST)}
    arms |= {f"lite {500 * n}": (replace(BASE, epochs=n, **LITE), USUAL, (), TEST) for n in (4, 2)}
    arms["lite 2000, frozen"] = (replace(BASE, **LITE), USUAL, ("frozen",), TEST)
    for name, field in PARTS.items():
        arms[f"not {name}"] = (BASE, USUAL._replace(**{field: 0.0}), (), TEST)
    arms["not window"] = (BASE, USUAL._replace(width=0.0, center=0.0), (), TEST)
    arms |= {f"images {500 * n}": (replace(BASE, epochs=n), USUAL, (), TEST) for n in (1, 2, 8)}
    arms["neighbors"] = (replace(BASE, neighbors=1), USUAL, (), TEST)
    return arms


def prepare(work):
    "A run folder of both groups; the cohort, its fold TEST being the patients that no network sees."
    if not (work / "cohort.parquet").is_file():
        data = find_dataset(make_phantom(work / "dicom", TRAINED + UNSEEN, seed=21, workers=1))
        tabulate_labels(read_labels(data.labels_csv), work)
        ingest(data.dicom_dir, work / "cache", size=64, workers=1)
        make_cohort(work, n_folds=TEST)
    cohort = read_stage(work, "cohort.parquet")
    patients = pd.Series(cohort["PatientID"].unique()).sample(frac=1, random_state=0)
    return cohort.assign(fold=cohort["fold"].mask(cohort["PatientID"].isin(patients[:UNSEEN]), TEST))


def look(network, rows, work, settings, views=True):
    "(views, n, 6) logits of these slices: as they are, mirrored, with the order of the neighbors turned round."
    outputs, k = [], 2 * settings.neighbors + 1
    with torch.no_grad():
        for x, _ in SliceBatches(rows, work / "cache", settings, train=False):
            seen = [x, x.flip(-1)] + [x.unflatten(1, (k, -1)).flip(1).flatten(1, 2)] * (k > 1)
            outputs.append(torch.stack([network(view) for view in (seen if views else seen[:1])]))
    return torch.cat(outputs, 1).numpy()


def train_cell(cohort, work, settings, augment, extra, fold):
    "The logits of the slices that the training has not seen: TEST's and, beside them, those of its own fold."
    cohort = cohort if fold == TEST else cohort[cohort["fold"] != TEST]
    few = pd.concat([cohort[cohort["fold"] != fold], cohort[cohort["fold"] == fold].head(2)], ignore_index=True)
    dls = slice_loaders(few, work / "cache", fold, settings, augment=augment)
    torch.manual_seed(settings.seed)
    network = build_model(settings.arch, settings.n_in, settings.pretrained_from)
    network = start_at(network, few.loc[few["fold"] != fold, list(LABELS)].mean())
    callbacks = [FollowEpochs(), StopOnNonFinite()] + [FreezeBody()] * ("frozen" in extra)
    if "ema" in extra:
        callbacks.append(AverageWeights(network, 0.999))
    start = time.process_time()
    loss = make_loss(loss_weights(few[few["fold"] != fold], settings.class_weights))
    learner = make_learner(dls, network, loss, callbacks)
    with learner.no_bar():
        learner.fit_one_cycle(settings.epochs, settings.lr)
    network = callbacks[-1].ema.module if "ema" in extra else learner.model.eval()
    return network, time.process_time() - start


def run_cells(options, cohort):
    test = cohort[cohort["fold"] == TEST]
    for seed in range(options.seeds):
        for arm, (settings, augment, extra, fold) in plan().items():
            path = options.work / "cells" / f"{arm}-{seed}.npz"
            if path.is_file() or not arm.startswith(tuple(options.only or [""])):
                continue
            network, seconds = train_cell(cohort, options.work, replace(settings, seed=seed), augment, extra, fold)
            views = arm.startswith(("base", "fold", "neighbors"))
            found = {"test": look(network, test, options.work, settings, views), "seconds": seconds}
            if fold != TEST:
                own = cohort[cohort["fold"] == fold]
                found["own"] = look(network, own, options.work, settings, views=False)[0]
            write_file(path, lambda p, found=found: np.savez(open(p, "wb"), **found))
            print(f"{arm}, seed {seed}: {seconds:.0f} processor s", flush=True)


def read_cells(options, arm):
    "What each seed of an arm left."
    paths = [options.work / "cells" / f"{arm}-{seed}.npz" for seed in range(options.seeds)]
    return [dict(np.load(path)) for path in paths if path.is_file()]


def measure(y, logits, patient, draws):
    "As notebook 25 has it, of what is compared here."
    p = expit(logits.astype(np.float64))
    k = LABELS.index("any")
    values = {"all": {"weighted_log_loss": weighted_log_losses(y, p, patient, draws)}}
    found = label_metrics(y[:, k], p[:, k], patient, draws)
    return values | {"any": {name: found[name] for name in ("auc", "calibration_slope")}}


def named_logits(options):
    "name: of each seed (n, 6) logits of the patients that no network has seen."
    found = {arm: [cell["test"][0] for cell in read_cells(options, arm)] for arm in plan() if "fold" not in arm}
    base, near = read_cells(options, "base"), read_cells(options, "neighbors")
    found["mirrored too"] = [cell["test"][:2].mean(0) for cell in base]
    found["neighbors, turned round too"] = [cell["test"][::2].mean(0) for cell in near]
    folds = [read_cells(options, f"fold {k}") for k in range(TEST)]
    whole = range(min(map(len, folds)))
    found["one of five folds"] = [folds[0][seed]["test"][0] for seed in whole]
    found["five folds"] = [np.mean([of[seed]["test"][0] for of in folds], 0) for seed in whole]
    found["five folds, mirrored too"] = [np.mean([of[seed]["test"][:2] for of in folds], (0, 1)) for seed in whole]
    return {name: logits for name, logits in found.items() if logits}


COMPARED = {f"not {name}": "base" for name in (*PARTS, "window", "at all")}
COMPARED |= {"averaged weights": "base", "mirrored too": "base", "lite 2000": "base", "lite 2000, frozen": "lite 2000"}
COMPARED |= {"neighbors": "base", "neighbors, turned round too": "neighbors"}
COMPARED |= {"one of five folds": "base", "five folds": "one of five folds", "five folds, mirrored too": "five folds"}


def report(options, cohort):
    rows = cohort[cohort["fold"] == TEST]
    y = rows[list(LABELS)].to_numpy(np.int64)
    patient, draws = draw_patients(rows["PatientID"], 1000)
    print(f"{len(rows):,} slices of {rows['PatientID'].nunique()} patients, prevalence of any {y[:, -1].mean():.3f}")
    found = {
        name: stack_seeds([measure(y, logits, patient, draws) for logits in of])
        for name, of in named_logits(options).items()
    }
    arms = Arms(y, patient, {}, ())
    for name, values in found.items():
        row = next(r for r in arm_rows(arms, values) if r["metric"] == "auc")
        print(f"| {name} | {Estimate(*(row[c] for c in ESTIMATE))} | {row['by_seed']} |")
    for name, of in COMPARED.items():
        if name in found and of in found:
            print(f"| {name} | minus {of} |", end="")
            same = name.endswith("too")  # the same networks, so the difference of each
            both = (subtract(found[name], found[of]), None) if same else (found[name], found[of])
            for row in arm_rows(arms, *both):
                estimate = Estimate(*(row[c] for c in ESTIMATE))
                print(f" {row['metric']} {estimate} {say_difference(estimate)} |", end="")
            print()
    report_calibration(options, cohort, y, patient, draws)
    draw_curve(found)


def report_calibration(options, cohort, y, patient, draws):
    "Slopes on patients that no network has seen, of probabilities calibrated on the networks' own held-out patients."
    rows = cohort[cohort["fold"] != TEST]
    for seed in range(options.seeds):
        folds = [read_cells(options, f"fold {k}")[seed : seed + 1] for k in range(TEST)]
        if not all(folds):
            continue
        of = [rows[rows["fold"] == k] for k in range(TEST)]
        own = order_logits(np.concatenate([cells[0]["own"] for cells in folds]).astype(np.float64))
        truth, ids = pd.concat(of)[list(LABELS)].to_numpy(np.int64), pd.concat(of)["PatientID"].to_numpy()
        fit = fit_decisions(truth, own, ids)
        logits = {"one": folds[0][0]["test"][0], "five": np.mean([cells[0]["test"][0] for cells in folds], 0)}
        for name, x in logits.items():
            p = calibrate(order_logits(x.astype(np.float64)), fit.slope, fit.intercept)
            slope = find_estimate(label_metrics(y[:, -1], p[:, -1], patient, draws)["calibration_slope"])
            loss = find_estimate(weighted_log_losses(y, p, patient, draws))
            print(f"| seed {seed} | {name} | calibration slope {slope} | weighted log loss {loss} |")


def draw_curve(found):
    "AUC of `any` against images seen: the mean over seeds in a band from the lowest to the highest."
    import matplotlib.pyplot as plt

    set_style()
    fig, ax = plt.subplots(figsize=(6, 4))
    lines = {
        "resnet10t from scratch": {500 * n: f"images {500 * n}" for n in (1, 2, 8)} | {2000: "base"},
        "EfficientNet-Lite0, pretrained": {500 * n: f"lite {500 * n}" for n in (2, 4)},
    }
    for color, (label, arms) in zip((COLORS[4], COLORS[1]), lines.items(), strict=True):
        seen = [n for n in sorted(arms) if arms[n] in found]
        auc = np.array([found[arms[n]]["any"]["auc"][:, 0] for n in seen])
        if len(auc):
            ax.plot(seen, auc.mean(1), marker="o", color=color, label=f"{label} ({auc.shape[1]} seeds)")
            ax.fill_between(seen, auc.min(1), auc.max(1), color=color, alpha=0.2, lw=0)
    ax.set(xscale="log", xlabel="images seen", ylabel="AUC of any", title="100 synthetic patients that no network saw")
    ax.set_xticks([500, 1000, 2000, 4000], ["500", "1,000", "2,000", "4,000"])
    ax.minorticks_off()
    ax.legend(loc="lower right")
    save_figure(fig, Path(__file__).with_name("learning.svg"))


def look_twice(options):
    "The trainings of a finished run's comparison on these patients: alone, mirrored too, averaged; and calibrated."
    work = options.work / "unseen"
    if not (work / "cohort.parquet").is_file():
        data = find_dataset(options.work / "dicom")
        tabulate_labels(read_labels(data.labels_csv), work)
        ingest(data.dicom_dir, work / "cache", workers=1)
        make_cohort(work, n_folds=TEST)
    rows = read_stage(work, "cohort.parquet")
    y, (patient, draws) = rows[list(LABELS)].to_numpy(np.int64), draw_patients(rows["PatientID"], 1000)
    print(f"{len(rows):,} slices of {rows['PatientID'].nunique()} patients, prevalence of any {y[:, -1].mean():.3f}")
    for arm in sorted(
        path for path in (options.of / "arms").glob("*") if path.name in options.only or not options.only
    ):
        models = [load_model(path / "model", "cpu") for path in sorted(arm.glob("seed-*"))]
        views = np.stack([look(m.network, rows, work, m.settings)[:2] for m in models])  # (seeds, 2, n, 6)
        ways = {"alone": views[:, 0], "mirrored too": views.mean(1), "seeds averaged": [views[:, 0].mean(0)]}
        ways["seeds averaged, mirrored too"] = [views.mean((0, 1))]
        report_ways(arm.name, {n: [measure(y, x, patient, draws) for x in of] for n, of in ways.items()}, y, patient)
        folders = [path / "model" for path in sorted(arm.glob("seed-*"))]
        ways = {"alone": [decide_logits([f], x) for f, x in zip(folders, views[:, 0], strict=True)]}
        ways["named together"] = [decide_logits(folders, views[:, 0].mean(0))]
        found = {n: [measure(y, x, patient, draws) for x in of] for n, of in ways.items()}
        report_ways(f"{arm.name}, calibrated", found, y, patient)


def decide_logits(folders, x):
    "Calibrated logits of these slices: of one model, or of the mean of several, as notebook 29 calibrates it."
    with tempfile.TemporaryDirectory() as scratch:
        card = load_model(join_models(folders, scratch), "cpu").card
    return order_logits(logit(decide(x.astype(np.float64), card)[list(LABELS)].to_numpy()))


def report_ways(arm, found, y, patient):
    "Each way, and what it has more than a network alone; where seeds are averaged the interval is of patients alone."
    arms = Arms(y, patient, {}, ())
    alone = stack_seeds(found["alone"])
    mean = {k: {m: v.mean(0, keepdims=True) for m, v in of.items()} for k, of in alone.items()}
    for name, of in found.items():
        values = stack_seeds(of)
        less = subtract(values, alone if len(of) > 1 else mean)
        for row, minus in zip(arm_rows(arms, values), arm_rows(arms, less), strict=True):
            shown = [Estimate(*(r[c] for c in ESTIMATE)) for r in (row, minus)]
            print(f"| {arm} | {name} | {row['metric']} | {shown[0]} | {shown[1]} | {say_difference(shown[1])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="arms that start with one of these")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--of", type=Path, help="a finished run: its networks on these patients, looked at twice")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cohort = None if options.of else prepare(options.work)
    if options.of:
        return look_twice(options)
    report(options, cohort) if options.report else run_cells(options, cohort)


if __name__ == "__main__":
    main()
