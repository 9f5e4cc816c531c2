"""Training end to end against the same network on one resident batch, and against a plain fastai pipeline.

python benchmarks/train.py [--device cpu|cuda] [--rounds 5] [--steps 0] [--batch 0] > results.jsonl
python benchmarks/train.py --versus-fastai [--patients 60] [--epochs 6] [--rounds 3]

The first prints one JSON line per network, size and channels. End to end is what `fit` does in a step: loader,
augmentation, forward, backward, clipping, optimizer, logging. Resident is a bare loop of the same network and optimizer
on one batch that lies on the device. Both take turns; rates are medians of rounds, the ratio is of medians.
On CUDA: bf16, resnet50, convnext_tiny and seresnext50 at 256 and 384 px. Without: fp32, resnet18 at 128 px. Data is the
tiny phantom; no download. The second trains both pipelines in turn on a phantom, on the CPU, on the same slices
with the same network, size, epochs and number of images.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from torch.utils.flop_counter import FlopCounterMode

from ich_fastai.cache import Cache
from ich_fastai.cohort import make_cohort
from ich_fastai.batches import Place, Settings, named_windows, slice_loaders
from ich_fastai.cohort import training_rows
from ich_fastai.core import read_stage
from ich_fastai.dicom import window
from ich_fastai.ingest import ingest
from ich_fastai.labels import LABELS, LOGITS, find_dataset, read_labels, tabulate_labels
from ich_fastai.metrics import metrics_table
from ich_fastai.network import build_model
from ich_fastai.model import loss_weights, make_loss
from ich_fastai.phantom import make_phantom
from ich_fastai.tiny import tiny_phantom
from ich_fastai.learner import FollowEpochs, Journal, StopOnNonFinite, make_learner, split_decay
from ich_fastai.train import fit

warnings.filterwarnings("ignore")

WINDOWS = ("brain", "subdural", "stroke")
NETWORKS = {"cuda": ("resnet50", "convnext_tiny", "seresnext50_32x4d"), "cpu": ("resnet18",)}
SIZES = {"cuda": (256, 384), "cpu": (128,)}
WANTED = {"cuda": 0.95, "cpu": 0.97}


def make_run(data_dir, run_dir, size):
    "A run folder with the cohort and the cache of a dataset; the cohort."
    dataset = find_dataset(data_dir)
    tabulate_labels(read_labels(dataset.labels_csv), run_dir)
    ingest(dataset.dicom_dir, run_dir / "cache", size=size)
    return make_cohort(run_dir)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def autocast(device):
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def matmul_rate(device):
    "Multiplications and additions a second of a large matrix product: bf16 on CUDA, fp32 on the CPU."
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * n**3 / statistics.median(seconds[1:])


def peak_memory(device):
    "MB: allocated on the device; on the CPU the process's largest resident size so far."
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Turns(Callback):
    "Time each epoch's training end to end, and after it as many steps on a resident batch."

    order = -10  # its clock starts before the other callbacks

    def __init__(self, device, steps):
        self.device, self.steps, self.end_to_end, self.resident = device, steps, [], []

    def before_train(self):
        wait(self.device)
        self.start = time.perf_counter()

    def after_train(self):
        wait(self.device)
        self.end_to_end.append(time.perf_counter() - self.start)

    def after_epoch(self):
        if not self.resident:
            self.memory = peak_memory(self.device)
            self.x, self.y = (t.clone() for t in self.dls.train.one_batch())
            self.optimizer = torch.optim.AdamW([{"params": p} for p in split_decay(self.model)], lr=1e-5, fused=True)
        self.model.train()
        wait(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        wait(self.device)
        self.resident.append(time.perf_counter() - start)

    def step(self):
        with autocast(self.device):
            logits = self.model(self.x)
        self.learn.loss_func(logits.float(), self.y).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def flops_of_step(learner, device):
    "Multiplications and additions of forward and backward of one batch."
    x, y = learner.dls.train.one_batch()
    with FlopCounterMode(display=False) as counter, autocast(device):
        learner.loss_func(learner.model(x).float(), y).backward()
    learner.model.zero_grad()
    return counter.get_total_flops()


def make_turns(arch, size, channels, cohort, cache, device, batch, steps):
    "A learner on the cohort that times itself, and its callback that does."
    few = pd.concat([cohort[cohort["fold"] != 0], cohort[cohort["fold"] == 0].head(8)], ignore_index=True)
    how = dict(image_size=size, windows=named_windows(WINDOWS), batch_size=batch, epoch_size=batch * steps)
    settings = Settings(**how, neighbors=(channels // len(WINDOWS) - 1) // 2)
    dls = slice_loaders(few, cache, 0, settings, place=Place(torch.device(device)))
    turns = Turns(device, steps)
    loss = make_loss(loss_weights(few, "inverse"), device=device)
    callbacks = [FollowEpochs(), Journal(), StopOnNonFinite(), turns]
    return make_learner(dls, build_model(arch, channels), loss, callbacks), turns


def measure(arch, size, channels, cohort, cache, device, options):
    "Seconds of each turn, as a row of results. Few slices are validated: only training is timed."
    usual = (64, 50) if device == "cuda" else (32, 10)
    batch, steps = options.batch or usual[0], options.steps or usual[1]
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    learner, turns = make_turns(arch, size, channels, cohort, cache, device, batch, steps)
    flops = flops_of_step(learner, device)
    learner.fit_one_cycle(options.rounds + 1, 1e-4)
    both = (turns.end_to_end, turns.resident)
    ours, resident = (statistics.median(seconds[1:]) / steps for seconds in both)  # the first turn warms up
    return {
        "images_per_s": round(batch / ours, 1),
        "resident_images_per_s": round(batch / resident, 1),
        "ratio": round(resident / ours, 4),
        "share_of_matmul_rate": round(flops / ours / options.matmul, 3),
        "peak_memory_mb": round(turns.memory),
        "batch": batch,
        "steps": steps,
    }


def measure_steps(options):
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        print("no GPU here, or not asked for: the figures are the CPU's, nothing was measured on CUDA", file=sys.stderr)
    options.matmul = matmul_rate(device)
    about = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": "bf16" if device == "cuda" else "fp32",
        "rounds": options.rounds,
        "matmul_tflops": round(options.matmul / 1e12, 3),
        "ratio_wanted": WANTED[device],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES[device]:
            run_dir = Path(scratch) / str(size)
            cohort = make_run(tiny_phantom(), run_dir, max(256, size))
            for arch in NETWORKS[device]:
                for channels in (3, 9):
                    try:
                        row = measure(arch, size, channels, cohort, run_dir / "cache", device, options)
                    except torch.OutOfMemoryError:
                        row = {"error": "out of memory: give a smaller --batch"}
                    print(
                        json.dumps({"arch": arch, "image_size": size, "channels": channels} | row | about), flush=True
                    )


def write_pngs(rows, cache, folder, size):
    "The slices as 8-bit PNG, one window a color: what a fastai user has on disk."
    for row in rows.itertuples():
        hu = cv2.resize(cache.gather(np.array(row.address)), (size, size), interpolation=cv2.INTER_AREA)
        rgb = np.stack([window(hu, name) for name in WINDOWS], -1)
        cv2.imwrite(str(folder / f"{row.SOPInstanceUID}.png"), (rgb[..., ::-1] * 255).round().astype(np.uint8))


def train_fastai(training, held_out, folder, options, seed):
    "Seconds of training with its validations, images seen, probabilities of the held-out slices."
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.data.transforms import IndexSplitter
    from fastai.losses import BCEWithLogitsLossFlat
    from fastai.torch_core import set_seed
    from fastai.vision.augment import aug_transforms
    from fastai.vision.data import ImageBlock
    from fastai.vision.learner import vision_learner

    set_seed(seed)
    rows = pd.concat([training, held_out], ignore_index=True)
    block = DataBlock(
        blocks=(ImageBlock, MultiCategoryBlock(encoded=True, vocab=list(LABELS))),
        get_x=lambda r: folder / f"{r['SOPInstanceUID']}.png",
        get_y=lambda r: r[list(LABELS)].to_list(),
        splitter=IndexSplitter(range(len(training), len(rows))),
        batch_tfms=aug_transforms(),
    )
    dls = block.dataloaders(rows, bs=options.batch or 32, device=torch.device("cpu"))
    learner = vision_learner(dls, options.arch, n_out=len(LABELS), pretrained=False, loss_func=BCEWithLogitsLossFlat())
    with learner.no_bar(), contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        learner.fit_one_cycle(options.epochs, options.lr)
        seconds = time.perf_counter() - start
        p = learner.get_preds(dl=dls.valid)[0].numpy()
    return seconds, options.epochs * len(dls.train) * dls.train.bs, p


def train_ours(run_dir, options, seed, epoch_size):
    "The same of `fit`, its files written."
    start = time.perf_counter()
    settings = Settings(
        arch=options.arch,
        image_size=options.size,
        windows=named_windows(WINDOWS),
        neighbors=0,
        batch_size=options.batch or 32,
        epochs=options.epochs,
        epoch_size=epoch_size,
        lr=options.lr,
        class_weights="none",
        seed=seed,
    )
    table = fit(run_dir, settings)
    seconds = time.perf_counter() - start
    seen = read_stage(run_dir, "model/model.json")["training"]["folds"][0]["images_seen"]
    return seconds, seen, 1 / (1 + np.exp(-table[LOGITS].to_numpy(np.float64)))


def versus_fastai(options):
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        cohort = make_run(make_phantom(scratch / "data", options.patients), scratch / "run", 256)
        training, held_out = training_rows(cohort, 0, "undersample")[0], cohort[cohort["fold"] == 0]
        (scratch / "png").mkdir()
        write_pngs(pd.concat([training, held_out]), Cache(scratch / "run" / "cache"), scratch / "png", options.size)
        batch = options.batch or 32
        n, patients = len(training) // batch, held_out["PatientID"].nunique()
        print(f"{options.arch}, {options.size} px, {options.epochs} epochs of {n} batches of {batch};", end=" ")
        print(f"CPU, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"held out: {len(held_out)} synthetic slices of {patients} patients,", end=" ")
        print(f"prevalence of any {held_out['any'].mean():.3f}")
        seconds = {"ours": [], "fastai": []}
        for seed in range(options.rounds):
            results = {
                "ours": train_ours(scratch / "run", options, seed, n * batch),
                "fastai": train_fastai(training, held_out, scratch / "png", options, seed),
            }
            for name, (time_taken, seen, p) in results.items():
                seconds[name].append(time_taken)
                table = metrics_table(held_out[list(LABELS)].to_numpy(), p, held_out["PatientID"].to_numpy())
                auc = table[(table["label"] == "any") & (table["metric"] == "auc")].iloc[0]
                print(f"round {seed + 1} {name:>6}: {time_taken:6.1f} s for {seen:,} images;", end=" ")
                print(f"AUC of any {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})", flush=True)
    ours, peer = (statistics.median(s) for s in seconds.values())
    print(f"median: ours {ours:.1f} s, fastai {peer:.1f} s: {peer / ours:.2f} times as fast.", end=" ")
    print("AUC with 95% intervals, by patient; of a phantom, so no claim about patients")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versus-fastai", action="store_true")
    parser.add_argument("--device", default="", choices=("", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="a round; 0: 50 on CUDA, 10 on the CPU")
    parser.add_argument("--batch", type=int, default=0, help="0: 64 on CUDA, 32 on the CPU")
    parser.add_argument("--patients", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--arch", default="resnet18", help="of --versus-fastai")
    parser.add_argument("--size", type=int, default=96, help="px, of --versus-fastai")
    parser.add_argument("--lr", type=float, default=3e-3, help="of --versus-fastai")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.versus_fastai else 5)
    versus_fastai(options) if options.versus_fastai else measure_steps(options)


if __name__ == "__main__":
    main()
