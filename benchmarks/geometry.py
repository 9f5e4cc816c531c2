"""One head in several fields of view and thicknesses: how far a study's probability of `any` moves, and why.

`python benchmarks/geometry.py MODEL [--heads 25] [--out FILE]`: heads with and without bleeding. Each is drawn once,
in points of 1 mm in planes 1.25 mm apart, with noise; all series are taken from these, as a scanner reconstructs one
scan several times, and read as ich-predict reads them. A head takes about 10 s; FILE keeps what is done.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from ich_fastai.bleeding import draw_bleed, draw_plane
from ich_fastai.geometry import find_geometry, stand_upright
from ich_fastai.head import draw_head, make_rng
from ich_fastai.labels import LOGITS, SUBTYPES
from ich_fastai.model import load_model
from ich_fastai.predict import score_stack, summarize_studies
from ich_fastai.series import look_at, stack_slices

POINTS, PLANES, STEP, LOW = 240, 104, 1.25, -60.0  # 1 mm apart; mm between planes; mm, the lowest
NOISE, SIZE = 8.0, 512  # HU in a plane, so 4 in a slice of 5 mm; px
USUAL, SIDE_BY_SIDE = "training's field", "5 mm, side by side"  # what others are compared with
TURNED = (0, -1, 0, -1, 0, 0)  # ImageOrientationPatient: turned by a quarter and mirrored
VIEWS: dict[str, dict] = {  # field, mm, 0 for the training's; off, mm from the middle; thick and every, planes
    USUAL: {},
    "field 180 mm": {"field": 180},
    "field 300 mm": {"field": 300},
    "field 500 mm": {"field": 500},
    "field 500 mm, head 20 mm off the middle": {"field": 500, "off": 20.3},
    "field 500 mm in 256 px": {"field": 500, "size": 256},
    "mirrored and turned": {"lies": TURNED},
    "other noise": {"seed": 2},
    "not touched: 0.6 mm off": {"off": 0.6},
    "not touched: 2.5 mm off": {"off": 2.5},
    "not touched: field 1% wider": {"zoom": 1.01},
    SIDE_BY_SIDE: {"every": 4},
    "1.25 mm, averaged": {"thick": 1, "every": 1},
    "10 mm": {"thick": 8},
}


def draw_planes(number):
    "(PLANES, POINTS, POINTS) float32 HU. Odd heads bleed, a kind after the other."
    rng = make_rng(1000 + number, 0)
    head, bleeds = draw_head(rng), [draw_bleed(rng, SUBTYPES[number // 2 % 5])] if number % 2 else []
    y, x = np.indices((POINTS, POINTS), np.float32) - np.float32(POINTS / 2 - 0.5)
    heights = (np.full_like(x, LOW + k * STEP) for k in range(PLANES))
    return np.stack([draw_plane(head, bleeds, x, y, z)[0] for z in heights])


def add_noise(planes, seed):
    "White noise, and both blurred a little, as by a kernel."
    noise = np.random.default_rng(seed).normal(0, NOISE, planes.shape)
    return np.stack([cv2.GaussianBlur(p, (0, 0), 0.5) for p in (planes + noise).astype(np.float32)])


def take_series(planes, center, field, off=0.0, size=SIZE, thick=4, every=8):
    "Slices, the means of `thick` planes, `every` planes apart, around `center`, mm from the top and left; their z, mm."
    first = range(0, PLANES - thick + 1, every)
    mm, (top, left) = field / size, (c - off - field / 2 - 0.5 for c in center)
    where = np.array([[mm, 0, left + mm / 2], [0, mm, top + mm / 2]])
    how = {"flags": cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, "borderValue": -1000.0}
    slices = [cv2.warpAffine(planes[k : k + thick].mean(0), where, (size, size), **how) for k in first]
    return slices, (np.array(first) + (thick - 1) / 2) * STEP


def score(model, slices, z, field, lies=()):
    "The study's probability of `any`, by the way of `predict_survey`."
    spacing = (field / len(slices[0]),) * 2
    slices = [np.rint(s.T[::-1, ::-1] if lies else s).astype(np.int16) for s in slices]

    def read(k):
        return stand_upright(slices[k], lies), spacing

    sight = look_at(read, len(z))
    stack = stack_slices(read, z, sight, model.card["cache_size"], find_geometry(model.card))
    logits = score_stack(model, stack, pd.Series(z).groupby(stack.slab).mean())[stack.slab]
    table = pd.DataFrame(logits, columns=LOGITS).assign(z_mm=z, StudyInstanceUID="s", error=None)
    return float(summarize_studies(table, model.card)["any"].iloc[0])


def measure(model, number):
    "p of `any` by view."
    clean, usual = draw_planes(number), find_geometry(model.card).field_mm[1]
    sight = look_at(lambda k: (clean[k], (1.0, 1.0)), PLANES)
    noisy, row = {seed: add_noise(clean, seed) for seed in (1, 2)}, {}
    for name, view in VIEWS.items():
        given = {k: v for k, v in view.items() if k not in ("field", "zoom", "lies", "seed")}
        field = view.get("field", usual) * view.get("zoom", 1.0)
        slices, z = take_series(noisy[view.get("seed", 1)], (sight.top, sight.left), field, **given)
        row[name] = score(model, slices, z, field, view.get("lies", ()))
    return row


def summarize(rows):
    "By bleeding and view, change of p: median, 95th percentile, largest, and the share of heads within .05."
    thin = [name for name in VIEWS if name.startswith("1.25")]
    moved = rows[list(VIEWS)].sub(rows[USUAL], axis=0)
    moved[[f"{name}, from {SIDE_BY_SIDE}" for name in thin]] = rows[thin].sub(rows[SIDE_BY_SIDE], axis=0)
    long = moved.drop(columns=USUAL).abs().assign(bleeds=rows["number"] % 2 == 1).melt("bleeds", var_name="view")
    groups = long.groupby(["bleeds", "view"], sort=False)["value"]
    table = groups.agg(heads="size", median="median", p95=lambda m: m.quantile(0.95), largest="max")
    return table.assign(within_05=groups.agg(lambda m: (m <= 0.05).mean())).round(3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--heads", type=int, default=25, help="with bleeding, and as many without")
    parser.add_argument("--out", default="", help="CSV of all rows; the heads in it are not drawn again")
    given = parser.parse_args()
    model, rows = load_model(given.model, "cpu"), []
    if given.out and Path(given.out).is_file():
        rows = pd.read_csv(given.out).to_dict("records")
    for number in range(len(rows), 2 * given.heads):
        rows.append({"number": number} | measure(model, number))
        print(f"head {number}", flush=True)
        if given.out:
            pd.DataFrame(rows).to_csv(given.out, index=False)
    print(summarize(pd.DataFrame(rows)).to_string())
