"""Time and memory of converting a random model of a published size.

    python -m benchmarks.convert_giant [--model=dinov2_vitg14] [--folder=DIR]

Writes a random model in hub layout as .safetensors. Then, each in its own process,
copies the file (the baseline), converts it to a checkpoint, and converts the checkpoint
to every layout and file type. Also times reading, transposing, digests and writing
alone. Prints one JSON object: seconds, ratios to the baseline, and peak memory in units
of the file size. DIR needs room for six models.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.process import peak_bytes

BLOCK = 16 * 2**20


def make_source(path: Path, model: str) -> None:
    """Writes a random model of the size of `model` in hub layout, leaf by leaf."""
    from convert import layouts
    from convert.files import writing
    from convert.files.tensors import Spec
    from convert.layouts import table as tables
    from sinder_jax import param_tree, vit

    config = vit.CONFIGS[model]
    shapes = param_tree.flatten(param_tree.shapes(config))
    rng = np.random.default_rng(0)
    table = layouts.table_of("dinov2", config)
    specs = {key: Spec(slot.shape, "float32") for key, slot in table.items()}

    def leaf(name: str) -> np.ndarray:
        return rng.standard_normal(shapes[name].shape, np.float32)

    writing.write_tensors(path, specs, tables.to_tensors(table, leaf))


def copy(source: Path, target: Path) -> None:
    """The baseline: copies a file and flushes it to the disk."""
    with source.open("rb") as file, target.open("wb") as out:
        while data := file.read(BLOCK):
            out.write(data)
        os.fsync(out.fileno())


def phases(source: Path, target: Path) -> dict[str, float]:
    """Seconds of reading, transposing, hashing and writing, each alone."""
    from convert.files import reading
    from convert.layouts import table as tables
    from convert.state_dict import TorchModel
    from sinder_jax import param_tree

    state = reading.open_state_dict(source)
    model = TorchModel(state)
    seconds = dict.fromkeys(("read", "transpose", "digest", "write"), 0.0)

    def timed(phase: str, call, *args):
        start = time.perf_counter()
        result = call(*args)
        seconds[phase] += time.perf_counter() - start
        return result

    with target.open("wb") as out:
        for path, shape in model.shapes.items():
            keys = [key for key, slot in model.table.items() if slot.path == path]
            tensors = {key: timed("read", state.__getitem__, key) for key in keys}
            leaf = timed(
                "transpose",
                tables.from_tensors,
                path,
                shape,
                model.table,
                tensors.__getitem__,
            )
            timed("digest", param_tree.digest_of_array, leaf)
            timed("write", out.write, leaf.reshape(-1).view(np.uint8).data)
        timed("write", lambda: (out.flush(), os.fsync(out.fileno())))
    return seconds


def task(name: str, folder: Path) -> dict:
    """Runs one conversion in this process; returns seconds and peak memory in bytes."""
    from convert import __main__ as convert

    source, checkpoint = folder / "hub.safetensors", folder / "checkpoint"
    commands = {
        "to-jax": ["to-jax", source, checkpoint],
        "to-jax .pth": ["to-jax", folder / "hub.pth", folder / "from_pth"],
        "to-torch": ["to-torch", checkpoint, folder / "back.safetensors"],
        "to-torch .pth": ["to-torch", checkpoint, folder / "hub.pth"],
        "to-torch hf": ["to-torch", checkpoint, folder / "hf", "--layout=hf"],
        "to-torch timm": [
            "to-torch",
            checkpoint,
            folder / "timm.safetensors",
            "--layout=timm",
        ],
    }
    start = time.perf_counter()
    if name == "copy":
        copy(source, folder / "copy")
    elif name == "phases":
        return phases(source, folder / "phases")
    else:
        assert convert.main([str(word) for word in commands[name]]) == 0
        os.sync()
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes()}


def run(name: str, folder: Path) -> dict:
    """Runs `task` in its own process, so that peak memory is that of the task."""
    command = [sys.executable, "-m", "benchmarks.convert_giant", f"--task={name}"]
    ended = subprocess.run(
        [*command, f"--folder={folder}"], check=True, capture_output=True, text=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Runs the benchmark, or one of its tasks, and prints the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinov2_vitg14")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(task(args.task, args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_source(folder / "hub.safetensors", args.model)
        size = (folder / "hub.safetensors").stat().st_size
        numbers: dict = {"model": args.model, "bytes": size}
        numbers["copy"] = [run("copy", folder)["seconds"]]
        numbers["phases"] = run("phases", folder)
        conversions = ("to-jax", "to-torch", "to-torch .pth", "to-jax .pth")
        for conversion in (*conversions, "to-torch hf", "to-torch timm"):
            measured = run(conversion, folder)
            numbers[conversion] = {
                "seconds": measured["seconds"],
                "peak / bytes": measured["peak"] / size,
            }
            numbers["copy"].append(run("copy", folder)["seconds"])
        middle = float(np.median(numbers["copy"]))
        for value in numbers.values():
            if isinstance(value, dict) and "seconds" in value:
                value["seconds / copy"] = value["seconds"] / middle
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
