import copy
import csv
import json
import logging
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import TinyBackbone
from torch.utils.data import DataLoader, IterableDataset

from pl_patchcore import PatchCore, SyntheticDataModule, UserError
from pl_patchcore.calibration import (
    Calibration,
    conformal_threshold,
    draw_held_out,
    images_needed,
    is_held_out,
    p_values,
    promised_rates,
)
from pl_patchcore.report import PredictionWriter, TestReport


@given(st.integers(1, 60), st.floats(0.001, 0.999))
def test_promised_rate_is_exact_whatever_the_scores(n, rate):
    """Of n + 1 images in random order the last is the new one: count the places where it is an alarm."""
    scores = torch.randperm(n + 1).double().exp()
    promised = promised_rates(n, rate)[0]
    alarms = sum(float(new) > conformal_threshold(scores[scores != new], rate) for new in scores)
    assert promised == pytest.approx(alarms / (n + 1))
    if n >= images_needed(rate):
        assert promised <= rate + 1e-9
        assert promised > rate - 1 / (n + 1) - 1e-9  # no more cautious than it must be
    else:
        assert promised == 1 / (n + 1) > rate


@pytest.mark.parametrize(("rate", "number"), [(0.05, 19), (0.01, 99), (0.5, 1), (0.3, 3), (0.001, 999)])
def test_images_needed(rate, number):
    assert images_needed(rate) == number
    assert promised_rates(number, rate)[0] <= rate + 1e-12
    if number > 1:
        assert promised_rates(number - 1, rate)[0] > rate


def test_p_values():
    calibration = torch.tensor([3.0, 1.0, 2.0, 2.0])
    found = p_values(torch.tensor([0.0, 1.0, 2.0, 2.5, 9.0]), calibration)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.4, 0.2])
    new = torch.tensor([5.0])
    assert (p_values(new, calibration) <= 0.2) == (new > conformal_threshold(calibration, 0.2))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_share_is_kept(share):
    for count in (40, 200):
        for seed in (0, 1):
            assert len(draw_held_out(count, share, seed)) == round(share * count)
            assert abs(sum(is_held_out(i, share, seed) for i in range(count)) - share * count) <= 1
    assert draw_held_out(40, share, 0) != draw_held_out(40, share, 1)
    assert len(draw_held_out(3, 0.05, 0)) == 1
    assert not draw_held_out(40, 0, 0)
    assert not draw_held_out(1, share, 0)  # which would leave nothing for the memory bank


def filled(n=4, rate=0.4):
    calibration = Calibration(rate)
    calibration.fill(torch.arange(1.0, n + 1), 10 * torch.arange(1.0, n + 1))
    return calibration


def thresholds(calibration, rate):
    calibration.false_alarm_rate = rate
    return calibration.image_threshold, calibration.pixel_threshold


def test_calibration_is_filled_and_cleared():
    calibration, scores = Calibration(), torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert thresholds(calibration, 0.5) == (None, None)
    calibration.fill(scores, scores * 2)
    assert (calibration.scores.dtype, calibration.scores.requires_grad) == (torch.float32, False)
    assert thresholds(calibration, 0.5) == (2.0, 4.0)
    assert thresholds(calibration, 0.25) == (3.0, 6.0)
    found = calibration.verdicts(torch.tensor([2.5, 4.5]))
    assert found["anomalous"].tolist() == [False, True]
    torch.testing.assert_close(found["normalized"], torch.tensor([2.5 / 3, 1.5]))
    assert torch.equal(found["p_value"], p_values(torch.tensor([2.5, 4.5]), calibration.scores))
    calibration.fill(calibration.scores, calibration.peaks)
    with torch.no_grad():
        scores.zero_()
    assert thresholds(calibration, 0.5) == (2.0, 4.0)  # of copies
    calibration.clear()
    assert thresholds(calibration, 0.5) == (None, None)
    assert calibration.verdicts(torch.tensor([2.5])) == {}


def test_thresholds_set_by_hand_come_before_calibrated_ones(caplog):
    """Of a plain model, too: copies and pickles keep them."""
    calibration = filled(4, 0.4)
    calibration.pixel_threshold = 7
    for each in (calibration, copy.deepcopy(calibration), pickle.loads(pickle.dumps(calibration))):
        assert thresholds(each, 0.2) == (4.0, 7.0)
        assert list(each.verdicts(torch.tensor([5.0]))) == ["anomalous", "normalized", "p_value"]
    with caplog.at_level(logging.INFO):
        calibration.tell()
    assert caplog.messages[-1] == "pixel_threshold is set by hand: 7."
    for name, value in (("image_threshold", 0), ("pixel_threshold", float("nan")), ("false_alarm_rate", 1), *(
        ("false_alarm_rate", value) for value in (0, True, "0.1", None))
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name} must be"):
            setattr(calibration, name, value)
    calibration.pixel_threshold = None
    assert (calibration.false_alarm_rate, *thresholds(calibration, 0.2)) == (0.2, 4.0, 40.0)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize("before", [0, 2, 9])
def test_calibration_of_any_size_loads(options, before):
    """As part of another module; by copies and pickles too, which keep their hook."""
    saved = torch.nn.ModuleDict({"inner": filled()}).state_dict()
    own = filled(before)
    for calibration in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        model = torch.nn.ModuleDict({"inner": calibration})
        model.load_state_dict(saved, **options)
        assert thresholds(calibration, 0.4) == (3.0, 30.0)
        assert calibration.scores.data_ptr() != saved["inner.scores"].data_ptr() or options.get("assign")
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.peaks"):
        model.load_state_dict({"inner.scores": saved["inner.scores"]})
    assert own.scores.shape == (4,)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_calibration_of_a_cast_model(kind):
    calibration = filled(19).to(kind)
    assert calibration.scores.dtype == kind
    assert thresholds(calibration, 0.1)[0] == 18.0
    scores = torch.tensor([0.5, 18.5, 30.0])
    assert torch.equal(calibration.verdicts(scores)["p_value"], p_values(scores, torch.arange(1.0, 20.0)))
    calibration.load_state_dict(filled(3).state_dict())
    assert calibration.scores.dtype == kind
    assert thresholds(calibration, 0.5)[1] == 20.0


def test_what_is_told(caplog):
    with caplog.at_level(logging.INFO):
        Calibration().tell()
        assert not caplog.records
        filled(19, 0.1).tell()
        assert caplog.messages == [
            "thresholds from 19 held-out nominal images: 18 for anomaly scores, 180 for anomaly maps; of new nominal "
            "images 10 % exceed each on average, and with 95 % confidence at most 23 %."
        ]
        updated = filled(3, 0.1)
        updated.keep(torch.ones(16), torch.ones(16))
        updated.tell("leave_one_out")
        assert "thresholds from 19 training images, each scored without its own rows of the memory bank" in caplog.text
        assert ", 16 of them scored before the update: " in caplog.text
        assert "of new nominal images approximately 10 % exceed each on average" in caplog.text
        filled(3, 0.01).tell()
    assert "false_alarm_rate 0.01 needs at least 99 held-out nominal images, there are 3" in caplog.messages[-1]
    assert "and promise 0.25" in caplog.messages[-1]


def data_of(**options):
    settings = {"image_size": 64, "train_images": 10, "test_nominal": 3, "test_per_defect": 1, "num_workers": 0}
    return SyntheticDataModule(**(settings | options))


def model_of(**options):
    settings = {"layers": ["fine", "coarse"], "resize": 48, "crop": None, "coreset_method": "none"}
    return PatchCore(TinyBackbone(), **(settings | options))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    import lightning as L

    folder = tmp_path_factory.mktemp("fit")
    model = model_of(calibration_share=0.3, false_alarm_rate=0.25)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, data_of())
    return model, trainer


def test_held_out_images_are_not_in_the_bank_and_set_the_thresholds(fitted):
    model, _ = fitted
    assert model.memory_bank.size == 7 * 144
    held_out = sorted(draw_held_out(10, 0.3, 0))
    images = torch.stack([model.transform(record.image()) for record in data_of().records[0]])
    scores, maps = model(images)
    assert [i for i in range(10) if scores[i] > 1e-4] == held_out  # the others find themselves in the bank
    torch.testing.assert_close(scores[held_out], model.model.calibration.scores)
    torch.testing.assert_close(maps[held_out].amax((1, 2)), model.model.calibration.peaks)
    assert model.image_threshold == model.model.calibration.scores.max().item()  # 3 images: 1 in 4
    assert model.pixel_threshold == model.model.calibration.peaks.max().item()


def test_checkpoint_keeps_thresholds_and_takes_another_rate(fitted):
    model, trainer = fitted
    path = trainer.checkpoint_callback.best_model_path
    loaded = PatchCore.load_from_checkpoint(path, backbone=TinyBackbone())
    assert loaded.image_threshold == model.image_threshold
    other = PatchCore.load_from_checkpoint(path, backbone=TinyBackbone(), false_alarm_rate=0.5)
    assert other.image_threshold == model.model.calibration.scores.median().item()


def test_too_few_images_are_said(caplog, trainer):
    model = model_of(calibration_share=0.3, false_alarm_rate=0.01)
    with caplog.at_level(logging.INFO):
        trainer(enable_checkpointing=False).fit(model, data_of())
    assert "false_alarm_rate 0.01 needs at least 99 held-out nominal images, there are 3" in caplog.text
    assert "and promise 0.25" in caplog.text
    assert "thresholds from 3 held-out nominal images" in caplog.text


def test_uncalibrated_model_has_no_thresholds(trainer):
    model, runner = model_of(), trainer()
    runner.fit(model, data_of())
    assert model.image_threshold is None
    assert model.pixel_threshold is None
    assert "anomalous" not in runner.predict(model, data_of())[0]


def test_predictions_and_report_use_them(fitted, trainer, tmp_path):
    model, _ = fitted
    runner = trainer(callbacks=[PredictionWriter(), TestReport(1)])
    runner.predict(model, data_of())
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    verdict = ["verdict", "anomalous", "threshold", "normalized", "p_value"]
    regions = ["regions", "left", "top", "right", "bottom", "area"]
    assert list(rows[0]) == ["path", "score", *verdict, *regions, "picture"]
    for row in rows:
        score = float(row["score"])
        assert row["anomalous"] == str(int(score > model.image_threshold))
        assert row["verdict"] == ("defect" if score > model.image_threshold else "ok")
        assert float(row["threshold"]) == pytest.approx(model.image_threshold, rel=1e-5)
        assert float(row["normalized"]) == pytest.approx(score / model.image_threshold, rel=1e-5)
        at_least = (model.model.calibration.scores >= score).sum().item()
        assert float(row["p_value"]) == pytest.approx((1 + at_least) / 4)
    assert {row["anomalous"] for row in rows} == {"0", "1"}
    runner.test(model, data_of(), verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["image_threshold"] == model.image_threshold
    assert metrics["pixel_threshold"] == model.pixel_threshold


def test_loader_of_unknown_length(trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.rand(12, 3, 48, 48, generator=torch.Generator().manual_seed(0)))

    model = model_of(calibration_share=0.25, false_alarm_rate=0.3)
    trainer(enable_checkpointing=False).fit(model, DataLoader(Stream(), batch_size=5))
    assert len(model.model.calibration.scores) == 3
    assert model.memory_bank.size == 9 * 144


def test_calibration_that_leaves_nothing(trainer):
    with pytest.raises(UserError, match="lower calibration_share"):
        trainer(enable_checkpointing=False).fit(model_of(calibration_share=0.9), data_of(train_images=2))


def test_a_threshold_of_0_is_refused():
    calibration = Calibration()
    calibration.fill(torch.zeros(4), torch.ones(4))
    with pytest.raises(UserError, match="the threshold is 0: held-out nominal images score 0"):
        calibration.tell()


def test_a_rate_that_needs_more_images_is_told_when_it_is_used(caplog):
    calibration = Calibration(0.2)
    calibration.fill(torch.arange(1.0, 6.0), torch.ones(5))
    calibration.tell_in_use()
    assert not caplog.text
    calibration.false_alarm_rate = 0.05
    calibration.tell_in_use()
    assert "false_alarm_rate 0.05 needs scores of 19 nominal images, there are 5" in caplog.text
    caplog.clear()
    calibration.image_threshold = 3.0
    calibration.tell_in_use()
    assert "needs scores" not in caplog.text
