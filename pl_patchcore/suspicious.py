"""Leave-one-out scores of the training images -> those that stand out, which may be defective.

A training image is scored against the memory bank without its own rows (`calibration.py`), so a defect that no other
image shows scores as high as it would in a test. Defects of one kind cover each other. An image stands out where its
score is more than `DEVIATIONS` scaled median absolute deviations above the median (Iglewicz and Hoaglin 1993), neither
of which moves much while most images are nominal.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pl_patchcore.distributed import on_first_process

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

# An anomaly score is the largest of many distances. Where such scores follow the law of largest values (Gumbel), 3.5
# names one nominal image in 80. 5 would name one in 400, and miss half of the defective magnetic tiles that 3.5 finds.
DEVIATIONS = 3.5
SCALE = 1.4826  # of the median absolute deviation, to the standard deviation of a normal distribution
LEAST = 10  # scores below which their spread is not known well enough
MOST_LEFT_OUT = 0.1  # share of the images
NAMED = 10  # in the log, at most


class TrainingImage(NamedTuple):
    """A training image that was scored without its own rows of the memory bank.

    Attributes:
        image: Its index in the data set.
        name: Its file, where batches have an entry ``path``; else its index.
        score: Its anomaly score, with the other images that stand out still in the memory bank.
        stands_out: Whether the score stands out.
        left_out: Whether the image was left out of the memory bank for it.
        group: Number of its group in `MemoryBank.images`; None where it was left out.
    """

    image: int
    name: str
    score: float
    stands_out: bool
    left_out: bool
    group: int | None


def stands_out_above(scores: Sequence[float]) -> float | None:
    """Score above which an image stands out; None of fewer than 10 scores, or where most are equal.

    Args:
        scores: Leave-one-out scores of the training images, ``(n,)``.

    Example:
        >>> stands_out_above([*range(10, 20), 90])  # the median is 15, the median absolute deviation 3
        30.5673
        >>> stands_out_above([1.0, 2.0, 90.0])
    """
    if len(scores) < LEAST:
        return None
    median = float(np.median(scores))
    deviation = float(np.median(np.abs(np.subtract(scores, median))))
    return median + DEVIATIONS * SCALE * deviation if deviation else None


def worst_groups(suspects: Sequence[int], groups: Mapping[int, int]) -> frozenset[int]:
    """Images to leave out: the groups of the suspects, the worst first, while they are at most a tenth of all images.

    Args:
        suspects: Images that stand out, the worst first.
        groups: Group of each image.

    Example:
        >>> sorted(worst_groups([4, 20, 7], {image: min(image, 20) for image in range(22)}))  # 20 and 21 are a group
        [4]
    """
    members = defaultdict(list)
    for image, group in groups.items():
        members[group].append(image)
    chosen: set[int] = set()
    for image in suspects:
        more = chosen.union(members[groups[image]])
        if len(more) > MOST_LEFT_OUT * len(groups):
            break
        chosen = more
    return frozenset(chosen)


def tell(images: Sequence[TrainingImage], above: float | None, left_out: int, number: int, drop: bool) -> None:
    """Log which training images stand out, and what became of them.

    Args:
        images: Those that were scored, the worst first.
        above: What `stands_out_above` says.
        left_out: Number of images that are left out, with all of their groups.
        number: Number of training images.
        drop: Whether they were to be left out.
    """
    suspects = [each for each in images if each.stands_out]
    if images and above is None:
        said = "which training images stand out needs %d scores that differ: none of %d is named."
        log.log(logging.WARNING if drop else logging.INFO, said, LEAST, len(images))
    elif drop and above is not None and not suspects:
        log.info("drop_suspicious: none of %d training images stands out; none is left out.", len(images))
    if not suspects:
        return
    named = ", ".join(f"{each.name} ({each.score:.4g})" for each in suspects[:NAMED])
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    hint = "" if drop else "; drop_suspicious leaves such images out"
    said = "%d of %d training images stand out from the others by their score: %s%s. Look whether they are nominal%s."
    log.warning(said, len(suspects), len(images), named, more, hint)
    if drop and (kept := sum(not each.left_out for each in suspects)):
        log.warning("drop_suspicious leaves out at most a tenth of the images: %d of those that stand out stay.", kept)
    if left_out:
        said = (
            "drop_suspicious: %d of %d training images are left out, and the memory bank is selected again; the rate "
            "that the thresholds promise holds for parts like those kept."
        )
        log.info(said, left_out, number)
