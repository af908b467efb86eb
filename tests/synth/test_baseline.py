"""The area of nano does not creep up."""

import copy
import json

from systolith_synth import baseline


def test_nano_has_not_grown() -> None:
    grown = baseline.growth(baseline.measure(), json.loads(baseline.PATH.read_text()))
    assert not grown, (
        f"cells of {baseline.CONFIG} grew by more than {baseline.LIMIT:.0%}:\n{grown}\n"
        "If it has to be: .venv/bin/python -m systolith_synth.baseline"
    )


def test_growth_names_the_block() -> None:
    before = json.loads(baseline.PATH.read_text())
    now = copy.deepcopy(before)
    assert baseline.growth(now, before) == ""
    more = 0.04 * before["total"]["lut"]
    now["total"]["lut"] += more
    now["mac_narrow"]["lut"] += more
    lines = baseline.growth(now, before).splitlines()
    assert len(lines) == 2 and lines[0].startswith("lut:") and "mac_narrow" in lines[1]
    now["total"]["lut"] -= 0.02 * before["total"]["lut"]
    assert baseline.growth(now, before) == ""
    now["total"]["latch"] = 1
    assert baseline.growth(now, before).startswith("latch: 0 -> 1 (new)")
