"""Prints SHA-256 of the state after every step, for each number of devices.

    python -m step_hashes planted|RECORDING STEPS

JSON by way, "1", "2 mapped", "2 split", ...: the hashes, and the number of defects.
"""

import functools
import hashlib
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import convert
import golden
import photos
from sinder_jax import planted, repair, vit
from sinder_jax.data import listing


class Case:
    """A model, the options of its repair and eight images."""

    def __init__(self, name):
        if name == "planted":
            made = planted.planted_model(1)
            self.config, params = made.config, made.params
            directions, self.options = None, repair.RepairOptions(lr=0.02)
            files = listing.sample_images()[:8]
            self.images = np.stack([photos.prepared(file, 224) for file in files])
        else:
            arrays, meta = golden.load(name)
            self.config = vit.ViTConfig(**golden.architecture(meta))
            state = golden.state(arrays)
            _, params = convert.from_torch(state, self.config.num_heads)
            directions = arrays["singular_defects"]
            self.options = repair.RepairOptions(**golden.options(meta))
            images = np.moveaxis(arrays["images"], 1, 3)
            self.images = np.ascontiguousarray(images[np.arange(8) % len(images)])
        self._start = repair.init(self.config, params, self.options, directions)

    def start(self):
        """Frozen model and state; a copy, since a step is given the state's memory."""
        frozen, state = self._start
        return frozen, jax.tree.map(lambda x: x.copy(), state)

    def alone(self):
        step = repair.make_step(self.config, self.options)
        return *self.start(), step, lambda x: x

    def mapped(self, count):
        devices = jax.devices()[:count]
        frozen, state = (repair.replicate(tree, devices) for tree in self.start())
        step = repair.make_pmapped_step(self.config, self.options, devices)

        def call(state, frozen, images):
            return step(state, frozen, images.reshape(count, -1, *images.shape[1:]))

        return frozen, state, call, repair.unreplicate

    def split(self, count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("images",))
        sharding = NamedSharding(mesh, PartitionSpec("images"))
        frozen, state = (repair.shard(tree, sharding) for tree in self.start())
        step = repair.make_step(self.config, self.options, sharding)
        return frozen, state, step, lambda x: x

    def hashes(self, steps, frozen, state, step, whole):
        found, defects = [], 0
        for k in range(steps):
            state, metrics = step(state, frozen, np.roll(self.images, k, axis=0))
            defects += int(np.sum(np.asarray(metrics.layer) >= 0))
            now = whole(state)
            leaves = [*jax.tree.leaves(now.eps), *jax.tree.leaves(now.momentum)]
            leaves += jax.tree.leaves(now.merged)
            digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves))
            found.append(digest.hexdigest())
        return found, defects


def main(name, steps):
    case = Case(name)
    ways = {"1": case.alone}
    for count in (2, 4, 8):
        ways[f"{count} mapped"] = functools.partial(case.mapped, count)
        ways[f"{count} split"] = functools.partial(case.split, count)
    found = {way: case.hashes(steps, *make()) for way, make in ways.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
