"""Everything talks to a server in this process; nothing reaches the network."""

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

import http_server
import places
from convert import download

FILE = "giant.pth"
ADDRESS = f"/folder/{FILE}"
# Longer than what the server's socket takes at once, so that a cut is one.
WEIGHTS = np.random.default_rng(0).bytes(3_000_001)
OTHER = np.random.default_rng(1).bytes(len(WEIGHTS))


@pytest.fixture
def server():
    with http_server.serving({ADDRESS: WEIGHTS}) as server:
        yield server


@pytest.fixture
def url(server):
    return server.url + ADDRESS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / FILE


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0, 0.0))


def files(path):
    return {file.name for file in path.parent.iterdir()}


def partial(path):
    return path.with_name(f"{path.name}.partial")


def downloaded(url, path):
    download.download(url, path)
    return path.read_bytes()


def failure(url, path, kind=download.Failed):
    """The one line of a failing call, which leaves no final file."""
    with pytest.raises(kind) as caught:
        download.download(url, path)
    assert not path.exists()
    message = str(caught.value)
    assert message and "\n" not in message and not message.endswith(".")
    return message


def raiser(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def python(code):
    """A process of its own that runs `code` with what it needs imported."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from convert import download\n{code}"],
        env=os.environ | {"PYTHONPATH": str(places.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(url, path):
    return f"import pathlib; download.download({url!r}, pathlib.Path({str(path)!r}))"


def test_download_gives_the_bytes_of_the_server(server, url, path, capsys):
    assert downloaded(url, path) == WEIGHTS
    assert files(path) == {FILE, f"{FILE}.lock"}
    assert server.ranges() == [None]
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()  # no terminal: a line at the start, one at the end
    assert first == f"{url}: fetching 3.0 MB."
    assert last == f"{path}: fetched."


def test_existing_file_makes_no_request(server, url, path, capsys):
    path.parent.mkdir()
    path.write_bytes(OTHER)
    assert downloaded(url, path) == OTHER
    assert server.seen == [] and capsys.readouterr() == ("", "")


def test_terminal_gets_a_bar_and_no_lines(url, path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    download.download(url, path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3.0/3.0 MB" in err and FILE in err and "fetched." not in err


# --- Interrupted and resumed ------------------------------------------------------


def test_dropped_connections_are_resumed_with_the_rest_only(server, url, path):
    server.plan = [{"cut": 1_000_000}, {"cut": 500_000}]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, "bytes=1000000-", "bytes=1500000-"]
    assert files(path) == {FILE, f"{FILE}.lock"}


def test_later_call_requests_the_rest_only(server, url, path, capsys, monkeypatch):
    monkeypatch.setattr(download, "WAITS", ())
    assert download.kept(url, path) == 0
    server.plan = [{"cut": 1_000_000}]
    assert "2000001 bytes early" in failure(url, path)
    assert download.kept(url, path) == 1_000_000
    assert partial(path).read_bytes() == WEIGHTS[:1_000_000]
    capsys.readouterr()
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, "bytes=1000000-"]
    assert "fetching 3.0 MB from 1.0 MB on." in capsys.readouterr().err
    assert files(path) == {FILE, f"{FILE}.lock"}
    assert download.kept(url, path) == 0


def test_killed_process_is_resumed_and_leaves_no_lock(server, url, path):
    server.plan = [{"cut": 2_000_000, "stall": 20}]
    with python(call(url, path)) as child:
        part = partial(path)
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 1_000_000):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.01)
        child.kill()
    size = part.stat().st_size
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, f"bytes={size}-"]


def test_whole_partial_is_renamed_without_a_request(server, url, path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download.os, "replace", raiser(KeyboardInterrupt()))
        download.download(url, path)
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None]


@pytest.mark.parametrize(
    ("step", "requests"),
    [
        ({}, 2),  # 200, since If-Range names another file
        ({"if_range": False}, 3),  # 206 of the new file: recognized by its ETag
        ({"ranges": False}, 2),
    ],
    ids=["if-range", "no-if-range", "no-ranges"],
)
def test_changed_file_is_fetched_from_its_beginning(step, requests, server, url, path):
    server.plan = [{"cut": 1_000_000}, step]

    class Changing(dict):
        def get(self, key, default=None):
            return WEIGHTS if len(server.seen) == 1 else OTHER

    server.files = Changing()
    assert downloaded(url, path) == OTHER
    assert len(server.seen) == requests
    assert server.ranges()[1] == "bytes=1000000-"


def test_server_without_ranges_sends_all_again(server, url, path):
    server.plan = [{"cut": 1_000_000}, {"ranges": False}]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, "bytes=1000000-"]


@pytest.mark.parametrize(
    "headers",
    [{"ETag": None}, {"ETag": 'W/"weak"'}],
    ids=["no-validator", "weak"],
)
def test_nothing_is_resumed_that_cannot_be_recognized(headers, server, url, path):
    server.plan = [{"cut": 1_000_000, "headers": headers}]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, None]


def test_date_serves_where_there_is_no_etag(server, url, path):
    date = {"ETag": None, "Last-Modified": "Mon, 17 Apr 2023 12:00:00 GMT"}
    server.plan = [
        {"cut": 1_000_000, "headers": date},
        {"if_range": False, "headers": date},
    ]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, "bytes=1000000-"]
    assert server.seen[1][1]["If-Range"] == date["Last-Modified"]


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-9/10", "bytes 999999-3000000/3000001", "bytes 1000000-3000000/*", "?"],
)
def test_wrong_content_range_starts_over(content_range, server, url, path):
    wrong = {"headers": {"Content-Range": content_range}}
    server.plan = [{"cut": 1_000_000}, wrong]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, "bytes=1000000-", None]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": 1', None])
def test_damaged_notes_on_a_partial_start_over(text, server, url, path):
    path.parent.mkdir()
    partial(path).write_bytes(OTHER[:1000])
    if text is not None:
        path.with_name(f"{FILE}.partial.json").write_text(text)
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None]


def test_partial_of_another_server_starts_over(server, url, path, monkeypatch):
    server.plan = [{"cut": 1_000_000}]
    monkeypatch.setattr(download, "WAITS", ())
    failure(url, path)
    server.files["/mirror" + ADDRESS] = WEIGHTS
    assert downloaded(f"{server.url}/mirror{ADDRESS}", path) == WEIGHTS
    assert server.ranges() == [None, None]


def test_partial_longer_than_the_file_starts_over(server, url, path):
    server.plan = [{"cut": 1_000_000}, *[{"status": 500}] * 9]
    failure(url, path)
    with open(partial(path), "ab") as file:
        file.write(OTHER)
    server.plan, server.seen = [], []
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None]


# --- How it fails -----------------------------------------------------------------


def test_short_bodies_end_after_some_tries(server, url, path):
    lie = {"headers": {"Content-Length": len(WEIGHTS) + 5}}
    server.plan = [lie] * 9
    message = failure(url, path)
    # The rest does not exist (416), so it starts over, which is no progress.
    assert server.ranges() == [None, "bytes=3000001-", None, "bytes=3000001-"]
    assert "HTTP 416" in message
    assert files(path) == {f"{FILE}.lock"}


def test_connection_that_always_drops_keeps_what_came(server, url, path):
    server.plan = [{"cut": 1_000_000}, *[{"cut": 0}] * 9]
    failure(url, path)
    assert len(server.seen) == 1 + 1 + len(download.WAITS) - 1
    assert download.kept(url, path) == 1_000_000


def test_progress_renews_the_tries(server, url, path):
    server.plan = [{"cut": 100_000}] * 20
    assert downloaded(url, path) == WEIGHTS
    assert len(server.seen) == 21


def test_silent_server_is_given_up(server, url, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "WAITS", (0.0,))
    server.plan = [{"cut": 1_000_000, "stall": 20}, {"cut": 0, "stall": 20}]
    server.plan += [{"cut": 0, "stall": 20}]
    assert "timed out" in failure(url, path)
    assert download.kept(url, path) == 1_000_000


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusal_is_told_at_once(status, server, url, path):
    server.plan = [{"status": status}] * 2
    assert f"HTTP {status}" in failure(url, path)
    assert len(server.seen) == 1
    assert files(path) == {f"{FILE}.lock"}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_overloaded_server_is_asked_again(status, server, url, path):
    server.plan = [{"status": status}] * 2
    assert downloaded(url, path) == WEIGHTS
    assert len(server.seen) == 3


def test_refused_connection_is_told_at_once(path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", raiser(AssertionError("waited")))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        message = failure(f"http://127.0.0.1:{port}{ADDRESS}", path)
    assert message == "no connection (Connection refused)"


def test_unknown_host_is_told_at_once(url, path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", raiser(AssertionError("waited")))
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", raiser(error))
    assert failure(url, path) == "no connection (Name or service not known)"


def test_connection_lost_half_way_is_waited_for(server, url, path, monkeypatch):
    server.plan = [{"cut": 1_000_000}]
    connect, calls = socket.create_connection, []

    def flaky(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        return connect(*arguments, **options)

    monkeypatch.setattr(socket, "create_connection", flaky)
    assert downloaded(url, path) == WEIGHTS
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Length": None}, "how long"),
        ({"Content-Length": 0}, "how long"),
        ({"Content-Length": "many"}, "how long"),
        ({"Content-Type": "text/html; charset=utf-8"}, "text/html"),
        ({"Content-Encoding": "gzip"}, "gzip"),
    ],
    ids=["no-length", "empty", "no-number", "login-page", "compressed"],
)
def test_what_cannot_be_the_file_is_refused(headers, said, server, url, path):
    server.plan = [{"headers": headers}]
    assert said in failure(url, path)
    assert files(path) == {f"{FILE}.lock"}


def test_redirect_is_followed_with_its_range(server, url, path):
    server.files["/else" + ADDRESS] = server.files.pop(ADDRESS)
    moved = {"status": 302, "headers": {"Location": f"{server.url}/else{ADDRESS}"}}
    server.plan = [moved, {"cut": 1_000_000}, moved]
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges() == [None, None, "bytes=1000000-", "bytes=1000000-"]


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/hostname", "data:,x"])
def test_redirect_leads_to_http_only(to, server, url, path):
    server.plan = [{"status": 302, "headers": {"Location": to}}]
    assert "HTTP 302" in failure(url, path)
    assert len(server.seen) == 1


def test_redirect_from_https_to_http_is_refused():
    request = download.urllib.request.Request("https://example.invalid/a")
    follow = download._Redirects().redirect_request
    arguments = (request, None, 302, "Found", {})
    assert follow(*arguments, "https://example.invalid/b").type == "https"
    with pytest.raises(OSError, match="not HTTPS"):
        follow(*arguments, "http://example.invalid/b")


def test_address_with_a_bad_port_fails(path):
    assert "port" in failure(f"http://127.0.0.1:port{ADDRESS}", path)


def test_full_disk_is_told_before_anything_is_written(url, path, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    message = failure(url, path, download.DiskFull)
    assert message == f"it needs 3.0 MB and 1.0 kB are free in {path.parent}"
    assert files(path) == {f"{FILE}.lock"}


def test_disk_that_fills_up_keeps_what_came(server, url, path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A real error of the system in the middle of writing: no file beyond 1.5 MB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        message = failure(url, path, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    size = download.kept(url, path)
    assert size > 1_000_000 and len(server.seen) == 1
    assert downloaded(url, path) == WEIGHTS
    assert server.ranges()[1] == f"bytes={size}-"


def test_interruption_by_the_user_is_no_error(url, path, monkeypatch):
    monkeypatch.setattr(download._Display, "advance", raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        download.download(url, path)
    assert download.kept(url, path) > 0 and not path.exists()


# --- Two at once ------------------------------------------------------------------


def test_three_processes_fetch_once(server, url, path):
    server.plan = [{"stall": 0.5}]
    children = [python(f"download.WAITS = ()\n{call(url, path)}") for _ in range(3)]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out) == (0, ""), err
    assert path.read_bytes() == WEIGHTS
    assert len(server.seen) == 1


def test_waiting_for_another_process_is_said(server, url, path, capsys):
    path.parent.mkdir()
    with open(path.with_name(f"{FILE}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=download.download, args=(url, path))
        waiting.start()
        deadline = time.monotonic() + 60
        while (err := capsys.readouterr().err) == "" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert err == f"{FILE}: another process fetches it; waiting.\n"
        assert server.seen == []
        path.write_bytes(WEIGHTS)
    waiting.join()
    assert server.seen == []  # the other one has fetched it


# --- What went wrong, in words ----------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "No space left on"),
        (download.urllib.error.URLError(TimeoutError("timed out")), "timed out"),
        (ValueError("first line.\nsecond line"), "first line"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["system", "inside", "lines", "silent"],
)
def test_reason_is_one_line_without_a_stop(error, said):
    reason = download.reason(error)
    assert reason.startswith(said) and "\n" not in reason and reason[-1] != "."
