"""sinder_jax/launch.py: what a program does before it computes, and with which JAX."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from convert.__main__ import main as convert
from experiments import analyze, repair, visualize
from samples import error_of
from sinder_jax import launch

MODULES = ("convert", "experiments.repair", "experiments.visualize")
CALLS = {
    "inspect": (convert, ["inspect", "MODEL"]),
    "to-torch": (convert, ["to-torch", "MODEL", "OUT"]),
    "to-jax": (convert, ["to-jax", "MODEL", "OUT"]),
    "diff": (convert, ["diff", "MODEL", "MODEL", "OUT"]),
    "apply": (convert, ["apply", "MODEL", "DELTA", "OUT"]),
    "repair": (repair.main, ["--config=tiny.py", "--workdir=OUT"]),
    "visualize": (visualize.main, ["photo.jpg", "--checkpoint=MODEL", "--out=OUT"]),
    "analyze": (analyze.main, ["photo.jpg", "--checkpoint=MODEL", "--out=OUT"]),
}


def command(module: str, *arguments: str, **environ: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- The devices ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_device_that_is_not_there_is_one_line_and_nothing_is_written(
    name, tmp_path, monkeypatch, capsys
):
    def devices():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='' "
            "to automatically choose an available backend)"
        )

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    main, arguments = CALLS[name]
    try:
        assert main(arguments) == 2
        line = capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")
    except ValueError as error:
        line = str(error)
    assert line == (
        "JAX finds no tpu device here (JAX_PLATFORMS=tpu): unset JAX_PLATFORMS to use "
        "what there is, or install JAX for that device, such as jax[cuda13]; it says: "
        "Unable to initialize backend 'tpu': no libtpu.so"
    )
    assert list(tmp_path.iterdir()) == []


def test_jax_without_a_plugin_for_cuda_says_nothing_itself(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORM_NAME", "cuda")
    line = error_of(launch.start_jax)
    assert line.startswith("JAX finds no cuda device here (JAX_PLATFORM_NAME=cuda): ")
    assert line.endswith("jax[cuda13]")


@pytest.mark.parametrize("platform", ["rocm", "nonsense"])
def test_a_checkpoint_is_not_called_damaged_for_want_of_a_device(platform, tmp_path):
    told = command("convert", "inspect", str(tmp_path), JAX_PLATFORMS=platform)
    out, err = told.communicate()
    assert (told.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: JAX finds no {platform} device here")


# --- Switches of JAX ------------------------------------------------------------------


def test_switches_that_change_bits_are_set_back_and_named(capsys):
    changed = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict"}
    try:
        for name, value in changed.items():
            jax.config.update(name, value)
        launch.start_jax()
        assert capsys.readouterr().err == (
            "warning: JAX_ENABLE_X64=True, JAX_NUMPY_DTYPE_PROMOTION=strict: ignored, "
            "so that the same command gives the same bits\n"
        )
        for name, value in launch.SWITCHES.items():
            assert getattr(jax.config, name) == value
        launch.start_jax()
        assert capsys.readouterr().err == ""
    finally:
        for name in changed:
            jax.config.update(name, launch.SWITCHES[name])


def test_a_value_that_jax_does_not_know_is_one_line():
    told = command("experiments.repair", "--help", JAX_ENABLE_X64="perhaps")
    out, err = told.communicate()
    assert (told.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "JAX_ENABLE_X64" in err


ENVIRONMENTS = {
    "64 bits": {"JAX_ENABLE_X64": "1"},
    "not compiled": {"JAX_DISABLE_JIT": "1"},
    "NaN raises": {"JAX_DEBUG_NANS": "1"},
    "infinity raises": {"JAX_DEBUG_INFS": "1"},
    "low precision": {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    "deterministic": {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"},
    "strict dtypes": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    "strict ranks": {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    "no transfers": {"JAX_TRANSFER_GUARD": "disallow"},
    "other keys": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "older keys": {"JAX_THREEFRY_PARTITIONABLE": "0"},
    "leaks": {"JAX_CHECK_TRACER_LEAKS": "1"},
    "checks": {"JAX_ENABLE_CHECKS": "1"},
    "in step": {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"},
    "older name": {"JAX_PLATFORM_NAME": "cpu"},
    "threads of BLAS": {"OPENBLAS_NUM_THREADS": "2"},
    "optimized": {"PYTHONOPTIMIZE": "2"},
    "C": {"LC_ALL": "C", "TZ": "Asia/Tokyo"},
    "no home": {"HOME": "/nonexistent"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, bytes]:
    return _repaired(tmp_path_factory.mktemp("plain") / "run", {})


def _repaired(workdir: Path, environ: dict[str, str]) -> dict[str, bytes]:
    call = ["--config=tiny.py", "--config.images_per_step=1", f"--workdir={workdir}"]
    call += ["--config.max_iter=2", "--config.history=2", "--config.measure_images=1"]
    # One device, as XLA_FLAGS is one of the switches.
    ran = command("experiments.repair", *call, **{"XLA_FLAGS": "", **environ})
    _, err = ran.communicate()
    assert ran.returncode == 0, err
    assert "Traceback" not in err
    names = ("repaired.safetensors", "repaired.patch.safetensors", "metrics.jsonl")
    return {name: (workdir / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_run_has_the_same_bits_in_every_environment(name, plain, tmp_path):
    assert _repaired(tmp_path / "run", ENVIRONMENTS[name]) == plain


# --- Ctrl-C ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_while_a_program_imports_is_one_line(module, tmp_path):
    arguments = {
        "convert": ["inspect", "model"],
        "experiments.repair": ["--config=tiny.py", f"--workdir={tmp_path / 'run'}"],
        "experiments.visualize": ["photo.jpg", "--checkpoint=model"],
    }[module]
    # Python then prints a line for each module that it has imported.
    program = command(module, *arguments, PYTHONPROFILEIMPORTTIME="1")
    for line in program.stderr:
        if line.split("|")[-1].strip().startswith("jax._src"):
            program.send_signal(signal.SIGINT)
            break
    _, err = program.communicate()
    told = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (program.returncode, told) == (130, ["interrupted"])
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_command_line_s_own_module_is_imported_is_one_line():
    code = (
        "import sys; from sinder_jax import launch; "
        "sys.modules['sinder_jax.cli'] = None; launch._end(2, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_at_random_moments_of_the_first_seconds_is_one_line(tmp_path):
    moments = random.Random(0)
    for number in range(60):
        module = MODULES[number % len(MODULES)]
        arguments = {
            "convert": ["inspect", str(tmp_path)],
            "experiments.repair": [
                "--config=tiny.py",
                f"--workdir={tmp_path / str(number)}",
            ],
            "experiments.visualize": [str(tmp_path), f"--checkpoint={tmp_path}"],
        }[module]
        program = command(module, *arguments, PYTHONPROFILEIMPORTTIME="1")
        # Before, Python itself is starting, and shows its traceback.
        next(line for line in program.stderr if "sinder_jax.launch" in line)
        time.sleep(moments.uniform(0, 4))
        program.send_signal(signal.SIGINT)
        _, err = program.communicate()
        told = re.sub(r"import time:.*\n", "", err)
        assert program.returncode in (2, 75, 130, -signal.SIGINT), told
        assert told.count("\n") <= 1 and "Traceback" not in told, told


def test_a_program_that_imports_a_package_keeps_its_own_ctrl_c():
    before = signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook
    launch.guard("experiments")
    launch.end_on_interrupt()
    after = signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook
    assert after == before and not launch.is_ours()
