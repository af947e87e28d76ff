"""`--profile`: which spans are accepted, and when a trace starts and stops."""

import jax
import jax.numpy as jnp
import pytest

import bucket
from experiments.run.tracing import Span, Tracer, parse


def test_start_and_stop_are_numbers_of_images():
    assert parse("100:120") == Span(100, 120)
    assert parse("0:1") == Span(0, 1)


@pytest.mark.parametrize(
    "text", ["", "5", "5:", ":5", "a:b", "1:2:3", "-1:5", "1.5:3", " 1:2", "²:3"]
)
def test_what_is_no_span_is_refused(text):
    with pytest.raises(ValueError, match="--profile=.*START:STOP"):
        parse(text)


@pytest.mark.parametrize("text", ["5:5", "6:5"])
def test_an_empty_span_is_refused(text):
    with pytest.raises(ValueError, match="START must be smaller than STOP"):
        parse(text)


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the profiler, which is replaced."""
    made = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: made.append(("start", str(folder)))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(("stop",)))
    return made


def run(tracer, positions, calls):
    """The positions at which something was asked."""
    seen = []
    with tracer:
        for position in positions:
            before = len(calls)
            tracer.at(position, jnp.zeros(2))
            seen += [position] * (len(calls) - before)
    return seen


@pytest.mark.parametrize(
    ("positions", "asked"),
    [
        (range(10), [3, 6]),
        (range(0, 20, 4), [4, 8]),  # four images per step
        (range(5, 10), [5, 6]),  # resumed in the middle
        ([*range(5)], [3]),  # the loop ends in between
    ],
)
def test_a_trace_starts_and_stops_once(positions, asked, calls, tmp_path):
    assert run(Tracer(Span(3, 6), tmp_path), positions, calls) == asked
    assert calls == [("start", str(tmp_path / "profile")), ("stop",)]


def test_an_error_in_the_loop_completes_the_trace(calls, tmp_path):
    with pytest.raises(KeyboardInterrupt), Tracer(Span(0, 9), tmp_path) as tracer:
        tracer.at(0)
        raise KeyboardInterrupt
    assert calls[-1] == ("stop",)


def test_without_a_span_nothing_is_traced(calls, tmp_path, capsys):
    assert run(Tracer(None, tmp_path), range(5), calls) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("positions", [range(3), range(6, 9), ()])
def test_a_span_that_was_never_reached_is_said(positions, calls, tmp_path, capsys):
    assert run(Tracer(Span(3, 6), tmp_path), positions, calls) == []
    assert "no step began from 3 to 6 images" in capsys.readouterr().err


def test_a_profiler_that_fails_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    def fail(folder):
        raise RuntimeError("another trace is running")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    with Tracer(Span(0, 2), tmp_path) as tracer:
        for position in range(4):
            tracer.at(position)
    message = "warning: --profile: no trace: another trace is running\n"
    assert capsys.readouterr().err == message


def test_a_trace_for_a_bucket_is_uploaded(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path / "cloud")
    folders = []

    def start(folder):
        folders.append(folder)
        (folder / "plugins").mkdir()
        (folder / "plugins" / "host.xplane.pb").write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with Tracer(Span(0, 1), "gs://b/run") as tracer:
        tracer.at(0)
        tracer.at(1)
    stored = tmp_path / "cloud" / "b" / "run" / "profile"
    assert (stored / "plugins" / "host.xplane.pb").read_bytes() == b"trace"
    assert not folders[0].exists()


def test_a_trace_is_really_written(tmp_path):
    step = jax.jit(lambda x: x @ x)
    with Tracer(Span(1, 2), tmp_path) as tracer:
        for position in range(4):
            tracer.at(position)
            jax.block_until_ready(step(jnp.ones((8, 8))))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
