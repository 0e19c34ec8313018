"""A memory bank dealt out to processes, each with images of its own, against the whole bank."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from pl_patchcore import MemoryBank, PatchCore, PatchCoreEnsemble, UserError
from pl_patchcore.distributed import Processes

SIZES = {"even": 64, "does not divide": 61, "fewer rows than processes": 2}


def bank_of(rows: int, dtype: str) -> MemoryBank:
    g = torch.Generator().manual_seed(rows)
    features = torch.randint(-2, 3, (rows, 6), generator=g).float()  # ties and equal rows
    bank = MemoryBank(dtype=dtype)
    bank.fill(features)
    return bank


def queries_of(rank: int, batch: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * rank + batch)
    return torch.randint(-2, 3, (3 + 2 * rank + batch, 6), generator=g).float()


def work(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    for rows in SIZES.values():
        for dtype in ("float32", "float16"):
            whole, bank = bank_of(rows, dtype), bank_of(rows, dtype)
            bank.share(Processes())
            assert len(bank) == rows
            assert len(bank.features) <= -(-rows // world)
            for batch in range(rank + 1):  # more batches on the later processes, which the earlier ones serve
                queries = queries_of(rank, batch)
                for k in (1, min(5, rows)):
                    distance, row = whole(queries, k)
                    found, found_row = bank(queries, k)
                    assert torch.equal(found, distance)
                    assert torch.equal(found_row, row)
                    assert torch.equal(bank.rows(found_row), whole.rows(row))
            bank.serve()
            bank.load_state_dict(whole.state_dict())
            assert len(bank.features) <= -(-rows // world)
            bank.unshare()
            assert torch.equal(bank.features, whole.features)
    torch.distributed.destroy_process_group()  # else gloo's threads may abort a process that ends
    Path(folder, f"done {rank}").touch()


@pytest.mark.parametrize("world", [2, 3])
def test_equals_the_whole_bank(world, tmp_path):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    assert len(list(tmp_path.glob("done*"))) == world


@pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")
def test_refused_where_it_cannot_be():
    options = {"backbone": "resnet18", "layers": ["layer2"], "weights": None, "shard_bank": True}
    with pytest.raises(UserError, match="shard_bank goes with exact search, got 'HNSW32'"):
        PatchCore(**options, search="HNSW32")
    with pytest.raises(UserError, match="single PatchCore"):
        PatchCoreEnsemble([{}], **options)
