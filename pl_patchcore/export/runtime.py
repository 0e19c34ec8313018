"""The whole way of an image as one graph: uint8 images -> anomaly scores, verdicts, p-values, anomaly maps.

A product proposes a few rows of the memory bank, and differences decide: exact, but slow for all patches. Of patches
with one neighbour the map needs the smallest distance only, which is a minimum over the product; rows are then looked
up for the worst patch of each image alone. A float32 product does not tell distances that are tiny beside the patch
features' lengths, of images with the very patches of the memory bank: for those there is ``look_up``. The neighbours
that equation 7 asks of each row are constants. Next: `onnx_file.py`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pl_patchcore.anomaly_map import top_mean
from pl_patchcore.calibration import Calibration
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.export.geometry import Frame, back_matrix, map_matrix
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.search.by_position import Places

PROPOSED = 4  # rows of the bank beside those wanted, that a product proposes
BLOCK = 4096  # rows whose neighbours are looked for at once


class Runtime(nn.Module):
    """A fitted model as a graph of images of one size or of any.

    Args:
        model: The fitted model, whose parts it uses.
        transform: Its preprocessing.
        look_up: Whether rows of the memory bank are looked up for all patches, by a float64 product.

    Attributes:
        frame: How images become the network's input.
        size: Height and width of the images that it takes; None: any.
        outputs: Names of what it returns.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: PatchCoreModel | EnsembleModel, transform: Preprocessing, look_up: bool = False) -> None:
        super().__init__()
        members, fixed = model.members, model.members[0].input_size.tolist()
        self.frame = Frame(transform)
        only = next((each.patch_features.only_size for each in members if each.patch_features.only_size), None)
        fixed_size = (fixed[0], fixed[1]) if any(fixed) else only
        self.size = self.frame.size or (fixed_size if self.frame.whole else None)
        size = transform.size or self.size
        self.members = nn.ModuleList(Member(each, size, look_up) for each in members)
        scale = model.scale.float() if isinstance(model, EnsembleModel) else torch.ones(1, dtype=torch.float32)
        self.scale: list[float] = scale.tolist()
        self.verdict = Verdict(model.calibration)
        self.outputs = ["score", *self.verdict.outputs, "anomaly_map"]
        for name, values in (("mean", transform.mean), ("std", transform.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    @property
    def multiple(self) -> int:
        """Pixels of which both sides of the network's input must be multiples."""
        return max(cast(Member, member).patch_features.multiple for member in self.members)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Score images.

        Args:
            image: RGB levels, uint8 ``(B, H, W, 3)``.

        Returns:
            As ``outputs`` names them: ``score`` float32 ``(B,)``; with a threshold ``anomalous`` bool ``(B,)``; with
            calibration ``p_value`` float32 ``(B,)``; ``anomaly_map`` float32 ``(B, H, W)``, NaN outside of the crop.
        """
        levels, axes = self.frame(image)
        pixels = (levels / 255 - self.mean) / self.std
        back = None if axes is None else [back_matrix(axis) for axis in axes]
        scores, maps = [], []
        for member, scale in zip(cast(list[Member], self.members), self.scale, strict=True):
            score, distances = member(pixels)
            down, across = member.matrices(pixels, distances)
            if back is not None:
                down, across = torch.matmul(back[0][0], down), torch.matmul(back[1][0], across)
            scores.append(score / scale)
            maps.append(torch.matmul(torch.matmul(down, distances), across.T) / scale)
        score, heat = (each[0] if len(each) == 1 else torch.stack(each).mean(0) for each in (scores, maps))
        if back is not None:
            inside = back[0][1][:, None] & back[1][1][None]
            heat = torch.where(inside, heat, torch.full((), torch.nan, dtype=torch.float32))
        return (score, *self.verdict(score), heat)


class Verdict(nn.Module):
    """Scores ``(B,)`` -> whether they are above the threshold, and p-values, as far as there are any."""

    scores: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.threshold, self.calibrated = calibration.image_threshold, len(calibration.scores) > 0
        self.outputs = ["anomalous"] * (self.threshold is not None) + ["p_value"] * self.calibrated
        self.register_buffer("scores", calibration.scores.float())

    def forward(self, scores: Tensor) -> list[Tensor]:
        """What ``outputs`` names, ``(B,)`` each."""
        found = [] if self.threshold is None else [scores > self.threshold]
        if self.calibrated:
            at_least = (scores[:, None] <= self.scores).sum(1)
            found.append((1 + at_least).float() / (1 + self.scores.shape[0]))
        return found


class Member(nn.Module):
    """One model's way from the network's input to scores and patch distances.

    Args:
        model: The fitted model.
        size: Height and width of the input; None: any.
        look_up: See `Runtime`.
    """

    rows: Tensor
    centre: Tensor
    halves: Tensor
    company: Tensor
    at: Tensor
    places: Tensor
    reach: Tensor
    down: Tensor
    across: Tensor

    def __init__(self, model: PatchCoreModel, size: tuple[int, int] | None, look_up: bool) -> None:
        super().__init__()
        self.patch_features, self.scorer, self.size = model.patch_features, model.scorer, size
        bank = model.memory_bank
        features = bank.features.double()
        centre = features.mean(0)
        self.k = min(model.scorer.num_neighbors, bank.size)
        self.look_up, self.product = look_up or self.k > 1, torch.float64 if look_up else torch.float32
        self.register_buffer("centre", centre.float())
        self.register_buffer("rows", (features - self.centre.double()).float())  # (M, D)
        self.register_buffer("halves", (self.rows.double().square().sum(1) / 2).to(self.product))  # (M,)
        b = min(model.scorer.reweighting_neighbors, bank.size)
        self.weighted = model.scorer.image_score == "max" and b > 1
        if self.weighted:
            blocks = tqdm(bank.features.split(BLOCK), "Neighbours of the memory bank's rows", delay=2, leave=False)
            self.register_buffer("company", torch.cat([bank(block.float(), b)[1] for block in blocks]).int())  # (M, b)
        self.by_position = bank.position_radius is not None
        if bank.position_radius is not None:  # the reach grows where it holds fewer than k rows
            height, width = bank.grid.tolist()
            at = Places.of_rows(1, 0, height, (height, width), torch.device("cpu")).at
            cells = [(place - bank.places).abs().amax(1) for place in at]  # (M,) each
            far = torch.stack([each.topk(self.k, largest=False).values[-1] for each in cells])
            self.register_buffer("at", at)
            self.register_buffer("places", bank.places.long())
            self.register_buffer("reach", far.clamp(min=bank.position_radius))
        if size is not None:
            with torch.inference_mode(False), torch.no_grad():
                grid = model.patch_features(torch.zeros(1, 3, *size)).shape[1:3]
                for name, pixels, cells in zip(("down", "across"), size, grid, strict=True):
                    self.register_buffer(name, map_matrix(pixels, cells, model.scorer.sigma).contiguous())

    def matrices(self, pixels: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """From distances ``(B, h, w)`` to a map of the input, down and across."""
        if self.size is not None:
            return self.down, self.across
        (height, width), (h, w) = pixels.shape[2:], distances.shape[1:]
        return map_matrix(height, h, self.scorer.sigma), map_matrix(width, w, self.scorer.sigma)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(B,)`` and patch distances ``(B, h, w)`` of normalised images ``(B, 3, H, W)``."""
        features = self.patch_features(pixels)
        batch, h, w, d = features.shape
        queries = features.reshape(batch * h * w, d) - self.centre
        costs = self.halves - F.linear(
            queries.to(self.product), self.rows.to(self.product)
        )  # (Q, M): half of (square - query's own square)
        if self.by_position:
            far = (self.at[:, None] - self.places).abs().amax(2) > self.reach[:, None]  # (h w, M)
            costs = torch.where(far, torch.inf, costs.reshape(batch, h * w, -1)).reshape(batch * h * w, -1)
        if self.look_up:
            distances = self.nearest(queries, costs)[0]
        else:
            squares = queries.square().sum(1) + 2 * costs.amin(1)
            distances = self.scorer.in_units(squares.clamp(min=0).sqrt())
        distances = distances.reshape(batch, h * w)
        if self.scorer.image_score == "top_mean":
            return top_mean(distances.reshape(batch, h, w), self.scorer.top_share), distances.reshape(batch, h, w)
        worst = torch.arange(batch) * (h * w) + distances.argmax(1)
        scores, own, row = self.nearest(queries[worst], costs[worst])
        if self.weighted:
            company = F.embedding(F.embedding(row, self.company), self.rows)  # (B, b, D)
            beside = torch.linalg.vector_norm(queries[worst][:, None] - company, dim=2)
            shares = torch.exp(beside - own[:, None]).sum(1)
            scores = scores * (1 - 1 / shares).clamp(0, 1)
        return scores, distances.reshape(batch, h, w)

    def nearest(self, queries: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances ``(Q,)`` as the score has them; Euclidean ones to the nearest row, and its number.

        Args:
            queries: Centred, ``(Q, D)``.
            costs: Of all rows, ``(Q, M)``.
        """
        count = min(self.k + PROPOSED, self.rows.shape[0])
        proposed = costs.topk(count, dim=1, largest=False).indices  # (Q, n)
        distance = torch.linalg.vector_norm(queries[:, None] - F.embedding(proposed, self.rows), dim=2)
        if self.by_position:  # of rows out of reach
            distance = torch.where(costs.gather(1, proposed).isinf(), torch.inf, distance)
        near, order = distance.topk(self.k, dim=1, largest=False)
        return self.scorer.in_units(near).mean(1), near[:, 0], proposed.gather(1, order[:, :1])[:, 0]
