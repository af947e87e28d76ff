"""What the masks of a data set hold, seen before a long evaluation begins.

masks of both splits --check_masks--> number of classes, sizes
"""

from ml_collections import ConfigDict

from experiments.evaluation.progress import Progress
from sinder_jax import cli
from sinder_jax.data import masks, scenes
from sinder_jax.data.scenes import Scenes


def check_masks(config: ConfigDict, found: Scenes) -> tuple[int, list[tuple[int, int]]]:
    """Reads every mask of a data set once, before anything is trained on them.

    Args:
      config: its `num_classes` counts where the data set names none; 0: the largest
        label + 1.
      found: the data set.

    Returns:
      The number of classes, and (height, width) of all masks, training first.

    Raises:
      ValueError: a label beyond the classes, a mask of another size than its image, a
        split without any class, or a number of classes that cannot be.
    """
    named, given = len(found.classes), config.num_classes
    if named and given not in (0, named):
        raise ValueError(
            f"config.num_classes: got {given}, but {config.data} has {named} classes"
        )
    known = given or named
    every, threads = [*found.train, *found.val], config.read_threads
    if config.data in scenes.SAMPLES:  # there are no files to check
        labels, sizes = scenes.survey(every, known, num_threads=threads)
    else:
        with Progress() as progress:
            progress.begin("checking masks", len(every))
            labels, sizes = scenes.survey(
                every, known, num_threads=threads, seen=progress.at
            )
            progress.end()
    for split, part in (
        ("training", labels[: len(found.train)]),
        ("validation", labels[len(found.train) :]),
    ):
        if max(part) < 0:
            raise ValueError(
                f"{config.data}: no pixel of the {split} masks has a class: all are "
                f"to be ignored; expected classes, not only {masks.IGNORE}"
            )
    largest = max(labels)
    if len(found.classes) > largest + 1:
        cli.warn(
            f"{config.data}: {len(found.classes)} classes have names, but no mask has "
            f"a label above {largest}"
        )
    count = known or largest + 1
    if not 2 <= count <= masks.MOST_CLASSES:
        raise ValueError(
            f"{config.data}: the largest label is {largest}, which makes {count} "
            f"classes; expected 2 to {masks.MOST_CLASSES}, numbered from 0, and "
            f"{masks.IGNORE} only for pixels to ignore"
        )
    return count, sizes
