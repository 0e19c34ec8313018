"""A real result: Magnetic Tile Defects with pretrained MobileNetV2 features."""

from pathlib import Path

import pytest

from pl_patchcore import MTDDataModule, PatchCore

SHARED = Path(__file__).parents[1] / ".." / "shared"


class EveryThirdTestTile(MTDDataModule):
    def load_records(self):
        train, test = super().load_records()
        return train, test[::3]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "mtd").is_dir(), reason="needs ../shared (MTD and MobileNetV2 weights)")
def test_magnetic_tiles(trainer):
    root = SHARED / "data" / "mtd"
    data = EveryThirdTestTile(root, train_files=root / "differnet_train_filenames.txt", num_workers=0)
    model = PatchCore(
        "mobilenet_v2",
        layers=["features.6", "features.13"],
        weights=str(SHARED / "weights" / "mobilenet_v2.pth"),
        resize=224,
        crop=None,
        coreset_ratio=0.01,
    )
    runner = trainer(enable_checkpointing=False)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    assert model.memory_bank.size == 5966  # 1 % of 761 x 28 x 28
    assert model.figures["all"]["image_auroc"] > 0.90
    assert model.figures["all"]["lost"] == 1  # a speck that falls between the pixels of the resized mask
    for defect in ("blowhole", "break", "crack", "fray"):
        assert model.figures[defect]["pixel_auroc"] > 0.9, defect
