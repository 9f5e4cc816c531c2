"""Batches: nothing crosses the folds; the same seed gives the same batches, however many processes make them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ich_fastai.cache import Cache
from ich_fastai.tiny import tiny_cohort
from ich_fastai.batches import ALONE, Augment, Place, Settings, SliceBatches, epoch_order
from ich_fastai.batches import named_windows, resize_hu, slice_loaders, to_input
from ich_fastai.cohort import input_addresses, training_rows
from ich_fastai.core import InputError
from ich_fastai.labels import LABELS

WINDOWS = named_windows(["brain", "subdural"])
SETTINGS = Settings(image_size=48, windows=WINDOWS, batch_size=8)


@pytest.fixture(scope="module")
def run_dir():
    return tiny_cohort()


@pytest.fixture(scope="module")
def cohort(run_dir):
    return pd.read_parquet(run_dir / "cohort.parquet")


def batches(cohort, run_dir, *, train=True, augment=None, place=ALONE, **changes):
    settings = replace(SETTINGS, **changes)
    return SliceBatches(cohort, run_dir / "cache", settings, train=train, augment=augment, place=place)


def same(a, b):
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def plain_inputs(cohort, run_dir, size=48, neighbors=1):
    "What an untouched slice is to the network: read from the cache, resized, windowed."
    hu = Cache(run_dir / "cache").gather(input_addresses(cohort, neighbors))
    return to_input(resize_hu(torch.from_numpy(hu), size), WINDOWS)


def test_no_patient_is_in_two_folds_nor_in_training_and_validation(cohort, run_dir):
    patient = cohort.set_index("SOPInstanceUID")["PatientID"]
    assert cohort.groupby("PatientID")["fold"].nunique().eq(1).all()
    for fold in cohort["fold"].unique():
        dls = slice_loaders(cohort, run_dir / "cache", fold, SETTINGS)
        training, held_out = (set(patient[loader.ids]) for loader in (dls.train, dls.valid))
        assert training and held_out and not training & held_out
        neighbors = cohort.set_index("address").loc[np.unique(dls.train.addresses), "PatientID"]
        assert not set(neighbors) & held_out, "not by way of a neighbor either"


@pytest.mark.parametrize("balance", ["undersample", "none"])
def test_validation_is_the_whole_fold_in_the_natural_mix_and_untouched(cohort, run_dir, balance):
    for fold in (0, 1):
        held_out = cohort[cohort["fold"] == fold]
        assert not held_out["in_sample"].all(), "undersampling would show"
        settings = replace(SETTINGS, balance=balance)
        valid = slice_loaders(cohort, run_dir / "cache", fold, settings, augment=Augment(noise_hu=50)).valid
        x, y = (torch.cat(parts) for parts in zip(*valid, strict=True))
        assert valid.ids.tolist() == held_out["SOPInstanceUID"].tolist()
        assert torch.allclose(x, plain_inputs(held_out, run_dir), atol=1e-6)
        assert torch.equal(y, torch.tensor(held_out[list(LABELS)].to_numpy(np.float32)))


def test_training_slices_are_clean_of_the_other_folds_and_augmented(cohort, run_dir):
    rows, keep_rate = training_rows(cohort, 0, "undersample")
    clean = cohort[(cohort["fold"] != 0) & cohort["clean"]]
    assert set(rows["SOPInstanceUID"]) == set(clean.loc[clean["in_sample"], "SOPInstanceUID"])
    assert keep_rate == (rows["any"] == 0).sum() / (clean["any"] == 0).sum()
    assert training_rows(cohort, 0, "none")[0].equals(clean)
    train = slice_loaders(cohort, run_dir / "cache", 0, SETTINGS).train
    plain = plain_inputs(rows.iloc[train.rows()[0]], run_dir)
    assert ((train.one_batch()[0] - plain).abs().amax((1, 2, 3)) > 0.1).all()


def test_both_balances_show_as_many_slices(cohort, run_dir):
    both = (replace(SETTINGS, balance=balance) for balance in ("undersample", "none"))
    under, none = (slice_loaders(cohort, run_dir / "cache", 0, settings).train for settings in both)
    assert len(under) == len(none) and len(none.ids) > len(under.ids)


@pytest.mark.parametrize("neighbors, size", [(0, 48), (1, 300), (2, 33)])
def test_same_seed_same_batches(cohort, run_dir, neighbors, size):
    options = dict(neighbors=neighbors, image_size=size, augment=Augment())
    few = cohort.head(20)
    first = list(batches(few, run_dir, **options))
    assert same(first, batches(few, run_dir, **options))
    for changed in (batches(few, run_dir, seed=7, **options), batches(few, run_dir, **options)):
        changed.epoch = int(changed.settings.seed == 42)  # another seed; another epoch
        assert not same(first, changed)


def test_a_kept_batch_is_not_overwritten_by_the_next(cohort, run_dir):
    for train in (False, True):
        loader = batches(cohort.head(24), run_dir, train=train, image_size=Cache(run_dir / "cache").size)
        kept = list(loader)
        assert len(kept) == 3 and same(kept, ((x.clone(), y.clone()) for x, y in loader))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("train", [True, False])
def test_the_shares_of_processes_make_the_batches_of_one(cohort, run_dir, processes, train):
    few, augment = cohort.head(30), Augment() if train else None  # 30: the last batch of evaluation is not full
    whole = list(batches(few, run_dir, train=train, augment=augment))
    places = [Place(rank=rank, processes=processes) for rank in range(processes)]
    shares = [batches(few, run_dir, train=train, augment=augment, place=place) for place in places]
    for (x, y), *parts in zip(whole, *shares, strict=True):
        joined = [torch.stack(part, 1).flatten(0, 1)[: len(x)] for part in zip(*parts, strict=True)]  # the rest pads
        assert torch.allclose(joined[0], x, atol=1e-5) and torch.equal(joined[1], y)


def test_each_shuffle_shows_each_slice_once(cohort, run_dir):
    loader = batches(cohort.head(21), run_dir, epoch_size=16)
    shown = []
    for epoch in range(21):
        loader.epoch = epoch
        shown.append(np.concatenate(loader.rows()))
        assert np.array_equal(shown[-1], epoch_order(21, (2, 8), epoch, 42).ravel())
    shown = np.concatenate(shown).reshape(-1, 21)
    assert (np.sort(shown, axis=1) == np.arange(21)).all() and (shown[0] != shown[1]).any()


def test_neighbors_are_those_of_the_series_in_order(cohort, run_dir):
    series = cohort[cohort["SeriesInstanceUID"] == cohort["SeriesInstanceUID"].iloc[0]].sort_values("z_mm")
    own = series["address"].to_numpy()
    expected = own[np.clip(np.arange(len(own))[:, None] + np.arange(-2, 3), 0, len(own) - 1)]
    complete = series["position"].tolist() == list(range(len(series)))
    assert complete and (input_addresses(series, 2) == expected).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c, d: batches(c, d, neighbors=3), "neighbors=3: must be 0 to 2"),
        (lambda c, d: batches(c, d, batch_size=1), "batch_size=1: must be 2 to"),
        (lambda c, d: batches(c, d, lr=float("nan")), "lr=nan: must be 1e-09 to 1"),
        (lambda c, d: batches(c, d, epochs=0), "epochs=0: must be 1 to"),
        (lambda c, d: batches(c, d, balance="oversample"), "balance=oversample: must be undersample or none"),
        (lambda c, d: batches(c, d, class_weights="squared"), "class_weights=squared: must be inverse or none or"),
        (lambda c, d: batches(c, d, windows={"brain": (40, 0)}), "the width above 0"),
        (lambda c, d: SETTINGS.with_arm("undersample"), r"arm undersample: must be balance\+class_weights"),
        (lambda c, d: batches(c, d, place=Place(processes=3)), "must be a multiple of the 3 processes"),
        (lambda c, d: batches(c, d, place=Place(processes=8)), "multiple of the 8 processes, 2 for each"),
        (lambda c, d: named_windows(["brain", "liver"]), "must be a list, each once, of brain"),
        (lambda c, d: named_windows(["brain", "brain"]), "each once"),
        (lambda c, d: named_windows([]), "must be a list, each once, of brain"),
        (lambda c, d: training_rows(c.assign(fold=0), 0, "none"), "too few patients"),
    ],
)
def test_wrong_settings_and_rows_are_one_line(cohort, run_dir, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(cohort, run_dir)
    assert "\n" not in str(error.value)
