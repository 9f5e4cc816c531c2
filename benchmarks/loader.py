"""Batches from the cache against fastai's loader on the same slices as PNG: slices a second, medians of runs in turn.

python benchmarks/loader.py [--slices 2000] [--size 256] [--rounds 5]
python benchmarks/loader.py --reads [--slices 12000]
python benchmarks/loader.py --shards 659

plain:      one HU channel of each slice gathered into a batch, one thread; ImageBlock with 2 workers, no augmentation.
augmented:  affine, noise, three jittered windows, normalized; ImageBlock with aug_transforms and Normalize; on the CPU.
reads:      batches of 64 slices in random order by `Cache.gather`, and from plain memory maps; from a cold disk (pages
            dropped) and warm; and the bytes that the disk gave for each byte that was wanted.
shards:     batches of 192 slices from random places, as 64 slices with their neighbors are, in 200 shards and in more
            than a process holds open (RSNA has 659); each shard 1,024 slices of 8 px, so that the bytes do not matter.
The slices are copies of the tiny phantom's, each at its own place in the cache. Without --reads the page cache is warm.
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from ingest import copy_slices

from ich_fastai.cache import SHARD_ROWS, Cache, save_settings, save_shard, shard_paths
from ich_fastai.batches import Augment, Buffer, Settings, SliceBatches
from ich_fastai.dicom import window
from ich_fastai.ingest import ingest
from ich_fastai.labels import LABELS, find_dataset
from ich_fastai.tiny import tiny_phantom

warnings.filterwarnings("ignore")


def make_cohort(scratch, n, size):
    "A cache of `n` slices and what the loaders need of a cohort; the labels do not matter."
    slices = ingest(
        copy_slices(find_dataset(tiny_phantom()).dicom_dir, scratch / "dicom", n), scratch / "cache", size=size
    )
    address = slices["shard"].astype("int64") * SHARD_ROWS + slices["row"].astype("int64")
    return pd.DataFrame({"SOPInstanceUID": slices["SOPInstanceUID"], "address": address}).assign(
        **dict.fromkeys(LABELS, 0)
    )


def write_pngs(cohort, cache_dir, folder):
    "Each slice as an 8-bit RGB PNG of three windows, what fastai users store."
    cache = Cache(cache_dir)
    for row in cohort.itertuples():
        hu = cache.gather(np.array(row.address))
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
    block = DataBlock(
        blocks=(ImageBlock, MultiCategoryBlock(encoded=True, vocab=list(LABELS))),
        get_x=lambda r: folder / f"{r['SOPInstanceUID']}.png",
        get_y=lambda r: r[list(LABELS)].to_list(),
        splitter=IndexSplitter([0]),
        batch_tfms=transforms,
    )
    return block.dataloaders(cohort, bs=64, num_workers=2, device=torch.device("cpu")).train


def cache_loader(cohort, cache_dir, size, *, augment):
    "This project's batches of the same slices."
    settings = Settings(image_size=size, neighbors=0, batch_size=64)
    return SliceBatches(cohort, cache_dir, settings, train=True, augment=Augment() if augment else None)


def gather_all(loader):
    "Every batch of an epoch as int16 HU in one reused buffer, in the order of training."
    size = loader.settings.image_size
    buffer = Buffer((loader.bs, 1, loader.cache.size, loader.cache.size), loader.device)
    for rows in loader.rows():
        yield buffer.read(loader.cache, loader.addresses[rows], size)


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


def gather_mapped(cache):
    "`gather` by a plain memory map a shard."
    maps = {}

    def gather(addresses, out):
        for pixels, address in zip(out, addresses, strict=True):
            number, row = divmod(int(address), SHARD_ROWS)
            if number not in maps:
                maps[number] = np.load(shard_paths(cache.folder, number)[0], mmap_mode="r")
            pixels[:] = maps[number][row]
        return out

    return gather


def in_batches(gather, addresses, out):
    "Batches, in one reused buffer."
    for start in range(0, len(addresses) - 63, 64):
        yield gather(addresses[start : start + 64], out)


def drop_pages(folder):
    "Take the shards out of the page cache, where nothing maps them any more."
    gc.collect()
    for path in folder.glob("*.npy"):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def count_fetched():
    "Bytes that this process has made the disk read."
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def compare_reads(scratch, n, size, rounds):
    "Cold and warm, both ways in turn."
    every, found = make_cohort(scratch, n, size)["address"].to_numpy(), {}
    out = np.empty((64, size, size), np.int16)
    for k in range(rounds):
        some = np.random.default_rng(k).permutation(every)[: max(64, n // 8)]
        for name in ("ours", "plain"):
            cache = gather = None
            drop_pages(scratch / "cache")
            cache = Cache(scratch / "cache")
            gather = cache.gather if name == "ours" else gather_mapped(cache)
            for state in ("cold", "warm"):  # warm: what was just fetched, several times
                before, times = count_fetched(), 1 if state == "cold" else 8
                speed = rate(batch for _ in range(times) for batch in in_batches(gather, some, out))
                fetched = (count_fetched() - before) / (len(some) * out[0].nbytes)
                found.setdefault((state, name), []).append((speed, fetched))
    for state in ("cold", "warm"):
        (a, ours), (b, plain) = (np.median(found[state, name], axis=0) for name in ("ours", "plain"))
        ratios = f"{a / b:5.1f} times; bytes fetched for each wanted {ours:.2f}, {plain:.2f}"
        print(f"{state}: {a:9,.0f} slices/s, plain memory maps {b:9,.0f}   {ratios}", flush=True)


def write_shards(folder, n, size=8):
    "A cache of `n` shards, all with the same slices."
    hu = np.random.default_rng(0).integers(-1000, 1000, (SHARD_ROWS, size, size), dtype=np.int16)
    save_settings(folder, size)
    save_shard(folder, 0, size, [(x, {"file": f"{k}.dcm"}) for k, x in enumerate(hu)])
    for number in range(1, n):
        for first, path in zip(shard_paths(folder, 0), shard_paths(folder, number), strict=True):
            shutil.copy(first, path)


def compare_shards(scratch, n, rounds, batch=192):
    "Milliseconds a batch where all shards can be open at once, and where they cannot."
    write_shards(scratch / "cache", n)
    for shards in (200, n):
        cache, rng = Cache(scratch / "cache"), np.random.default_rng(0)
        cache.gather(np.arange(shards) * SHARD_ROWS)  # each shard's table is read once
        times = []
        for _ in range(20 * rounds):
            addresses, start = rng.integers(shards * SHARD_ROWS, size=batch), time.perf_counter()
            cache.gather(addresses)
            times.append(1000 * (time.perf_counter() - start))
        print(f"{shards} shards: {statistics.median(times):.1f} ms a batch of {batch} slices", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", action="store_true", help="random reads, cold and warm")
    parser.add_argument("--shards", type=int, default=0, help="random places in so many shards")
    args = parser.parse_args()
    print(f"{args.rounds} rounds; {os.cpu_count()} cores,", torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.shards:
            return compare_shards(scratch, args.shards, args.rounds)
        print(f"{args.slices:,} slices at {args.size} px")
        if args.reads:
            return compare_reads(scratch, args.slices, args.size, args.rounds)
        cohort = make_cohort(scratch, args.slices, args.size)
        (scratch / "png").mkdir()
        write_pngs(cohort, scratch / "cache", scratch / "png")
        plain, augmented = (cache_loader(cohort, scratch / "cache", args.size, augment=a) for a in (False, True))
        png, png_augmented = (fastai_loader(cohort, scratch / "png", augment=a) for a in (False, True))
        torch.set_num_threads(1)
        one = [rate(gather_all(plain)) for _ in range(args.rounds + 1)][1:]
        print(
            f"{'HU batches gathered, one core':<42} {statistics.median(one):9,.0f} slices/s (wanted: 20,000)",
            flush=True,
        )
        torch.set_num_threads(os.cpu_count())
        compare("plain: HU batches against PNG", lambda: gather_all(plain), lambda: png, args.rounds, 50)
        compare("plain: three windows against PNG", lambda: plain, lambda: png, args.rounds, "-")
        compare("augmented: three windows against PNG", lambda: augmented, lambda: png_augmented, args.rounds, 5)


if __name__ == "__main__":
    main()
