"""One head in several fields of view: how far a study's probability of `any` moves, and how much of that is noise.

`python benchmarks/geometry.py MODEL [--heads 25]`: heads with and without bleeding, each drawn once on a grid of
1.5 mm and resampled to fields of view of 180 to 500 mm (256 px each), mirrored, or turned; each brought into the
model's geometry as ich-predict does. The same with other noise in the same field of view, and without noise.
"""

import argparse

import cv2
import numpy as np
import pandas as pd

from ich_fastai.bleeding import draw_bleed
from ich_fastai.cache import resize_slice
from ich_fastai.exports import View, draw_view
from ich_fastai.geometry import find_geometry, fit_slice, measure_look, stand_upright
from ich_fastai.head import draw_head, make_rng
from ich_fastai.labels import LOGITS, SUBTYPES
from ich_fastai.model import load_model
from ich_fastai.predict import score_stack, summarize_studies
from ich_fastai.series import Stack

FINE = View(noise=0.0, field=501.0, size=334)  # 1.5 mm a pixel; the network's are 2.5 mm
SIZE, FIELDS = 256, (240, 180, 300, 500)  # px of every image; mm, the first is what the others are compared with
UPRIGHT, MIRRORED, TURNED = (1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), (0, 1, 0, -1, 0, 0)


def draw_series(head, bleeds):
    "A series without noise in the widest field, float32 HU."
    rng = make_rng(0, 0)
    return np.stack([draw_view(head, bleeds, FINE, k, rng) for k in range(FINE.n)])


def take_field(hu, mm):
    "The middle `mm` of the slices, on a grid of SIZE."
    scale, half = mm / SIZE / 1.5, (FINE.size - 1) / 2
    at = ((np.arange(SIZE) - (SIZE - 1) / 2) * scale + half).astype(np.float32)
    blurred = [cv2.blur(x, (2, 2), anchor=(0, 0)) if scale > 1.2 else x for x in hu]
    x, y = np.meshgrid(at - 0.5 * (scale > 1.2), at - 0.5 * (scale > 1.2))
    return np.stack([cv2.remap(b, x, y, cv2.INTER_LINEAR, borderValue=-1000.0) for b in blurred])


def score(model, clean, mm, lies, noise, seed):
    "The study's probability of `any`, with white noise of this standard deviation in each pixel."
    geometry, z = find_geometry(model.card), np.arange(FINE.n) * FINE.step
    hu = clean + np.random.default_rng(seed).normal(0, noise, clean.shape) if noise else clean
    spacing = (mm / SIZE,) * 2
    slices = [np.rint(stand_upright(x, lies)).astype(np.int16) for x in hu]
    seen = np.linspace(0.2 * len(z), 0.8 * len(z), 7).astype(int)
    boxes = np.array([look.box for look in (measure_look(slices[k], spacing) for k in seen) if look.is_head])
    x, y, right, bottom = boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, ::2].sum(1).max(), boxes[:, 1::2].sum(1).max()
    place = ((y + bottom) / 2, (x + right) / 2), float(max(right - x, bottom - y))
    ready = [fit_slice(s, spacing, *place, geometry)[0] for s in slices]
    stack = np.stack([resize_slice(np.ascontiguousarray(s), model.card["cache_size"]) for s in ready])
    logits = score_stack(model, Stack(stack, np.arange(len(z)), 1, {}, []), pd.Series(z))
    table = pd.DataFrame(logits, columns=LOGITS).assign(z_mm=z, StudyInstanceUID="s", error=None)
    return float(summarize_studies(table, model.card)["any"].iloc[0])


def measure(model, numbers, out=""):
    "A row per head, bleeding, view and noise: p of `any`. Odd heads bleed, a kind after the other. `out` grows."
    rows = []
    for k in numbers:
        rng, bleeds = make_rng(1000 + k, 0), k % 2
        head = draw_head(rng)
        fine = draw_series(head, [draw_bleed(rng, SUBTYPES[k // 2 % 5])] if bleeds else [])
        for mm in FIELDS:
            clean, views = take_field(fine, mm), {f"field {mm} mm": (UPRIGHT, 1)}
            if mm == FIELDS[0]:
                views |= {"mirrored": (MIRRORED, 1), "turned": (TURNED, 1), "other noise": (UPRIGHT, 2)}
            for name, (lies, seed) in views.items():
                seen = {UPRIGHT: clean, MIRRORED: clean[:, :, ::-1], TURNED: clean.swapaxes(1, 2)[:, ::-1]}[lies]
                for noise in (4.0,) if seed == 2 else (0.0, 4.0) if lies == UPRIGHT else (0.0,):
                    p = score(model, seen, mm, lies, noise, seed)
                    rows.append({"head": k, "bleeds": bleeds, "view": name, "noise": noise, "p": p})
        print(f"head {k}", flush=True)
        if out:
            pd.DataFrame(rows).to_csv(out, index=False)
    return pd.DataFrame(rows)


def summarize(rows):
    "By bleeding, noise and view: median and largest change of p, and the share of heads within .05."
    first = f"field {FIELDS[0]} mm"
    straight = rows[rows["view"] == first].set_index(["head", "noise"])["p"]
    there = straight.loc[list(zip(rows["head"], rows["noise"], strict=True))].to_numpy()
    groups = rows.assign(moved=(rows["p"] - there).abs()).query("view != @first").groupby(["bleeds", "noise", "view"])
    table = groups["moved"].agg(heads="size", median="median", largest="max")
    return table.assign(within_05=groups["moved"].agg(lambda m: (m <= 0.05).mean())).round(3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--heads", type=int, default=25, help="with bleeding, and as many without")
    parser.add_argument("--first", type=int, default=0, help="number of the first head")
    parser.add_argument("--out", default="", help="CSV of all rows")
    given = parser.parse_args()
    numbers = range(given.first, given.first + 2 * given.heads)
    print(summarize(measure(load_model(given.model, "cpu"), numbers, given.out)).to_string())
