"""experiments/config.py and every file of experiments/configs/."""

import dataclasses
import importlib
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import analyze, evaluate, visualize
from experiments import config as config_files
from experiments.evaluation import protocols
from experiments.run import inputs
from sinder_jax import repair, vit

OTHERS = {"datafree.py"}  # another repair, with keys of its own
FILES = sorted(
    {file.name for file in config_files.CONFIGS.glob("[!_]*.py")}.difference(OTHERS)
)
HUB_FILES = [f"{size}.py" for size in ("base", "giant", "large", "small")]


def docstring(name: str) -> str:
    """Of a config's module, with single spaces and no line continuations."""
    module = importlib.import_module(f"experiments.configs.{Path(name).stem}")
    return " ".join(module.__doc__.replace("\\\n", " ").split())


def overridden(*arguments: str, file: str = "giant.py") -> ConfigDict:
    config = config_files.load(file)
    config_files.override(config, arguments)
    return config


# --- The files ------------------------------------------------------------------------


def test_the_sizes_of_the_issue_are_there():
    assert FILES == sorted([*HUB_FILES, "planted_small.py", "tiny.py"])


@pytest.mark.parametrize("name", FILES)
def test_a_config_has_the_keys_and_types_of_giant(name):
    giant, config = config_files.load("giant.py"), config_files.load(name)
    assert list(config.keys()) == list(giant.keys())  # in its order: files are compared
    for key in giant:
        assert type(config[key]) is type(giant[key]), key


@pytest.mark.parametrize("name", FILES)
def test_a_config_gives_valid_options(name):
    config = config_files.load(name)
    options = inputs.repair_options(config)
    told = {**config, "first_block": max(config.first_block, 0)}  # -1: not known yet
    for field in dataclasses.fields(repair.RepairOptions):
        assert getattr(options, field.name) == told[field.name]


@pytest.mark.parametrize("name", FILES)
def test_a_docstring_names_its_own_command(name):
    command = f"python -m experiments.repair --config={name} --workdir=runs/"
    assert command in docstring(name)


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_docstring_says_how_to_get_the_weights(name):
    config = config_files.load(name)
    assert config.model in vit.CONFIGS and config.checkpoint == config.data == ""
    text = docstring(name)
    _, convert_command, _ = inputs.how_to_get(config.model).split("`")
    assert f"`{convert_command}`" in text
    assert f"--config.checkpoint={config.model} --config.data=" in text


@pytest.mark.parametrize("name", ["base.py", "large.py", "small.py"])
def test_a_docstring_names_the_model_with_registers(name):
    config = config_files.load(name)
    registers = f"{config.model}_reg"
    assert vit.CONFIGS[registers].num_register_tokens == 4
    assert f"--config.model={registers}" in docstring(name)


def test_giant_holds_the_authors_settings():
    config = config_files.load("giant.py")
    authors = {
        "model": "dinov2_vitg14",
        "interpolate_antialias": True,
        "num_images": 30_000,
        "image_size": 518,
        "num_probes": 100_000,
        "lr": 0.005,
        "momentum": 0.9,
        "mask_thr": 4.0,
        "min_outliers": 3,
        "window": 3,
        "temperature": 0.1,
        "active_blocks": 10,
        "reduce": "sum",
        "matmul_precision": "high",
        "max_iter": 30_000,
        "history": 1_000,
        "stop_share": 0.75,
    }
    assert {key: config[key] for key in authors} == authors


def test_giant_s_settings_are_the_defaults_elsewhere():
    giant = config_files.load("giant.py")
    step = dataclasses.asdict(repair.RepairOptions())
    assert step.pop("matmul_precision") == "highest"  # the authors' is "high"
    assert step == {key: giant[key] for key in step}
    asked = analyze._parser().parse_args(["a.png", "--checkpoint=model"])
    analysis, _, _ = analyze._settings(asked, [])
    for key in ("mask_thr", "window", "min_outliers", "image_size", "method", "seed"):
        assert getattr(analysis, key) == giant[key], key
    drawn = visualize._parser().parse_args(["a.png", "--checkpoint=model"])
    assert drawn.mask_thr == giant.mask_thr


@pytest.mark.parametrize("name", HUB_FILES)
def test_the_other_sizes_differ_from_giant_in_the_model_only(name):
    giant, config = config_files.load("giant.py"), config_files.load(name)
    differing = {key for key in giant if config[key] != giant[key]}
    assert differing <= {"model"}


def test_tiny_needs_neither_weights_nor_photographs():
    config = config_files.load("tiny.py")
    inputs.check_weights_given(config)
    train, held_out = inputs.photographs(config)
    assert len(train) == len(held_out) == 4


# --- Which file -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["giant.py", "giant"])
def test_a_bare_name_means_the_configs_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load(name).model == "dinov2_vitg14"


def test_a_config_of_one_s_own_starts_from_giant_s(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from experiments.configs import giant\n\n\n"
        "def get_config():\n"
        "    config = giant.get_config()\n"
        "    config.lr = 0.25\n"
        "    return config\n"
    )
    mine, giant = (
        config_files.load(name) for name in (str(tmp_path / "mine.py"), "giant.py")
    )
    assert mine.lr == 0.25
    assert {key for key in giant if mine[key] != giant[key]} == {"lr"}


def test_a_path_means_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (config_files.CONFIGS / "giant.py").read_text()
    mine = tmp_path / "folder" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(text.replace("config.lr = 0.005", "config.lr = 0.25"))
    assert config_files.load(str(mine)).lr == 0.25
    assert config_files.load(os.path.join("folder", "mine.py")).lr == 0.25
    # Beside the working directory a bare name finds it first.
    (tmp_path / "giant.py").write_text(mine.read_text())
    assert config_files.load("giant.py").lr == 0.25


@pytest.mark.parametrize("name", ["huge.py", "huge", "configs/giant.py", "", "."])
def test_a_missing_config_lists_the_known_ones(name, tmp_path, monkeypatch):
    known = sorted({*FILES, *OTHERS})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        config_files.load(name)
    assert str(caught.value) == (
        f"no config {name}; give a path or one of {', '.join(known)}"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = 0.01\n", "mine.py defines no get_config"),
        ("def get_config():\n    return None\n", "mine.py defines no get_config"),
        ("def get_config(:\n", r"mine.py cannot be used: SyntaxError: .*line 1"),
        ("import nothing_of_that_name\n", "cannot be used: ModuleNotFoundError: "),
        ("def get_config():\n    return lr\n", "NameError: name 'lr' is not defined"),
        ("\0", "mine.py cannot be used: "),
    ],
)
def test_a_file_that_is_no_config_is_named_with_what_is_wrong(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        config_files.load(str(tmp_path / "mine.py"))


def test_a_config_with_other_keys_or_types_names_each(tmp_path):
    text = (config_files.CONFIGS / "giant.py").read_text()
    text = text.replace("config.lr = 0.005", "config.lrr = 0.005")
    text = text.replace("config.momentum = 0.9", "config.momentum = 1")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        config_files.load(str(tmp_path / "mine.py"))
    assert (
        "mine.py: lr is missing, lrr is unknown, momentum is int, not float; see "
    ) in str(caught.value)


# --- Overrides ------------------------------------------------------------------------


def test_a_loaded_config_is_locked():
    config = config_files.load("giant.py")
    with pytest.raises(AttributeError, match="lrr"):
        config.lrr = 0.1


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--config.lr=0.01"], "lr", 0.01),
        (["--config.lr", "0.01"], "lr", 0.01),
        (["--config.lr=1"], "lr", 1.0),
        (["--config.lr=1e-3"], "lr", 1e-3),
        (["--config.lr=0.1", "--config.lr=0.2"], "lr", 0.2),
        (["--config.max_iter=1_000"], "max_iter", 1000),
        (["--config.max_iter", "7"], "max_iter", 7),
        (["--config.interpolate_antialias=false"], "interpolate_antialias", False),
        (["--config.interpolate_antialias=True"], "interpolate_antialias", True),
        (["--config.data=/photos/a=b c"], "data", "/photos/a=b c"),
        (["--config.data", "12"], "data", "12"),
        (["--config.checkpoint="], "checkpoint", ""),
    ],
)
def test_an_override_keeps_the_type_of_the_config(arguments, key, value):
    config = overridden(*arguments)
    assert config[key] == value and type(config[key]) is type(value)
    others = config_files.load("giant.py")
    assert all(config[k] == others[k] for k in others if k != key)


def test_overrides_of_several_keys_are_all_applied():
    config = overridden("--config.lr", "0.1", "--config.window=5", "--config.seed", "3")
    assert (config.lr, config.window, config.seed) == (0.1, 5, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.lrr=1"], r"no key lrr: did you mean lr\?"),
        (["--config.windows", "5"], r"no key windows: did you mean window\?"),
        (["--config.max_iters=5"], r"no key max_iters: did you mean max_iter\b"),
        (["--config.xyzzy=1"], r"no key xyzzy: it has active_blocks, checkpoint, "),
        (["--config.=1"], r"the config has no key : "),
        (["--config.lr.x=1"], r"no key lr\.x"),
        (["--lr=1"], r"unknown argument --lr=1; overrides are --config\.KEY=VALUE"),
        (["lr=1"], r"unknown argument lr=1"),
        (["--config.lr", "0.1", "0.2"], r"unknown argument 0\.2"),
        (["--config.lr=fast"], r"lr must be a number like 0\.005, got 'fast'"),
        (["--config.lr"], r"--config\.lr must be a number like 0\.005, got ''"),
        (["--config.lr=True"], r"--config\.lr must be a number"),
        (["--config.lr=1+1j"], r"--config\.lr must be a number"),
        (["--config.lr=nan"], r"--config\.lr must be a number"),
        (["--config.lr=inf"], r"--config\.lr must be a number"),
        (["--config.max_iter=1.5"], r"max_iter must be a whole number like 30000"),
        (["--config.max_iter=1e4"], r"max_iter must be a whole number"),
        (["--config.max_iter=True"], r"max_iter must be a whole number"),
        (["--config.max_iter=__import__('os')"], r"must be a whole number"),
        ([f"--config.seed={'9' * 5000}"], r"a whole number like 0, got '9{80}\.\.\.'$"),
        (["--config.data=a\0b"], r"data must be text without a NUL"),
        (["--config.interpolate_antialias=1"], r"must be true or false, got '1'"),
        (["--config.interpolate_antialias"], r"must be true or false, got ''"),
    ],
)  # fmt: skip
def test_a_wrong_override_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        overridden(*arguments)


# --- Options out of range -------------------------------------------------------------


@pytest.mark.parametrize(
    "override, message",
    [
        ("lr=0", "lr must be above 0"),
        ("momentum=1", r"momentum must be in \[0, 1\)"),
        ("mask_thr=0", "mask_thr must be above 0"),
        ("window=4", "window"),
        ("temperature=0", "temperature"),
        ("min_outliers=0", "min_outliers must be at least 1"),
        ("max_iter=0", "max_iter must be at least 1"),
        ("history=0", "history must be at least 1"),
        ("stop_share=1.5", "stop_share"),
        ("reduce=max", "reduce"),
        ("matmul_precision=fast", "matmul_precision"),
        ("active_blocks=-1", "active_blocks must be from 0"),
        ("images_per_step=-1", "images_per_step must be from 0"),
        ("read_threads=-1", "read_threads must be from 0"),
        ("seed=-1", "seed must be from 0"),
        ("seed=99999999999999999999", "seed must be from 0 to 2147483647"),
        (f"seed={10**400}", "seed must be from 0 to 2147483647"),
        ("max_iter=3000000000", "max_iter must be from 0 to 2147483647"),
        ("history=2147483647", "history must be from 0 to 10000000"),
        ("images_per_step=1000000", "images_per_step must be from 0 to 4096"),
        ("read_threads=1000000", "read_threads must be from 0 to 256"),
        ("read_workers=1000000", "read_workers must be from 0 to 256"),
        ("num_probes=2147483647", "num_probes must be from 0 to 100000000"),
        (
            "lr=1e300",
            r"lr must be 0 or from 1.2e-38 to 3.4e\+38 in size, .* got 1e\+300",
        ),
        ("temperature=1e-300", "temperature must be 0 or from 1.2e-38"),
        ("max_bad_steps=0", "max_bad_steps must be from 1"),
        ("log_every=0", "log_every must be from 1"),
        ("picture_every=0", "picture_every must be from 1"),
        ("checkpoint_every=0", "checkpoint_every must be from 1"),
        ("measure_images=0", "measure_images must be from 1"),
    ],
)
def test_an_option_out_of_range_raises_with_its_name(override, message):
    with pytest.raises(ValueError, match=message):
        inputs.repair_options(overridden(f"--config.{override}"))


def test_active_blocks_0_means_all():
    options = inputs.repair_options(overridden("--config.active_blocks=0"))
    assert options.active_blocks is None


# --- A planted defect -----------------------------------------------------------------


@pytest.mark.parametrize("plant", ["12", "-1", "four"])
def test_a_defect_is_planted_in_a_block_that_exists(plant):
    config = overridden(f"--config.plant={plant}", file="planted_small.py")
    with pytest.raises(ValueError, match="config.plant must be a block from 0 to 11"):
        inputs.check_plant(config)


def test_no_defect_is_planted_in_the_demo_s_model():
    config = overridden("--config.plant=4", file="tiny.py")
    with pytest.raises(ValueError, match="needs a trained model"):
        inputs.check_plant(config)


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_every_protocol_has_a_config_of_its_name(name):
    config = evaluate._config(name, [])
    assert config.protocol == name and config.data == ""
    assert f"--config={name}.py" in docstring(f"evals.{name}.py")


def test_an_evaluation_s_config_of_one_s_own_needs_its_protocol_s_keys(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from experiments.configs.evals import knn\n\n\ndef get_config():\n"
        "    config = knn.get_config()\n    config.ks = '5'\n    return config\n"
    )
    assert evaluate._config(str(mine), []).ks == "5"
    mine.write_text(mine.read_text().replace("ks = '5'", "protocol = 'linear'"))
    with pytest.raises(ValueError, match="learning_rates is missing"):
        evaluate._config(str(mine), [])
    mine.write_text(mine.read_text().replace("'linear'", "'kn'"))
    with pytest.raises(ValueError, match="got 'kn', expected knn"):
        evaluate._config(str(mine), [])
