"""The whole way of an image as one graph: uint8 images -> anomaly scores, verdicts, p-values, anomaly maps.

A product proposes a few rows of the memory bank, and differences decide: exact, but slow for all patches. Of patches
with one neighbour the map needs the smallest distance only, which is a minimum over the product; rows are then looked
up for the worst patch of each image alone. A float32 product does not tell distances that are tiny beside the patch
features' lengths, of images with the very patches of the memory bank: for those there is ``look_up``. The neighbours
that equation 7 asks of each row are constants. Next: `onnx_file.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pl_patchcore.anomaly_map import AnomalyScorer, continued, filled, smoothed, top_mean
from pl_patchcore.calibration import Calibration
from pl_patchcore.counted import Counted
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.export.geometry import Frame, back_matrix, map_matrix
from pl_patchcore.export.rows import FileDtype, Rows
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.search.by_position import Places

MapAt = Literal["image", "input"]
PROPOSED = 4  # rows of the bank beside those wanted, that a product proposes
BLOCK = 4096  # rows whose neighbours are looked for at once


class Runtime(nn.Module):
    """A fitted model as a graph of images of one size or of any.

    Args:
        model: The fitted model, whose parts it uses.
        frame: How images become the network's input.
        bank_dtype: Type that rows of the memory bank are kept in, see `rows.Rows`.
        map_at: Whether maps are on the pixels of the ``image``, or of the network's ``input``.
        look_up: Whether rows of the memory bank are looked up for all patches, by a float64 product.

    Attributes:
        size: Height and width of the images that it takes; None: any.
        outputs: Names of what it returns.
    """

    members: list[Member]
    mean: Tensor
    std: Tensor
    pixels: Tensor
    nearest: Tensor

    def __init__(
        self,
        model: PatchCoreModel | EnsembleModel,
        frame: Frame,
        bank_dtype: FileDtype = "float32",
        map_at: MapAt = "image",
        look_up: bool = False,
    ) -> None:
        super().__init__()
        members, fixed, transform = model.members, model.members[0].input_size.tolist(), frame.transform
        self.frame, self.map_at = frame, map_at
        only = next((each.patch_features.only_size for each in members if each.patch_features.only_size), None)
        fixed_size = (fixed[0], fixed[1]) if any(fixed) else only
        self.size = frame.size or (fixed_size if frame.whole else None)
        size = transform.size or self.size
        if frame.known is not None:
            size = (frame.known[0].count, frame.known[1].count)
        parts: Any = nn.ModuleList(Member(each, size, frame.counted, bank_dtype, look_up) for each in members)
        self.members = parts
        self.scale: list[float] = model.scale.float().tolist() if isinstance(model, EnsembleModel) else [1.0]
        self.verdict = Verdict(model.calibration)
        self.outputs = ["score", *self.verdict.outputs, "anomaly_map"]
        for name, values in (("mean", transform.mean), ("std", transform.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])
        marks = [member.counts for member in self.members if member.counts is not None]
        self.partly = bool(marks)
        if marks:
            pixels = torch.stack([each.pixels for each in marks]).all(0)
            places = torch.arange(pixels.numel(), dtype=torch.float64).view(pixels.shape)
            self.register_buffer("pixels", pixels)
            self.register_buffer("nearest", filled(places.masked_fill(~pixels, torch.nan)).flatten().long())

    def size_beyond(self, size: tuple[int, int]) -> tuple[int, int]:
        """At least this height and width more than the crop, and multiples of what the networks' inputs must be."""
        step = max(member.patch_features.multiple for member in self.members)
        least = self.frame.transform.size or (0, 0)
        height, width = (-(-(side + low) // step) * step for side, low in zip(size, least, strict=True))
        return height, width

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Score images.

        Args:
            image: RGB levels, uint8 ``(B, H, W, 3)``.

        Returns:
            In the order of ``outputs``: ``score`` float32 ``(B,)``; with a threshold ``anomalous`` bool ``(B,)``; with
            calibration ``p_value`` float32 ``(B,)``; ``anomaly_map`` float32 ``(B, H, W)``, NaN where a pixel does not
            count.
        """
        levels, axes = self.frame(image)
        pixels = (levels / 255 - self.mean) / self.std
        back = None if axes is None or self.map_at == "input" else [back_matrix(axis) for axis in axes]
        ways = None if back is None or self.partly else (back[0][0], back[1][0])
        scores, maps = [], []
        for member, scale in zip(self.members, self.scale, strict=True):
            score, distances = member(pixels)
            scores.append(score / scale)
            maps.append(member.map(distances, pixels, ways) / scale)
        score, heat = (each[0] if len(each) == 1 else torch.stack(each).mean(0) for each in (scores, maps))
        return {"score": score, **self.verdict(score), "anomaly_map": self.placed(heat, back)}

    def placed(self, heat: Tensor, back: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """Bring maps to where they are asked for, and leave out what does not count."""
        inside = None
        if back is not None:
            (down, rows), (across, columns) = back
            inside = rows[:, None] & columns[None]
            if self.partly:
                heat = heat.flatten(1).index_select(1, self.nearest).reshape(heat.shape)
                heat = down @ heat @ across.T
            if self.frame.region is not None:
                inside = inside & self.frame.region
        elif self.partly:
            inside = self.pixels
        return heat if inside is None else torch.where(inside, heat, torch.full((), torch.nan, dtype=torch.float32))


class Verdict(nn.Module):
    """Scores ``(B,)`` -> whether they are above the threshold, and p-values, as far as there are any."""

    scores: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.threshold, self.calibrated = calibration.image_threshold, len(calibration.scores) > 0
        self.outputs = ["anomalous"] * (self.threshold is not None) + ["p_value"] * self.calibrated
        self.register_buffer("scores", calibration.scores.float())

    def forward(self, scores: Tensor) -> dict[str, Tensor]:
        """What ``outputs`` names, ``(B,)`` each."""
        found = {} if self.threshold is None else {"anomalous": scores > self.threshold}
        if self.calibrated:
            at_least = (scores[:, None] <= self.scores).sum(1)
            found["p_value"] = (1 + at_least).float() / (1 + self.scores.shape[0])
        return found


class Member(nn.Module):
    """One model's way from the network's input to scores, patch distances and maps.

    Args:
        model: The fitted model.
        size: Height and width of the input; None: any.
        counted: Which places of an image count; None: all.
        bank_dtype, look_up: See `Runtime`.
    """

    halves: Tensor
    company: Tensor
    at: Tensor
    places: Tensor
    reach: Tensor
    down: Tensor
    across: Tensor

    def __init__(
        self,
        model: PatchCoreModel,
        size: tuple[int, int] | None,
        counted: Counted | None,
        bank_dtype: FileDtype,
        look_up: bool,
    ) -> None:
        super().__init__()
        self.patch_features, self.scorer, self.size = model.patch_features, model.scorer, size
        bank = model.memory_bank
        self.k = min(model.scorer.num_neighbors, bank.size)
        self.look_up, self.product = look_up or self.k > 1, torch.float64 if look_up else torch.float32
        self.rows = Rows(bank.features, bank_dtype)
        centred = self.rows().double()
        self.register_buffer("halves", (centred.square().sum(1) / 2).to(self.product))  # (M,)
        b = min(model.scorer.reweighting_neighbors, bank.size)
        self.weighted = model.scorer.image_score == "max" and b > 1
        if self.weighted:
            blocks = tqdm(bank.features.split(BLOCK), "Neighbours of the memory bank's rows", delay=2, leave=False)
            self.register_buffer("company", torch.cat([bank(block.float(), b)[1] for block in blocks]).int())  # (M, b)
        self.by_position = bank.position_radius is not None
        if bank.position_radius is not None:  # the reach grows where it holds fewer than k rows
            high, wide = bank.grid.tolist()
            at = Places.of_rows(1, 0, high, (high, wide), torch.device("cpu")).at
            apart = [(place - bank.places).abs().amax(1) for place in at]  # (M,) each
            far = torch.stack([each.topk(self.k, largest=False).values[-1] for each in apart])
            self.register_buffer("at", at)
            self.register_buffer("places", bank.places.long())
            self.register_buffer("reach", far.clamp(min=bank.position_radius))
        self.counts: Counts | None = None
        if size is not None:
            with torch.inference_mode(False), torch.no_grad():
                bands = list(model.patch_features.bands(torch.zeros(1, 3, *size)))
                patches = bands[0].rows, bands[0].features.shape[2]
                sigma = self.scorer.sigma if counted is None else 0.0  # else pixels are left out before the Gaussian
                for name, pixels, cells in zip(("down", "across"), size, patches, strict=True):
                    self.register_buffer(name, map_matrix(pixels, cells, sigma).contiguous())
                if counted is not None:
                    self.counts = Counts(model.scorer, counted, patches, size)

    def map(self, distances: Tensor, pixels: Tensor, back: tuple[Tensor, Tensor] | None) -> Tensor:
        """Anomaly maps of patch distances ``(B, h, w)``, on the input or, by the matrices ``back``, on the image."""
        if self.size is not None:
            down, across = self.down, self.across
        else:
            (height, width), (h, w) = pixels.shape[2:], distances.shape[1:]
            down, across = map_matrix(height, h, self.scorer.sigma), map_matrix(width, w, self.scorer.sigma)
        if self.counts is not None:
            return self.counts.smoothed(down @ self.counts.continued(distances) @ across.T)
        if back is not None:
            down, across = back[0] @ down, back[1] @ across
        return down @ distances @ across.T

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(B,)`` and patch distances ``(B, h, w)`` of normalised images ``(B, 3, H, W)``."""
        rows = self.rows().to(self.product)
        images = torch.arange(pixels.shape[0])
        parts, worst = list[Tensor](), list[tuple[Tensor, Tensor, Tensor]]()  # of each band; distance, patch, cell
        for features, top, _ in self.patch_features.bands(pixels):
            batch, h, w, d = features.shape
            queries = features.reshape(batch, h * w, d) - self.rows.centre
            distances = self.compared(queries, rows, torch.arange(top * w, (top + h) * w)).reshape(batch, h, w)
            if self.counts is not None:
                distances = self.counts.marked(distances, top)
            patch = distances.flatten(1).argmax(1)
            parts.append(distances)
            worst.append((distances.flatten(1).amax(1), queries[images, patch], patch + top * w))
        distances = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self.scorer.image_score == "top_mean":
            taken = distances if self.scorer.top_share_of == "scored" else distances.clamp(min=0)
            return top_mean(taken, self.scorer.top_share), distances
        _, query, cell = worst[0]
        if len(worst) > 1:
            highest, patches, cells = (torch.stack(each) for each in zip(*worst, strict=True))
            best = highest.argmax(0)
            query, cell = patches[best, images], cells[best, images]
        scores, own, row = self.nearest(query, self.costs(query, rows, cell))
        if self.weighted:
            company = self.rows.taken(F.embedding(row, self.company))  # (B, b, D)
            beside = torch.linalg.vector_norm(query[:, None] - company, dim=2)
            shares = torch.exp(beside - own[:, None]).sum(1)
            scores = scores * (1 - 1 / shares).clamp(0, 1)
        return scores, distances

    def costs(self, queries: Tensor, rows: Tensor, cells: Tensor) -> Tensor:
        """Half of (squared distance - query's own square) to each row, infinite out of reach: ``(..., Q, M)``.

        Args:
            queries: Centred, ``(..., Q, D)``.
            rows: Likewise, ``(M, D)``.
            cells: Number of each query's place on the grid, ``(Q,)``.
        """
        flat = queries.reshape(-1, queries.shape[-1])  # a product of two matrices, or the file holds the rows twice
        costs = (self.halves - F.linear(flat.to(self.product), rows)).reshape(*queries.shape[:-1], -1)
        if self.by_position:
            far = (self.at[cells][:, None] - self.places).abs().amax(2) > self.reach[cells][:, None]  # (Q, M)
            costs = torch.where(far, torch.inf, costs)
        return costs

    def compared(self, queries: Tensor, rows: Tensor, cells: Tensor) -> Tensor:
        """Distances ``(B Q,)``, as the score has them, of queries ``(B, Q, D)``; see `costs`."""
        costs = self.costs(queries, rows, cells)
        if self.look_up:
            return self.nearest(queries.flatten(0, 1), costs.flatten(0, 1))[0]
        squares = queries.square().sum(2) + 2 * costs.amin(2)
        return self.scorer.in_units(squares.clamp(min=0).sqrt())

    def nearest(self, queries: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances ``(Q,)`` as the score has them; Euclidean ones to the nearest row, and its number.

        Args:
            queries: Centred, ``(Q, D)``.
            costs: Of all rows, ``(Q, M)``.
        """
        count = min(self.k + PROPOSED, self.rows.number)
        proposed = costs.topk(count, dim=1, largest=False).indices  # (Q, n)
        distance = torch.linalg.vector_norm(queries[:, None] - self.rows.taken(proposed), dim=2)
        if self.by_position:  # of rows out of reach
            distance = torch.where(costs.gather(1, proposed).isinf(), torch.inf, distance)
        near, order = distance.topk(self.k, dim=1, largest=False)
        return self.scorer.in_units(near).mean(1), near[:, 0], proposed.gather(1, order[:, :1])[:, 0]


class Counts(nn.Module):
    """Which places count of images of one size, as constants; repeats what `AnomalyScorer` does with `Counted`.

    Args:
        scorer: The model's.
        counted: Which places of an image count.
        grid: Patches down and across.
        size: Height and width of the input.

    Attributes:
        pixels: Which pixels of the input count, bool ``(H, W)``.
    """

    compared: Tensor
    others: Tensor
    source: Tensor
    pixels: Tensor
    share: Tensor

    def __init__(self, scorer: AnomalyScorer, counted: Counted, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        compared, valid = (each[0] for each in scorer.inside(counted, *grid))
        pixels = (counted.whole() if scorer.top_share_of == "all" else counted).at(*size)[0]
        places = torch.arange(valid.numel(), dtype=torch.float64).view(1, *grid)
        self.register_buffer("compared", compared)
        self.register_buffer("others", torch.zeros(grid, dtype=torch.float32).masked_fill(~valid, -torch.inf))
        self.register_buffer("source", continued(places, valid[None]).flatten().long())
        self.register_buffer("pixels", pixels)
        self.register_buffer("share", smoothed(pixels[None].float(), scorer.sigma)[0])
        self.sigma = scorer.sigma

    def marked(self, distances: Tensor, top: int) -> Tensor:
        """Distances ``(B, h', w)`` of rows from ``top`` on: 0 or -inf where a patch does not count."""
        rows = slice(top, top + distances.shape[1])
        return torch.where(self.compared[rows], distances, self.others[rows])

    def continued(self, distances: Tensor) -> Tensor:
        """Distances ``(B, h, w)``, of the nearest patch that counts where one does not."""
        return distances.flatten(1).index_select(1, self.source).reshape(distances.shape)

    def smoothed(self, maps: Tensor) -> Tensor:
        """Smooth maps ``(B, H, W)``, weighing the pixels that count alone; the others are left 0."""
        maps = smoothed(maps * self.pixels, self.sigma) / self.share
        return torch.where(self.pixels, maps, torch.zeros((), dtype=torch.float32))
