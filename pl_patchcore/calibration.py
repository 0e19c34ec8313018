"""Anomaly scores of nominal images -> thresholds, without a look at any defect.

A threshold is set by the false-alarm rate that the user accepts: split conformal prediction (Papadopoulos et al.
2002; Vovk et al. 2005). With n images kept out of the memory bank, the threshold is their k-th smallest score,
``k = n + 1 - l`` with ``l = floor((n + 1) * rate)``; a new nominal image, drawn as they were, then exceeds it with
probability ``l / (n + 1)``, whatever the distribution of scores (less where scores tie). Below ``1 / rate - 1``
images no score is high enough; the highest one then serves, and promises ``1 / (n + 1)``. That is the average over
draws of the n images; the rate of one draw follows Beta(l, n + 1 - l) (see `promised_rates`).

``leave_one_out`` scores each training image against the memory bank without its own rows, so that no image is lost.
The coreset is not selected again without the image, so neither the proof of the split nor the bound of the jackknife+
(Barber et al. 2021) holds: the same figures are then approximate, and `tests/benchmarks/bench_calibration.py` measures
how well they are kept. Near-copies of an image that stay in the bank make its score too low. What is left out is
therefore a group of images, and one image of each group, drawn at random, is scored: groups count as n.

For pixels the score of an image is the peak of its anomaly map: with the promised probability not one pixel of a
new nominal image lies above the threshold. `Calibration` holds the scores in the model; next: `metrics/`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pl_patchcore.anomaly_map import peaks
from pl_patchcore.counted import Counted
from pl_patchcore.data.batch import same_size_parts
from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

CalibrationKind = Literal["leave_one_out", "split", "images", "none"]
DEFAULT_RATE = 0.01  # false_alarm_rate where none is given
CONFIDENCE = 0.95  # that the second of `promised_rates` is not exceeded
SLACK = 1e-9  # so that 20 * 0.05 is 1
STREAM = 1  # of random numbers: a split of the data set by the same seed must not go along with this draw


def calibration_kind(kind: CalibrationKind | None, share: float, most: int, drop: bool = False) -> CalibrationKind:
    """``calibration`` of a `PatchCore`, or what stands for null.

    A `UserError` if ``calibration_share``, ``calibration_images`` or ``drop_suspicious`` is out of range, or they
    contradict each other.
    """
    if not 0 <= share < 1:
        raise UserError(f"calibration_share must be in [0, 1), got {share}.")
    kind = kind or ("split" if share else "none")
    if (kind == "split") != (share > 0):
        raise UserError(
            f"calibration_share goes with calibration split, got {share} with {kind}; set the share to 0 for another "
            "calibration, above 0 for split."
        )
    if most < 1:
        raise UserError(f"calibration_images must be at least 1, got {most}.")
    if drop and kind != "leave_one_out":
        raise UserError(f"drop_suspicious goes by the scores of calibration leave_one_out, got {kind}; set it to that.")
    return kind


def draw_held_out(number: int, share: float, seed: int) -> frozenset[int]:
    """Draw a ``share`` of all training images, in [0, 1), to be kept out of the memory bank.

    At least one, if the share is not 0; none of a single image.

    Example:
        >>> sorted(draw_held_out(10, 0.2, seed=0))
        [1, 9]
    """
    wanted = max(1, round(share * number)) if share and number > 1 else 0
    return frozenset(np.random.default_rng([seed, STREAM]).permutation(number)[:wanted].tolist())


def is_held_out(index: int, share: float, seed: int) -> bool:
    """Whether an image is held out, where the number of images is not known: one in every ``1 / share`` in a row.

    Example:
        >>> [i for i in range(12) if is_held_out(i, 0.25, seed=0)]
        [3, 6, 11]
    """
    if not share:
        return False
    block = int(index * share)
    first, last = math.ceil(block / share), math.ceil((block + 1) / share)
    return index == int(np.random.default_rng([seed, block]).integers(first, max(last, first + 1)))


def draw_one_of_each(groups: Mapping[int, int], seed: int, most: int | None = None) -> frozenset[int]:
    """Draw one image of each group, of at most ``most`` groups (None: all); ``groups`` names the group of each image.

    Example:
        >>> sorted(draw_one_of_each({0: 7, 1: 7, 2: 8}, seed=0))
        [0, 2]
    """
    draw = np.random.default_rng([seed, STREAM])
    of_group: dict[int, int] = {}
    for image in draw.permutation(sorted(groups)).tolist():
        of_group.setdefault(groups[image], image)
    return frozenset(draw.permutation(sorted(of_group.values()))[:most].tolist())


def conformal_threshold(scores: Tensor, rate: float) -> float:
    """Threshold that nominal scores exceed at a given rate (see `promised_rates`); scores above it are alarms.

    Args:
        scores: Scores of held-out nominal images, ``(n,)``, n at least 1.
        rate: False-alarm rate accepted, in (0, 1).

    Example:
        >>> conformal_threshold(torch.arange(1.0, 20.0), 0.1)  # 19 images: the 18th smallest
        18.0
    """
    return scores.sort().values[len(scores) - _alarms(len(scores), rate)].item()


def _alarms(n: int, rate: float) -> int:
    """Of n + 1 exchangeable scores, how many exceed the threshold."""
    return max(1, math.floor((n + 1) * rate + SLACK))


def promised_rates(n: int, rate: float) -> tuple[float, float]:
    """Share of new nominal images above `conformal_threshold`: on average, and not exceeded with 95 % confidence.

    The first is at most ``rate``, or ``1 / (n + 1)`` where that is more (see `images_needed`).

    Example:
        >>> [round(share, 3) for share in promised_rates(5, 0.05)]
        [0.167, 0.451]
    """
    from scipy.special import betaincinv  # takes a fifth of a second to import

    above = _alarms(n, rate)
    return above / (n + 1), float(betaincinv(above, n + 1 - above, CONFIDENCE))


def images_needed(rate: float) -> int:
    """Number of held-out images below which a false-alarm rate cannot be promised: 99 for 0.01."""
    return math.ceil(1 / rate - 1 - SLACK)


def p_values(scores: Tensor, held_out: Tensor) -> Tensor:
    """Share of the ``held_out`` images ``(n,)`` that score at least as high, the new image counted among them.

    Returns:
        float32 ``(B,)`` in [1 / (n + 1), 1]; of nominal images, at most a share p has a value of p or less.

    Example:
        >>> p_values(torch.tensor([0.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.2500])
    """
    kind = torch.promote_types(scores.dtype, held_out.dtype)
    at_least = len(held_out) - torch.searchsorted(held_out.sort().values.to(kind), scores.to(kind).contiguous())
    return (1 + at_least).float() / (1 + len(held_out))


class Calibration(nn.Module):
    """Scores of nominal images, saved with the model, and the thresholds that they or a person set; empty until `fill`.

    Casting a model casts them: thresholds are then rounded as its scores are. The false-alarm rate and thresholds set
    by hand are not in the state dict.

    Args:
        false_alarm_rate: Share of nominal images, in (0, 1), that may exceed the calibrated thresholds.
        image_threshold: Threshold for anomaly scores set by hand, above 0; None: the calibrated one.
        pixel_threshold: The same for anomaly maps.

    Attributes:
        scores: Anomaly scores, ``(n,)``, float32; of any n by ``load_state_dict``.
        peaks: Highest value of each image's anomaly map, ``(n,)``, float32.
        images: Index of each image in the data set that it was scored from, ``(n,)``, int32; -1 for a score that is
            older than the last update of the memory bank.
        by_hand: Thresholds set by hand, by name.

    Raises:
        UserError: For a value out of range, also when it is set later.

    Example:
        >>> calibration = Calibration(false_alarm_rate=0.5)
        >>> calibration.image_threshold
        >>> calibration.fill(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
        >>> calibration.image_threshold, calibration.pixel_threshold
        (2.0, 5.0)
    """

    scores: Tensor
    peaks: Tensor
    images: Tensor

    def __init__(
        self,
        false_alarm_rate: float = DEFAULT_RATE,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("scores", torch.empty(0, dtype=torch.float32))
        self.register_buffer("peaks", torch.empty(0, dtype=torch.float32))
        self.register_buffer("images", torch.empty(0, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_take_sizes)  # type: ignore[no-untyped-call]
        self.by_hand: dict[str, float] = {}
        self.false_alarm_rate = false_alarm_rate
        self.image_threshold, self.pixel_threshold = image_threshold, pixel_threshold

    def fill(self, scores: Tensor, peaks: Tensor, images: Tensor | None = None) -> None:
        """Take in the scores, the peaks of the maps and the indices of all images, ``(n,)`` each; None: 0 to n - 1."""
        device = self.scores.device
        self.scores, self.peaks = (each.detach().to(device, torch.float32, copy=True) for each in (scores, peaks))
        images = torch.arange(len(scores)) if images is None else images
        self.images = images.to(device, torch.int32, copy=True)

    def keep(self, scores: Tensor, peaks: Tensor) -> None:
        """Put scores and peaks that are older than the memory bank before those there are."""
        old, device = torch.full((len(scores),), -1), self.scores.device
        pairs = ((scores, self.scores), (peaks, self.peaks), (old, self.images))
        self.fill(*(torch.cat([before.to(device), own]) for before, own in pairs))

    def clear(self) -> None:
        """Forget them."""
        self.fill(self.scores[:0], self.peaks[:0])

    @torch.no_grad()
    def fill_from(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]], seed: int = 0, *, kept: bool = False
    ) -> None:
        """Score nominal images that are not in the memory bank, and take the scores in.

        Args:
            model: The fitted model, which gives scores ``(B,)`` and maps ``(B, H, W)`` of images.
            batches: Dicts with ``image (B, 3, H, W)``, normalised, ``index`` and ``group``, int64 ``(B,)``; where there
                is a ``label (B,)``, it must be 0.
            seed: Seed of the draw of one image of each group.
            kept: Whether scores that are there, older than the memory bank, are kept; else the new take their place.

        Raises:
            UserError: If an image is labelled anomalous, or there is none.
        """
        groups, found = dict[int, int](), dict[int, tuple[float, float]]()
        for batch in batches:
            if "label" in batch and (torch.as_tensor(batch["label"]) > 0).any():
                raise UserError("images that calibrate must be nominal, and one is labelled anomalous; leave it out.")
            for part in same_size_parts(batch):
                scores, maps = model(part["image"].to(self.scores.device), Counted.of(part, self.scores.device))
                index = part["index"].tolist()
                groups.update(zip(index, part["group"].tolist(), strict=True))
                found.update(zip(index, zip(scores.tolist(), peaks(maps).tolist(), strict=True), strict=True))
        if not found:
            raise UserError("there is no image to calibrate with; give a loader of nominal images.")
        drawn = sorted(draw_one_of_each(groups, seed))
        scores, highest = torch.tensor([found[image] for image in drawn], dtype=torch.float32).unbind(1)
        earlier = self.scores, self.peaks
        self.fill(scores, highest, torch.tensor(drawn))
        if kept:
            self.keep(*earlier)

    @property
    def false_alarm_rate(self) -> float:
        """Share of nominal images, in (0, 1), that may exceed thresholds; setting it moves those not set by hand."""
        return self._rate

    @false_alarm_rate.setter
    def false_alarm_rate(self, value: float) -> None:
        if not _lies_between(value, 0, 1):
            raise UserError(f"false_alarm_rate must be in (0, 1), got {value}.")
        self._rate = float(value)

    @property
    def image_threshold(self) -> float | None:
        """Score above which an image is anomalous; None where there is none.

        Set by hand, or the score that nominal images exceed at ``false_alarm_rate``; None brings the latter back.
        """
        return self._threshold("image_threshold", self.scores)

    @image_threshold.setter
    def image_threshold(self, value: float | None) -> None:
        self._set_by_hand("image_threshold", value)

    @property
    def pixel_threshold(self) -> float | None:
        """Value of an anomaly map above which a pixel is anomalous: as ``image_threshold``, of the maps' peaks."""
        return self._threshold("pixel_threshold", self.peaks)

    @pixel_threshold.setter
    def pixel_threshold(self, value: float | None) -> None:
        self._set_by_hand("pixel_threshold", value)

    def _threshold(self, name: str, nominal: Tensor) -> float | None:
        calibrated = conformal_threshold(nominal, self._rate) if len(nominal) else None
        return self.by_hand.get(name, calibrated)

    def _set_by_hand(self, name: str, value: float | None) -> None:
        if value is not None and not _lies_between(value, 0, math.inf):
            raise UserError(f"{name} must be a number above 0, got {value!r}; null takes the calibrated one.")
        self.by_hand.pop(name, None)
        if value is not None:
            self.by_hand[name] = float(value)

    def verdicts(self, scores: Tensor) -> dict[str, Tensor]:
        """What is known of anomaly scores ``(B,)`` by the threshold and the nominal images.

        Returns:
            With a threshold ``anomalous (B,)``, bool, whether the score is above it, and ``normalized (B,)``, the score
            in units of it; with scores of nominal images ``p_value (B,)``, see `p_values`.
        """
        found = {}
        if (threshold := self.image_threshold) is not None:
            found = {"anomalous": scores > threshold, "normalized": scores / threshold}
        return found | ({"p_value": p_values(scores, self.scores)} if len(self.scores) else {})

    def tell(self, kind: CalibrationKind = "split") -> None:
        """Log the thresholds, what they promise, and which are set by hand.

        Args:
            kind: Where the scores are from.

        Raises:
            UserError: If the calibrated threshold is 0, which no score can be compared to; with ``leave_one_out`` the
                scores are forgotten instead, with a warning.
        """
        try:
            self._tell_calibrated(kind)
        except UserError as error:
            if kind != "leave_one_out":
                raise
            self.clear()
            log.warning("no thresholds: %s", error)
        self._tell_by_hand()

    def tell_in_use(self) -> None:
        """Log which thresholds are set by hand, and whether too few scores make the other one the highest of them."""
        self._tell_by_hand()
        if "image_threshold" not in self.by_hand and 0 < (n := len(self.scores)) < images_needed(self._rate):
            log.warning(
                "false_alarm_rate %g needs scores of %d nominal images, there are %d: the threshold is the highest.",
                *(self._rate, images_needed(self._rate), n),
            )

    def _tell_by_hand(self) -> None:
        for name, value in self.by_hand.items():
            log.info("%s is set by hand: %g.", name, value)

    def _tell_calibrated(self, kind: CalibrationKind) -> None:
        n, rate = len(self.scores), self._rate
        if n == 0:
            return
        threshold, (expected, at_most) = conformal_threshold(self.scores, rate), promised_rates(n, rate)
        if threshold <= 0:
            raise UserError(
                f"the threshold is {threshold:g}: {_NAMES[kind]} score 0, as copies of training images do; give images "
                "that differ, or do without calibration."
            )
        earlier = f", {old} of them scored before the update" if (old := int((self.images < 0).sum())) else ""
        log.info(
            "thresholds from %d %s%s: %.4g for anomaly scores, %.4g for anomaly maps; of new nominal images %s%.2g %% "
            "exceed each on average, and with %.0f %% confidence at most %.2g %%.",
            *(n, _NAMES[kind], earlier, threshold, conformal_threshold(self.peaks, rate)),
            *("approximately " * (kind == "leave_one_out"), 100 * expected, 100 * CONFIDENCE, 100 * at_most),
        )
        if n < images_needed(rate):
            log.warning(
                "false_alarm_rate %g needs at least %d %s, there are %d: the thresholds are the highest of them, and "
                "promise %.3g; %stake more nominal images.",
                *(rate, images_needed(rate), _NAMES[kind], n, expected),
                "raise calibration_share or " * (kind == "split"),
            )


_NAMES: dict[CalibrationKind, str] = {  # what the scores are of
    "leave_one_out": "training images, each scored without its own rows of the memory bank",
    "split": "held-out nominal images",
    "images": "nominal images that are not in the memory bank",
    "none": "nominal images",
}


def _lies_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and low < float(value) < high


def _take_sizes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: give the buffers the sizes of those that were saved; older files do not tell the images."""
    if isinstance(scores := state_dict.get(prefix + "scores"), Tensor):
        state_dict.setdefault(prefix + "images", torch.full(scores.shape, -1, dtype=torch.int32))
    for name, buffer in module.named_buffers(recurse=False):
        if isinstance(saved := state_dict.get(prefix + name), Tensor):
            setattr(module, name, buffer.new_empty(saved.shape))
