"""planted_real.py: one seed, small: a repair gives back what a planted defect took."""

import json

import pytest

from benchmarks import planted_real
from real import backbone

SUMMARY = {
    "images": 60,
    "against_truth": {
        "block": 4,
        "unit": 17,
        "clamped_at": 12.3456,
        "clamped": {
            "repaired_on": {
                "defective_patches": 0.5,
                "cosine_of_defective_tokens": 0.25,
                "cosine_of_sound_tokens": 0.94,
            },
            "held_out": {
                "defective_patches": 1.0,
                "cosine_of_defective_tokens": None,
                "cosine_of_sound_tokens": 0.93,
            },
        },
    },
}


def test_a_row_tells_both_kinds_of_photographs():
    row = planted_real.row(3, 4, "clamped", SUMMARY)
    assert row.startswith("| 3 | 4 / 4 | clamped at 12.35 | 60 | 0.50 / 1.00 | ")
    assert row.endswith(" | 0.250 / - | 0.940 / 0.930 |")


@pytest.mark.real
def test_a_repair_gives_back_what_a_planted_defect_took(tmp_path, capsys):
    arguments = [f"--checkpoint={backbone()}", f"--out={tmp_path}", "--seeds=1"]
    arguments += ["--images=60", "--measure=3", "--config.image_size=224"]
    # Six of 256 tokens stand six deviations out at most, fewer than twelve of 1,369.
    # Six of 256 tokens stand six deviations out at most, fewer than twelve of 1,369;
    # and larger steps, for there are few images.
    arguments += ["--config.mask_thr=5.0", "--config.lr=3e-5"]
    assert planted_real.main([*arguments, "--config.picture_every=1000"]) == 0
    summary = json.loads((tmp_path / "seed0" / "summary.json").read_text())
    told = summary["against_truth"]
    assert (
        f"| 0 | {told['block']} / {told['block']} | repair" in capsys.readouterr().out
    )
    # Measured: 0.98 and 0.93, on other photographs than those repaired on.
    for name, cosine in (("repaired_on", 0.95), ("held_out", 0.85)):
        before, after = told["no_repair"][name], told["repair"][name]
        assert before["defective_patches"] >= 3
        assert before["cosine_of_defective_tokens"] < 0.3
        assert after["defective_patches"] <= before["defective_patches"] / 10
        assert after["cosine_of_defective_tokens"] > cosine
        assert after["cosine_of_sound_tokens"] > before["cosine_of_sound_tokens"]
        # The controls fail in at least one of the three.
        clamped, other = told["clamped"][name], told["random_directions"][name]
        assert clamped["cosine_of_defective_tokens"] < 0.6
        assert other["defective_patches"] > before["defective_patches"] / 2
