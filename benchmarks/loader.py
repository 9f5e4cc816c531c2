"""Batches from the cache against fastai's loader on the same slices as PNG: slices a second, medians of runs in turn.

python benchmarks/loader.py [--slices 2000] [--size 256] [--rounds 5]

plain:      one HU channel of each slice gathered into a batch, one thread, against ImageBlock with 2 workers, no augmentation.
augmented:  affine, noise, three jittered windows, normalized, against ImageBlock with aug_transforms and Normalize, on the CPU.
The slices are copies of the tiny phantom's. The page cache is warm.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from ich_fastai.cohort import tiny_cohort
from ich_fastai.data import Augment, SliceBatches, named_windows
from ich_fastai.dicom import window
from ich_fastai.ingest import open_cache

warnings.filterwarnings("ignore")


def write_pngs(cohort, folder, size):
    "Each slice of the cohort once as an 8-bit RGB PNG of three windows, what fastai users store."
    cache = open_cache(tiny_cohort() / "cache")
    for row in cohort.drop_duplicates("address").itertuples():
        hu = cv2.resize(cache.gather(np.array(row.address)), (size, size), interpolation=cv2.INTER_AREA)
        rgb = np.stack([window(hu, name) for name in ("brain", "subdural", "stroke")], -1)
        cv2.imwrite(str(folder / f"{row.SOPInstanceUID}.png"), (rgb * 255).astype(np.uint8))


def fastai_loader(cohort, folder, *, augment):
    "fastai's usual loader of PNG files, 2 workers."
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.data.transforms import IndexSplitter
    from fastai.vision.augment import aug_transforms
    from fastai.vision.core import imagenet_stats
    from fastai.vision.data import ImageBlock, Normalize

    transforms = [*aug_transforms(), Normalize.from_stats(*imagenet_stats)] if augment else []
    labels = list(cohort.filter(["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]))
    block = DataBlock(
        blocks=(ImageBlock, MultiCategoryBlock(encoded=True, vocab=labels)), get_x=lambda r: folder / f"{r['SOPInstanceUID']}.png", get_y=lambda r: r[labels].to_list(),
        splitter=IndexSplitter([0]), batch_tfms=transforms,
    )
    return block.dataloaders(cohort, bs=64, num_workers=2, device=torch.device("cpu")).train


def cache_loader(cohort, size, *, augment):
    "This project's batches of the same slices."
    return SliceBatches(
        cohort, tiny_cohort() / "cache", image_size=size, windows=named_windows(["brain", "subdural", "stroke"]), neighbors=0, batch_size=64, train=True,
        augment=Augment() if augment else None,
    )


def gather_all(loader):
    "Every batch of an epoch as int16 HU in the reused buffer, in the order of training."
    for rows in loader.rows():
        yield loader.read(rows)


def rate(batches):
    "Slices a second."
    start, n = time.perf_counter(), 0
    for batch in batches:
        n += len(batch[0]) if isinstance(batch, (tuple, list)) else len(batch)
    return n / (time.perf_counter() - start)


def compare(name, ours, peer, rounds, target):
    "Both in turn; medians, and their ratio."
    rates = [(rate(ours()), rate(peer())) for _ in range(rounds + 1)][1:]  # the first warms up
    a, b = (statistics.median(r) for r in zip(*rates, strict=True))
    print(f"{name:<42} {a:9,.0f} slices/s   fastai {b:7,.0f}   {a / b:6.1f} times (wanted: {target})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cohort = pd.read_parquet(tiny_cohort() / "cohort.parquet")
    cohort = pd.concat([cohort] * -(-args.slices // len(cohort)), ignore_index=True).head(args.slices)
    print(f"{len(cohort):,} slices at {args.size} px, {os.cpu_count()} cores, torch {torch.__version__}, {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        write_pngs(cohort, Path(folder), args.size)
        plain, augmented = (cache_loader(cohort, args.size, augment=a) for a in (False, True))
        png, png_augmented = (fastai_loader(cohort, Path(folder), augment=a) for a in (False, True))
        torch.set_num_threads(1)
        one = [rate(gather_all(plain)) for _ in range(args.rounds + 1)][1:]
        print(f"{'HU batches gathered, one core':<42} {statistics.median(one):9,.0f} slices/s (wanted: 20,000)", flush=True)
        torch.set_num_threads(os.cpu_count())
        compare("plain: HU batches against PNG", lambda: gather_all(plain), lambda: png, args.rounds, 50)
        compare("plain: three windows against PNG", lambda: plain, lambda: png, args.rounds, "-")
        compare("augmented: three windows against PNG", lambda: augmented, lambda: png_augmented, args.rounds, 5)


if __name__ == "__main__":
    main()
