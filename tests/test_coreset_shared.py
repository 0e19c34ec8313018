"""Selection spread over processes: the rows, order and radii of one process."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import forkserver
from torch import Tensor
from torch import distributed as dist

from pl_patchcore import UserError
from pl_patchcore.coreset import CoresetOptions, select_coreset
from pl_patchcore.coreset.collection import Collection
from pl_patchcore.coreset.shared import select_shared_coreset
from pl_patchcore.distributed import Processes
from pl_patchcore.options import StoreOptions

COUNTS = (2, 3, 4)  # processes
METHODS = ("greedy", "approximate", "random", "none")
SHARDS = ("dealt", "blocks", "one has none")


def cases() -> dict[str, tuple[Tensor, int, dict]]:
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(700, 6, generator=draw)
    return {
        "normal": (normal, 90, {}),
        "all": (normal[:50], 50, {}),
        "one row": (normal[:1], 1, {}),
        "two rows": (normal[:2], 2, {}),
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
        "approximate": (normal, 40, {"method": "approximate", "seed": 5}),
    }


def shard(rows: int, rank: int, count: int, how: str) -> Tensor:
    """Numbers of the rows that a process holds."""
    number = torch.arange(rows)
    if how == "dealt":
        return number[rank::count]
    if how == "blocks":
        return number.tensor_split(count)[rank]
    return number[rank - 1 :: count - 1] if rank else number[:0]


def collected(processes: Processes, method: str) -> dict[str, Tensor]:
    """What a collection of 10 images gives that has an earlier bank; of several processes, the first has no image."""
    features = torch.randn(10, 2, 3, 24, generator=torch.Generator().manual_seed(1))
    options = CoresetOptions(method, size=30, projection_dim=8, seed=4)
    collection = Collection(options, StoreOptions(), torch.device("cpu"), held_out=True)
    own = range(10)
    if processes.count > 1:
        own = range(processes.rank - 1, 10, processes.count - 1) if processes.rank else range(0)
    for index in reversed(own):
        collection.add(features[index].flatten(0, 1), index, 6, held_out=index in (1, 6))
    rows, radii = collection.select(torch.ones(2, 24), 7, processes)
    assert collection.total == 48
    assert {image.image for image in collection.held_out_images()} == {1, 6}.intersection(own)
    return {"rows": rows, "radii": torch.empty(0) if radii is None else radii, "sample": collection.sample()}


class Counted(Processes):
    rounds = 0

    def gather_at_first(self, tensor: Tensor) -> list[Tensor] | None:
        self.rounds += 1
        return super().gather_at_first(tensor)


def work(rank: int, folder: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    for count in range(rank + 1, 5):
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{count}", rank=rank, world_size=count)
            torch.save(answers_of(rank, count), f"{folder}/{count} {rank}.pt")
            dist.destroy_process_group()


def answers_of(rank: int, count: int) -> dict:
    answers = {}
    for place, (name, (features, size, options)) in enumerate(cases().items()):
        own = shard(len(features), rank, count, SHARDS[(place + count) % 3])
        told = Counted()
        rows, radii = select_shared_coreset(features[own], own, size, told, **options)
        answers[name] = (rows, torch.empty(0) if radii is None else radii, told.rounds)
    for method in METHODS:
        answers[f"collection {method}"] = collected(Processes(), method)
    broken = torch.ones(4, 2)
    broken[0] = torch.nan if rank == 1 else 1.0
    with pytest.raises(UserError, match="NaN or infinity"):
        select_shared_coreset(broken, torch.arange(4) * count + rank, 2, Processes())
    bounded = Collection(CoresetOptions(), StoreOptions(selection_memory=1.0), torch.device("cpu"))
    with pytest.raises(UserError, match=f"store.selection_memory .* of one process, there are {count}"):
        bounded.select(torch.empty(0, 0), 0, Processes())
    return answers


def test_several_processes_equal_one(tmp_path: Path) -> None:
    forkserver()
    mp.start_processes(work, (str(tmp_path),), nprocs=max(COUNTS), start_method="forkserver")
    answers = {n: [torch.load(tmp_path / f"{n} {rank}.pt", weights_only=True) for rank in range(n)] for n in COUNTS}
    every = [answer for count in COUNTS for answer in answers[count]]
    for name, (features, size, options) in cases().items():
        rows, radii = select_coreset(features, size, **options)
        for found, found_radii, rounds in (answer[name] for answer in every):
            assert torch.equal(found, rows), name
            assert torch.equal(found_radii, torch.empty(0) if radii is None else radii), name
            assert rounds < 100, name
    for method in METHODS:
        expected = collected(Processes(), method)
        for found in (answer[f"collection {method}"] for answer in every):
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_alone() -> None:
    features, size, _ = cases()["normal"]
    rows, radii = select_shared_coreset(features, torch.arange(len(features)), size, Processes())
    expected = select_coreset(features, size)
    assert torch.equal(rows, expected.rows)
    assert torch.equal(radii, expected.radii)
