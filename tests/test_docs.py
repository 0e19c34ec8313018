"""README and the pages of docs: every command and every piece of Python runs, or is parsed where it cannot run here."""

import ast
import contextlib
import logging
import re
import shlex
import subprocess
import warnings
from itertools import cycle, islice
from pathlib import Path

import fakes
import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from pl_patchcore import MemoryBankCallback, PatchCore
from pl_patchcore.cli import main
from pl_patchcore.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
# what two cores without a network cannot run: several processes, a whole data set, hundreds of megabytes
PARSED = ("benchmark", "trainer/ddp", "trainer/slurm", "differnet_train_filenames")
ELSEWHERE = "deploy"  # a page whose Python tests/extras runs, as it needs other packages
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of Lightning, about small data sets
    pytest.mark.slow,
]


def blocks(page, *languages):
    """Blocks of code of a page."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [body for _, language, body in found if language in languages]


def commands(page):
    """Words of each ``pl-patchcore`` of a page, in blocks and in the text."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "console", "bash")).replace("\\\n", " ").splitlines()
    inside = [
        " ".join(code.split())
        for code in re.findall(r"`(pl-patchcore [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]
    for line in [*lines, *inside]:
        words = shlex.split(line.strip().removeprefix("srun "), comments=True)
        if (
            words[:1] == ["pl-patchcore"]
            and words[1:2]
            and words[1] in COMMANDS
            and words[2:]
            and not any("help" in word for word in words)
        ):
            yield words[1:]


COMMAND_LINES = [(page, words) for page in PAGES for words in commands(page) if words[0] != "export"]
PYTHON = [(page, code) for page in PAGES for code in blocks(page, "python")]


def ids(pairs):
    return [f"{page.stem}-{number}" for number, (page, _) in enumerate(pairs)]


def picture(generator, defect=False):
    pixels = 120 + 30 * np.sin(np.arange(80) / 5)[:, None, None] + generator.normal(0, 8, (80, 96, 3))
    if defect:
        pixels[30:50, 40:60] = 240
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that the pages name, and weights where torchvision looks for what it has fetched."""
    folder = tmp_path_factory.mktemp("world")
    place, generator = folder / "path" / "to", np.random.default_rng(0)
    for name, number in (("nominal", 10), ("new", 3), ("defects", 2), ("five_more", 5), ("other_nominal", 6)):
        (place / name).mkdir(parents=True)
        for i in range(number):
            picture(generator, name == "defects" or (name == "new" and i == 0)).save(place / name / f"{i}.png")
    fakes.mtd(place / "mtd", nominal=5, per_defect=1)
    for name in ("good", "bad"):
        (folder / "parts" / "test" / name).mkdir(parents=True)
        picture(generator, name == "bad").save(folder / "parts" / "test" / name / "1.png")
    cache = folder / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    network = torchvision.models.wide_resnet50_2(weights=None)
    name = torchvision.models.Wide_ResNet50_2_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(network.state_dict(), cache / name)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        main(["fit", "--data.nominal", "path/to/nominal", *QUICK, "--trainer.default_root_dir", "fitted"])
    (made,) = (folder / "fitted").rglob("*.ckpt")
    made.rename(place / "the.ckpt")
    (made.parents[1] / "config.yaml").rename(place / "config.yaml")
    return folder


QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]


@pytest.fixture
def there(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("TORCH_HOME", str(world / "torch"))
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    return world


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES, ids=ids(COMMAND_LINES))
def test_command(page, words, there, capsys):
    if any(part in word for word in words for part in PARSED) or not re.search("path/to", " ".join(words)):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0
        return
    main([*words, *QUICK])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))

    def forward(self, images):
        return self.blocks(self.stem(images))


class MyModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def training_step(self, batch, batch_idx):
        return self.encoder(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class YourDataModule(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.rand(4, 3, 224, 224), batch_size=2)


@pytest.fixture
def names(there):
    """What the pages suppose to be there."""
    images, trainer = torch.rand(4, 3, 32, 32), L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    masks = torch.zeros(4, 32, 32, dtype=torch.uint8)
    masks[:, :8] = 1
    frame = np.asarray(Image.open("path/to/new/0.png"))
    return {
        "torchvision": torchvision, "DataLoader": DataLoader, "MemoryBankCallback": MemoryBankCallback, "L": L,
        "PatchCore": PatchCore, "MyModule": MyModule, "YourDataModule": YourDataModule, "my_module": MyModule(),
        "nominal_images": images, "images": torch.rand(2, 3, 224, 224), "batches": images.split(2), "trainer": trainer,
        "train_loader": DataLoader(images, batch_size=2), "maps": torch.rand(4, 32, 32), "masks": masks,
        "camera": list(islice(cycle([frame]), 2)), "model": PatchCore.load_from_checkpoint("path/to/the.ckpt"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.stem != ELSEWHERE], ids=lambda page: page.stem
)
def test_python(page, names):
    """The pieces of a page run one after the other, as a reader would run them."""
    for code in blocks(page, "python"):
        if re.search(r"\bmodel\.model\b|resize=None", code):
            names["images"] = torch.rand(2, 3, 32, 32)
        exec(compile(ast.parse(code), page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    """Shell parses, files and links that are named are there, lines of figures name their command."""
    text = page.read_text(encoding="utf-8")
    for code in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    for address in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert address.startswith("http") or (page.parent / address).exists(), address
    for name in re.findall(r"\b(?:tests|configs|notebooks|pl_patchcore)/[\w/.]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
