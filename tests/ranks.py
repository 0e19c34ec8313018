"""What the processes of `test_distributed` do: fit, test and predict, as one of several.

Most are copies of a process that has imported everything (`work`); launchers start this file as a script.
"""

import faulthandler
import itertools
import json
import os
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from pl_patchcore import FolderDataModule, MTDDataModule, PatchCore, SyntheticDataModule
from pl_patchcore.distributed import Processes
from pl_patchcore.report import PredictionWriter, TrainingImagesReport

SHARED = (Path(__file__).parents[1] / ".." / "shared").resolve()


class SomeTiles(MTDDataModule):
    def load_records(self):
        train, test = super().load_records()
        return train[:19], test[::30]


class Disturbed(PatchCore):
    """Fails or hangs on the way, as ``how`` says, when it has written its process's number into ``out``."""

    how, out = "", Path()

    def training_step(self, batch, number):
        if self.how == "fails" and self.global_rank == 1:
            raise RuntimeError("no second process today")
        if self.how == f"hangs collecting {self.global_rank}" and number > 1:
            self.hang()
        return super().training_step(batch, number)

    def hang(self):
        (self.out / "pid").write_text(str(os.getpid()))
        time.sleep(600)


def trainer_of(out, devices):
    machines = int(os.environ.get("MACHINES", 1))
    return L.Trainer(
        accelerator="cpu", devices=devices, num_nodes=machines, logger=False, default_root_dir=out, max_epochs=1,
        strategy="ddp" if devices * machines > 1 else "auto", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def model_and_data(own, images, batch):
    torch.manual_seed(0)
    if own == "tiles":
        weights = str(SHARED / "weights" / "mobilenet_v2.pth")
        model = Disturbed("mobilenet_v2", ["features.6", "features.13"], weights, resize=112, crop=None)
        return model, SomeTiles(SHARED / "data" / "mtd", batch_size=batch, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
    options = {"resize": 64, "crop": None, "coreset_ratio": 0.1, "projection_dim": 16, "layers": ["1", "3"]}
    options["calibration_share"] = 0.3 if images > 4 else 0.0
    if own in ("approximate", "random"):
        options["coreset_method"] = own
    if own == "leave one out":
        options |= {"calibration": "leave_one_out", "calibration_share": 0.0, "calibration_images": 9}
    if own == "drop suspicious":
        options |= {"calibration": "leave_one_out", "calibration_share": 0.0, "drop_suspicious": True}
    if own == "places":
        options |= {"position_radius": 1, "foreground": "brightness"}
    if own == "views":
        options |= {"calibration": "leave_one_out", "calibration_share": 0.0}
        options |= {"reference_rotations": 3, "reference_brightness": (0.8, 1.2)}
    if own == "ensemble":
        options["ensemble"] = {"members": [{"layers": ["1"]}, {"layers": ["3"]}]}
    data = SyntheticDataModule(
        batch_size=batch, num_workers=0, train_images=images, test_nominal=5, test_per_defect=2, image_size=96
    )
    return Disturbed(net, **options), data


def run(folder, name, devices, own, images, batch):
    """One case, whose results go to a folder of its name."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    (model, data), trainer = model_and_data(own, images, batch), trainer_of(out, devices)
    model.how, model.out = own, out
    if own.startswith("hangs selecting"):
        gather, rounds = Processes.gather_at_first, itertools.count()

        def hang_or_gather(self, tensor):
            if own == f"hangs selecting {self.rank}" and next(rounds) > 2:
                model.hang()
            return gather(self, tensor)

        Processes.gather_at_first = hang_or_gather
    loader = None
    if own in ("loader", "drop suspicious"):
        data.transform = model.transform
        data.setup("fit")
        pictures = torch.stack([data.train_set[i]["image"] for i in range(images)])
        if own == "drop suspicious":
            pictures[5, :, 20:40, 20:40] = torch.tensor([9.0, 0.0, -9.0])[:, None, None]
        loader = DataLoader(pictures, batch_size=batch)
        trainer.callbacks.append(TrainingImagesReport(2))
    trainer.fit(model, loader or data)
    assert [each.image for each in model.training_images if each.left_out] == [5] * (own == "drop suspicious")
    if own == "update":
        trainer = trainer_of(out, devices)
        more = SyntheticDataModule(batch_size=batch, num_workers=0, train_images=7, seed=1, image_size=96)
        model.update(trainer, more)
    tested = predicted = data
    if own == "few":  # images to test and to predict
        data.setup("test")
        few = [data.test_set[i] for i in (0, 6)]
        tested = DataLoader([(sample["image"], sample["label"], sample["mask"]) for sample in few], batch_size=batch)
        predicted = FolderDataModule(predict=folder.parent / "few", batch_size=batch, num_workers=0)
    trainer.test(model, tested, verbose=False)
    trainer.callbacks.append(PredictionWriter(maps=True))
    trainer.predict(model, predicted, return_predictions=False)
    if trainer.is_global_zero:
        state = {k: v for k, v in model.state_dict().items() if "patch_features" not in k}
        torch.save(state, out / "state.pt")
        saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[k], v) for k, v in state.items() if "features" in k)
        (out / "figures.json").write_text(json.dumps({"all": model.figures, "names": sorted(model.figures)}))


def work(arguments, environment, output):
    """As a script of these arguments and in this environment, in a session of its own; ``output`` is a file."""
    os.setsid()
    with Path(output).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    sys.argv = [__file__, *arguments]  # by which Lightning starts further ones
    main()


def main():
    faulthandler.dump_traceback_later(240)  # where it is, if it hangs
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    devices, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    for name, case in cases.items():
        run(folder, name, devices, *case)


if __name__ == "__main__":
    main()
