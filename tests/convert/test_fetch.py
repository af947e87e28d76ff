"""Everything talks to a server in this process; nothing reaches the network."""

import json
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import http_server
import places
from convert import fetch
from convert.__main__ import main
from sinder_jax import vit

NAME = "dinov2_vitg14_reg"
FILE = "dinov2_vitg14_reg4_pretrain.pth"
ADDRESS = f"/dinov2_vitg14/{FILE}"
WEIGHTS = bytes(range(250)) * 8


@pytest.fixture
def server():
    with http_server.serving({ADDRESS: WEIGHTS}) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SINDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SINDER_HUB_URL", server.url)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "RETRIES", 0)
    return tmp_path / "cache"


def failure(name=NAME, kind=OSError):
    """The one line of a failing call, which leaves no final file."""
    with pytest.raises(kind) as caught:
        fetch.fetch(name)
    message = str(caught.value)
    assert message and "\n" not in message and not message.endswith(".")
    assert not (fetch.cache_directory() / FILE).exists()
    return message


def failed_download():
    message = failure()
    assert FILE in message and fetch.hub_url(NAME) in message
    assert "python -m convert to-jax FILE DST" in message
    cache = fetch.cache_directory()
    assert not cache.is_dir() or not [*cache.iterdir()]  # nothing half done
    return message


# --- Names ------------------------------------------------------------------------


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_hub_names_and_file_names_mean_the_same(name):
    alias = name.replace("_reg", "_reg4")
    assert fetch.is_name(name) and fetch.is_name(alias)
    assert fetch.hub_url(name) == fetch.hub_url(alias)
    assert fetch.MODELS[name] is fetch.MODELS[alias]
    assert vit.ViTConfig(**fetch.MODELS[alias].fields) == vit.CONFIGS[name]


def test_urls_are_those_of_the_hub(monkeypatch):
    monkeypatch.delenv("SINDER_HUB_URL")
    assert fetch.hub_url("dinov2_vits14") == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    )
    assert fetch.hub_url(NAME) == f"https://dl.fbaipublicfiles.com/dinov2{ADDRESS}"


@pytest.mark.parametrize(
    "source",
    ["facebook/dinov2-giant", "timm/vit_small_patch14_dinov2.lvd142m", "o/n", "_o/_n"],
)
def test_hugging_face_ids_are_names(source):
    assert fetch.is_name(source) and source not in fetch.MODELS


@pytest.mark.parametrize(
    "source",
    [
        "",
        "dinov2_vitx14",
        "dinov2_vitg14_reg44",
        "dinov2_vitg144",
        "dinov2_vitg14_pretrain.pth",
        "giant.safetensors",
        "weights/giant.pth",  # owner/name, but a file by its suffix
        "/dinov2_vitg14",
        "./dinov2_vitg14",
        "../dinov2",
        "~/dinov2",
        "a/b/c",
        "a//b",
        "owner/",
        "owner/na me",
        "owner/name\n",
        "öwner/name",
        "https://huggingface.co/facebook/dinov2-giant",
        "x" * 5000,
        "a\0b",
    ],
)
def test_paths_and_misspelt_names_are_no_names(source, server):
    assert not fetch.is_name(source)
    for function in (fetch.fetch, fetch.hub_url):
        with pytest.raises(ValueError) as caught:
            function(source)
        assert "\n" not in str(caught.value) and "dinov2_vitg14" in str(caught.value)
    assert server.seen == []


def test_existing_paths_are_no_names(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / "checkpoints" / "giant").mkdir(parents=True)
    assert not fetch.is_name(NAME)
    assert not fetch.is_name("checkpoints/giant")
    assert not fetch.is_name("checkpoints/gaint")  # the folder is here: mistyped
    assert "folder here" in failure("checkpoints/gaint", ValueError)
    assert fetch.is_name("facebook/dinov2-giant")


def test_misspelt_name_lists_the_nearest():
    message = failure("dinov2_vitx14", ValueError)
    for size in "sblg":
        assert f"dinov2_vit{size}14" in message
    assert "_reg" not in message
    assert "dinov2_vitl14_reg" in failure("dinov2_vitl14_regs", ValueError)
    assert all(name in failure("resnet50", ValueError) for name in vit.CONFIGS)


def test_names_are_known_without_jax():
    code = (
        "import sys; from convert import fetch\n"
        f"assert fetch.is_name({NAME!r}) and fetch.is_name('facebook/dinov2-giant')\n"
        f"assert fetch.hub_url({NAME!r})\n"
        "assert not {'jax', 'torch', 'huggingface_hub'} & set(sys.modules)"
    )
    root = places.ROOT
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# --- The cache --------------------------------------------------------------------


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SINDER_CACHE", "~/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch.cache_directory() == Path("/home/someone/models")
    monkeypatch.setenv("SINDER_CACHE", "")
    assert fetch.cache_directory() == Path("/xdg/sinder_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_directory() == Path("/home/someone/.cache/sinder_jax")


def test_hub_model_is_a_file_of_the_cache(server, cache):
    path = fetch.fetch(NAME)
    assert path == cache / FILE
    assert path.read_bytes() == WEIGHTS
    assert [address for address, _ in server.seen] == [ADDRESS]
    assert [*cache.iterdir()] == [path] and path.stat().st_mode & 0o777 == 0o644


def test_second_fetch_makes_no_request(server, cache, capsys, monkeypatch):
    path = fetch.fetch(NAME)
    server.seen.clear()
    capsys.readouterr()
    monkeypatch.setenv("SINDER_HUB_URL", "nonsense")  # nor is its address looked at
    assert fetch.fetch(f"{NAME}4") == path
    assert server.seen == [] and capsys.readouterr() == ("", "")


def test_cached_file_needs_no_writable_cache(server, cache):
    cache.mkdir()
    (cache / FILE).write_bytes(WEIGHTS)
    cache.chmod(0o500)
    try:
        assert fetch.fetch(NAME) == cache / FILE
    finally:
        cache.chmod(0o700)
    assert [*cache.iterdir()] == [cache / FILE] and server.seen == []


# --- How it fails -----------------------------------------------------------------


def test_a_connection_that_drops_is_tried_again(server, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    server.plan = [{"cut": 1500}]
    assert fetch.fetch(NAME).read_bytes() == WEIGHTS
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_asked_again(status, server, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    server.plan = [{"status": status}]
    assert fetch.fetch(NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_told_at_once(status, server, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    server.plan = [{"status": status}]
    assert f": HTTP {status} " in failed_download()
    assert len(server.seen) == 1


def test_a_connection_that_drops_leaves_nothing(server):
    server.plan = [{"cut": 1500}]
    assert "500 more expected" in failed_download()


def test_an_interruption_by_the_user_leaves_nothing(cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.move", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(NAME)
    assert [*cache.iterdir()] == []


def test_a_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    server.plan = [{"cut": 1500, "stall": 20}]
    assert "timed out" in failed_download()


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Length": None}, "how long"),
        ({"Content-Length": 0}, "how long"),
        ({"Content-Length": "many"}, "many"),
        ({"Content-Type": "text/html; charset=utf-8"}, "web page, such as a login"),
    ],
    ids=["no-length", "empty", "no-number", "login-page"],
)
def test_an_answer_that_cannot_be_the_file_is_refused(headers, said, server):
    server.plan = [{"headers": headers}]
    assert said in failed_download()


def test_a_redirect_is_followed(server):
    server.files["/elsewhere"] = server.files.pop(ADDRESS)
    moved = {"Location": f"{server.url}/elsewhere", "Content-Type": "text/html"}
    server.plan = [{"status": 302, "headers": moved}]
    assert fetch.fetch(NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/hostname"])
def test_a_redirect_leads_to_http_only(to, server):
    server.plan = [{"status": 302, "headers": {"Location": to}}]
    failed_download()
    assert len(server.seen) == 1


def test_no_connection_says_what_to_fetch_by_hand(monkeypatch, capsys):
    monkeypatch.setenv("SINDER_HUB_URL", "http://127.0.0.1:1")
    assert "Connection refused" in failed_download()
    assert capsys.readouterr() == ("", "")


def test_without_a_network_a_name_ends_in_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("SINDER_HUB_URL", "http://no.such.host.invalid")
    assert main(["to-jax", NAME, str(tmp_path / "dst")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "by hand" in err


def test_a_download_says_what_it_fetches(server, cache, capsys):
    fetch.fetch(NAME)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and f"{ADDRESS}, 2.0 kB, to {cache}" in out


def test_full_disk_names_the_variable_of_the_cache(cache, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    message = failed_download()
    assert "it needs 2.0 kB, 1.0 kB are free; make room or" in message
    assert "set SINDER_CACHE to another folder" in message


def test_a_disk_that_fills_up_is_told(server):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A real error of the system in the middle of writing: no file beyond 1.5 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        assert "File too large" in failed_download()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "url",
    ["file:///weights", "ftp://host/x", "host/folder", "http://", "https://me:pw@host"],
)
def test_mirror_without_an_http_address_raises(url, monkeypatch, cache):
    monkeypatch.setenv("SINDER_HUB_URL", url)
    assert "SINDER_HUB_URL" in failure(kind=ValueError)
    assert not cache.exists()


def test_cache_that_is_a_file_raises(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SINDER_CACHE", str(tmp_path / "file"))
    assert f"not fetched to {tmp_path / 'file'}: " in failed_download()


def test_processes_at_once_do_no_harm(server, cache):
    server.plan = [{"stall": 0.3}]
    command = [
        sys.executable,
        "-c",
        f"from convert import fetch; fetch.fetch({NAME!r})",
    ]
    children = [subprocess.Popen(command, cwd=places.ROOT) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert [*cache.iterdir()] == [cache / FILE]
    assert (cache / FILE).read_bytes() == WEIGHTS


# --- Hugging Face -----------------------------------------------------------------

REPO = "owner/dinov2-tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"


def hub_files(*names):
    """What a Hugging Face server answers for a model of these files."""
    bodies = {name: f"content of {name}".encode() for name in names}
    info = {"id": REPO, "modelId": REPO, "sha": SHA}
    info["siblings"] = [{"rfilename": name} for name in names]
    tree = [
        {"type": "file", "path": name, "size": len(body), "oid": f"{index:040x}"}
        for index, (name, body) in enumerate(bodies.items())
    ]
    answers = {
        f"/api/models/{REPO}": json.dumps(info).encode(),
        f"/api/models/{REPO}/revision/main": json.dumps(info).encode(),
        f"/api/models/{REPO}/tree/{SHA}": json.dumps(tree).encode(),
    }
    for name, body in bodies.items():
        answers[f"/{REPO}/resolve/{SHA}/{name}"] = body
    return answers


@pytest.fixture
def hugging_face(server, tmp_path):
    """Fetches in a process of its own: HF_ENDPOINT is read at import."""
    pytest.importorskip("huggingface_hub")

    def run(source, timeout=20.0, **environment):
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        } | environment
        done = subprocess.run(
            [sys.executable, "-m", "fetch_and_print", source, str(timeout)],
            env={k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout.splitlines()

    server.plan = _CommitHeaders()
    return run


class _CommitHeaders(list):
    """A plan without end, of the header that Hugging Face answers everything with."""

    def __bool__(self):
        return True

    def pop(self, index):
        step = super().pop(index) if len(self) else {}
        return {"headers": {"X-Repo-Commit": SHA}} | step


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_model_is_a_directory(weights, hugging_face, server):
    server.files = hub_files("config.json", weights, "README.md", f"onnx/{weights}")
    path, *found = hugging_face(REPO)
    expected = [f"{name} content of {name}" for name in ("config.json", weights)]
    assert found == expected
    # Without a network, what is there is used.
    server.files = {}
    assert hugging_face(REPO, HF_ENDPOINT="http://127.0.0.1:1") == [path, *expected]


def test_safetensors_are_preferred_to_pickles(hugging_face, server):
    server.files = hub_files("config.json", "model.safetensors", "pytorch_model.bin")
    _, *found = hugging_face(REPO)
    assert [line.split()[0] for line in found] == ["config.json", "model.safetensors"]


def test_hugging_face_model_without_weights_raises(hugging_face, server):
    server.files = hub_files("config.json", "flax_model.msgpack")
    (line,) = hugging_face(REPO)
    assert line.startswith(f"ValueError {REPO}: no weights")
    assert "flax_model.msgpack" in line and f"https://huggingface.co/{REPO}" in line


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "no such model"),
        ({"status": 401}, "401 Unauthorized"),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "agree to terms"),
        ({"status": 500}, "500"),
    ],
    ids=["unknown", "unauthorized", "gated", "broken"],
)
def test_hugging_face_refusal_is_one_line(step, said, hugging_face, server):
    server.plan += [step] * 9
    (line,) = hugging_face(REPO)
    assert line.startswith(f"OSError {REPO}: not fetched: ") and said in line
    assert f"https://huggingface.co/{REPO}" in line


def test_hugging_face_without_a_network_is_one_line(hugging_face):
    start = time.monotonic()
    (line,) = hugging_face(REPO, HF_ENDPOINT="http://127.0.0.1:1")
    assert line.startswith(f"OSError {REPO}: not fetched: ") and "refused" in line
    assert time.monotonic() - start < 60


def test_silent_hugging_face_is_given_up(hugging_face, server):
    server.plan += [{"stall": 20, "headers": {"Content-Length": 1000}}] * 9
    server.files = hub_files("config.json", "model.safetensors")
    start = time.monotonic()
    (line,) = hugging_face(REPO, timeout=0.5)
    assert line.startswith(f"OSError {REPO}: not fetched: ") and "timed out" in line
    assert time.monotonic() - start < 60


def test_missing_huggingface_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = failure(REPO, ImportError)
    assert "needs huggingface_hub: pip install huggingface_hub, or" in message
    assert f"https://huggingface.co/{REPO}" in message
