"""Growing and shrinking a bank, and what it covers."""

import logging
import re

import pytest
import torch
from networks import TinyBackbone
from torch.utils.data import DataLoader, TensorDataset

from pl_patchcore import PatchCore, UserError
from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.report import CoverageReport, PredictionWriter, draw_coverage


def images(number, seed):
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def loader(*parts):
    return DataLoader(TensorDataset(torch.cat(parts)), batch_size=4)


def model_of(**options):
    settings = {"layers": ["fine"], "resize": None, "crop": None, "coreset_ratio": 0.25}
    return PatchCore(TinyBackbone(), **(settings | options))


def fit(model, trainer, *parts):
    runner = trainer()
    runner.fit(model, loader(*parts))
    return runner.checkpoint_callback.best_model_path


def test_update_selects_from_the_bank_and_the_new_images(trainer):
    old, new = images(6, 0), images(5, 1)
    model = model_of()
    fit(model, trainer, old)
    bank = model.memory_bank.features.clone()
    model.update(trainer(), loader(new))
    rows = torch.cat([bank, model.patch_features(new).flatten(0, 2)])
    size = int(0.25 * 11 * 64)
    assert torch.equal(model.memory_bank.features, rows[greedy_coreset(rows, size)])
    assert model.memory_bank.seen.item() == 11 * 64
    assert len(model.coverage_radii) == size + 1


def test_update_keeps_to_a_fixed_size_and_knows_the_new_images(trainer):
    old, new = images(6, 0), images(5, 1) + 3
    model = model_of(coreset_size=40)
    fit(model, trainer, old)
    before = model.eval()(new)[0]
    model.update(trainer(), loader(new))
    assert model.memory_bank.size == 40
    assert (model.eval()(new)[0] < 0.7 * before).all()


def test_update_calibrates_on_the_old_and_the_new_held_out_images(trainer):
    model = model_of(calibration_share=0.5, false_alarm_rate=0.3)
    fit(model, trainer, images(6, 0))
    before = model.model.calibration.scores.clone()
    model.update(trainer(), loader(images(8, 1)))
    assert torch.equal(before, model.model.calibration.scores[:3])
    assert model.model.calibration.images.lt(0).tolist() == [True] * 3 + [False] * 4


def test_a_failed_update_leaves_the_model_as_it_was(trainer):
    model = model_of(calibration_share=0.5, false_alarm_rate=0.3)
    fit(model, trainer, images(6, 0))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Broken:
        def __iter__(self):
            return iter([images(2, 1), torch.nan * images(2, 1)])

    with pytest.raises(UserError, match="hold NaN or infinity"):
        model.update(trainer(), Broken())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.update(trainer(), loader(images(4, 1)))  # and it can go on
    with pytest.raises(UserError, match="the memory bank is empty"):
        model_of().update(trainer(), loader(images(2, 1)))


def test_a_fit_after_an_update_starts_clean(trainer):
    model, expected = model_of(), model_of()
    fit(model, trainer, images(6, 0))
    model.update(trainer(), loader(images(5, 1)))
    fit(model, trainer, images(4, 2))
    fit(expected, trainer, images(4, 2))
    assert torch.equal(model.memory_bank.features, expected.memory_bank.features)


def test_a_smaller_bank_is_the_beginning(trainer, caplog, tmp_path):
    model, small = model_of(calibration_share=0.5, false_alarm_rate=0.3), model_of(coreset_size=20)
    path = fit(model, trainer, images(6, 0))
    with caplog.at_level(logging.INFO):
        loaded = PatchCore.load_from_checkpoint(path, backbone=TinyBackbone(), coreset_size=20)
    assert torch.equal(loaded.memory_bank.features, model.memory_bank.features[:20])
    assert torch.equal(loaded.coverage_radii, model.coverage_radii[:21])
    assert loaded.image_threshold is None
    assert "thresholds were calibrated with the larger memory bank" in caplog.text
    tested = model_of(coreset_size=20, calibration_share=0.5)
    trainer(callbacks=[PredictionWriter()]).predict(tested, loader(images(4, 1)), ckpt_path=path)
    assert (tmp_path / "predictions.csv").read_text().splitlines()[0] == "path,score,picture"
    assert torch.equal(tested.memory_bank.features, loaded.memory_bank.features)
    path = fit(small, trainer, images(6, 0))
    bank = PatchCore.load_from_checkpoint(path, backbone=TinyBackbone(), coreset_size=90).memory_bank.features
    assert torch.equal(bank, small.memory_bank.features)


def test_a_random_bank_cannot_be_cut(trainer):
    path = fit(model_of(coreset_method="random"), trainer, images(6, 0))
    with pytest.raises(UserError, match="cannot cut down a bank selected by random"):
        PatchCore.load_from_checkpoint(path, backbone=TinyBackbone(), coreset_size=20)


@pytest.mark.parametrize("method", ["greedy", "approximate", "random", "none"])
def test_coverage_is_told(trainer, caplog, method):
    model, data = model_of(coreset_method=method), images(6, 0)
    with caplog.at_level(logging.INFO):
        fit(model, trainer, data)
    rows = model.patch_features(data).flatten(0, 2).double()
    gaps = torch.cdist(rows, model.memory_bank.features.double()).amin(1)
    mean, most = re.search(
        "patch features lie (.*) from the memory bank on average, (.*) at most", caplog.text
    ).groups()
    assert float(mean) == pytest.approx(gaps.mean().item(), rel=1e-3, abs=1e-6)
    assert float(most) == pytest.approx(gaps.max().item(), rel=1e-3, abs=1e-6)
    if method == "greedy":
        assert model.coverage_radii[-1].item() == pytest.approx(gaps.max().item(), rel=1e-5)


def test_coverage_picture(trainer, tmp_path, capsys):
    model = model_of()
    trainer(callbacks=[CoverageReport(draw=True)]).fit(model, loader(images(6, 0)))
    assert (tmp_path / "coverage.png").stat().st_size > 10_000
    assert model.selected is None
    trainer(callbacks=[CoverageReport(draw=True)]).fit(model_of(coreset_method="none"), loader(images(6, 0)))
    assert "No coverage.png" in capsys.readouterr().out
    draw_coverage(torch.rand(30, 1), torch.arange(5), tmp_path / "line.png")
    assert (tmp_path / "line.png").is_file()
