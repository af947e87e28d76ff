"""convert/statements.py: who says what, contradictions, and values of wrong types."""

import pytest

from convert import statements
from convert.statements import Statement, Told, settle, statement
from samples import error_of


def test_the_first_claim_counts_and_the_rest_must_agree():
    told = Statement("num_heads", 16, "num_attention_heads=16 in config.json")
    tensors = statement("embed_dim", 1280, "the tensors")
    same = statement("num_heads", 16, "the arguments")
    assert settle([tensors, told, same]) == {"embed_dim": tensors, "num_heads": told}
    other = statement("num_heads", 20, "the arguments")
    assert error_of(settle, [told, other]) == (
        "num_heads=20 in the arguments contradicts num_attention_heads=16 in "
        "config.json"
    )


def test_the_last_claim_about_resampling_counts():
    hub = statement("interpolate_offset", 0.1, "the hub")
    mine = statement("interpolate_offset", 0.0, "the arguments")
    assert settle([hub, mine]) == {"interpolate_offset": mine}


@pytest.mark.parametrize(
    ("read", "right", "wrong"),
    [
        (statements.integer, [0, 5], [True, 5.0, "5", None, -1, 10**400, [5]]),
        (statements.number, [0, 1e-6], [True, "1", None, -1e-6, float("nan"), 10**400]),
        (statements.side, [14, [14, 14]], [0, [14], [14, 7], "14", [14.0, 14.0], None]),
        (
            statements.finite,
            ["x", {"a": [None]}],
            [float("nan"), {"a": [float("inf")]}],
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_by_file_and_key(read, right, wrong):
    for value in right:
        (found,) = Told("config.json", {"key": value}).statements("key", "field", read)
        assert found.field == "field" and "key=" in found.words
    for value in wrong:
        message = error_of(Told("config.json", {"key": value}).read, "key", read)
        assert message.startswith("config.json: got key=") and ", expected " in message
    assert not list(Told("config.json", {}).statements("key", "field", read))


def test_what_is_required_has_a_type():
    told = Told("config.json", {"bias": 1, "act": "gelu"})
    told.require("act", "gelu", "gelu_new")
    told.require("missing", True)
    message = error_of(told.require, "bias", True)
    assert "config.json: got bias=1, expected True" in message
