"""Selection spread over processes: the rows, order and radii of one process."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch import distributed as dist

from pl_patchcore import UserError
from pl_patchcore.coreset import select_coreset
from pl_patchcore.coreset_shared import select_shared_coreset
from pl_patchcore.distributed import Processes


def cases() -> dict[str, tuple[Tensor, int, dict]]:
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(700, 6, generator=draw)
    lattice = torch.randint(0, 3, (600, 4), generator=draw).float()
    return {
        "normal": (normal, 90, {}),
        "all": (normal[:50], 50, {}),
        "one row": (normal[:1], 1, {}),
        "two rows": (normal[:2], 2, {}),
        "lattice": (lattice, 120, {}),
        "mass ties": (torch.randint(0, 3, (6000, 9), generator=torch.Generator().manual_seed(4)).float(), 300, {}),
        "constant": (torch.full((40, 3), 7.0), 9, {}),
        "duplicates": (normal[torch.randint(0, 40, (500,), generator=draw)], 60, {}),
        "huge": (normal * 1e30, 40, {}),
        "tiny": (normal * 1e-30, 40, {}),
        "offset": (normal + 1e5, 40, {}),
        "outlier": (torch.cat([normal, torch.full((1, 6), 1e4)]), 30, {}),
        "float64": (normal.double(), 40, {}),
        "crowd": (torch.randn(9000, 3, generator=draw), 700, {}),
        "settled": (torch.randn(30000, 4, generator=draw), 200, {}),  # more than a round settles
        "ties in thousands": (torch.randint(0, 3, (30000, 11), generator=draw).float(), 100, {}),
        "approximate": (normal, 40, {"method": "approximate", "seed": 5}),
        "random": (normal, 40, {"method": "random", "seed": 5}),
        "none": (normal, 40, {"method": "none"}),
    }


def shards(rows: int, processes: int, how: str) -> list[Tensor]:
    """Numbers of the rows that each process holds."""
    number = torch.arange(rows)
    if how == "dealt":
        return [number[rank::processes] for rank in range(processes)]
    if how == "blocks":
        return list(number.tensor_split(processes))
    return [number[:0]] + [number[rank :: processes - 1] for rank in range(processes - 1)]  # "one has none"


def work(rank: int, processes: int, folder: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    answers = {}
    for name, (features, size, options) in cases().items():
        for how in ("dealt", "blocks", "one has none"):
            own = shards(len(features), processes, how)[rank]
            told = Processes()
            rows, radii = select_shared_coreset(features[own], own, size, told, **options)
            answers[f"{name}, {how}"] = (rows, torch.empty(0) if radii is None else radii, told.collectives)
    features, size, _ = cases()["crowd"]
    own = shards(len(features), processes, "dealt")[rank]
    rows, radii = select_shared_coreset(features[own], own, size, Processes(), seconds=1e-9)
    answers["time"] = (rows, radii, 0)
    broken = torch.ones(4, 2)
    broken[0] = torch.nan if rank == 1 else 1.0
    with pytest.raises(UserError, match="NaN or infinity"):
        select_shared_coreset(broken, torch.arange(4) * processes + rank, 2, Processes())
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_equals_one_process(processes: int, tmp_path: Path) -> None:
    mp.spawn(work, (processes, str(tmp_path)), nprocs=processes)
    answers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for name, (features, size, options) in cases().items():
        rows, radii = select_coreset(features, size, **options)
        for how in ("dealt", "blocks", "one has none"):
            for answer in answers:
                found, found_radii, _ = answer[f"{name}, {how}"]
                assert found.tolist() == rows.tolist(), (name, how)
                assert torch.equal(found_radii, torch.empty(0) if radii is None else radii), (name, how)
    assert max(answer[f"crowd, {how}"][2] for answer in answers for how in ("dealt", "blocks")) < 300
    early, radii, _ = answers[0]["time"]
    assert all(torch.equal(early, answer["time"][0]) for answer in answers)
    features, size, _ = cases()["crowd"]
    full = select_coreset(features, size)
    assert 1 <= len(early) < size
    assert early.tolist() == full.rows[: len(early)].tolist()
    assert torch.equal(radii, full.radii[: len(radii)])


def test_alone() -> None:
    features, size, _ = cases()["normal"]
    rows, radii = select_shared_coreset(features, torch.arange(len(features)), size, Processes())
    expected = select_coreset(features, size)
    assert torch.equal(rows, expected.rows)
    assert torch.equal(radii, expected.radii)
