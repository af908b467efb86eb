"""Lanes as loops: bit for bit, in every cycle, the Verilog they stand for."""

import numpy as np
import pytest
from systolith.runtime.lanes import Component, with_loops
from systolith_hdl.toolchain import ToolError
from systolith_tb.loops import COMPONENTS, signatures
from systolith_tb.runner import seed_of_run

CYCLES = 20_000


@pytest.mark.parametrize("fast", [False, True], ids=["gates", "fast"])
def test_loops_equal_the_verilog_in_every_cycle(fast: bool) -> None:
    random = np.random.default_rng(seed_of_run()).integers(0, 1 << 32, CYCLES, np.uint32)
    expected = signatures(random, loops=False, fast=fast)
    found = signatures(random, loops=True, fast=fast)
    for place, name in enumerate(COMPONENTS):
        assert len(np.unique(expected[:, place])) > 0.95 * CYCLES, f"{name} says nothing"
        different = np.flatnonzero(expected[:, place] != found[:, place])
        assert len(different) == 0, f"{name}: first different in cycle {different[0]}"


def cell(kind: str, **connections: list) -> dict:
    parameters = {"A_SIGNED": "0", "B_SIGNED": "0"}
    return {"type": kind, "parameters": parameters, "connections": connections}


def component(cells: dict) -> Component:
    ports = {
        "a": {"direction": "input", "bits": [2, 3]},
        "o": {"direction": "output", "bits": [4, 5]},
    }
    return Component("example", {"ports": ports, "cells": cells, "netnames": {}})


def test_what_no_loop_can_hold_is_refused() -> None:
    odd = component({"x": cell("$div", A=[2, 3], B=[3, 2], Y=[4, 5])})
    with pytest.raises(ToolError, match=r"example: no loop can hold a cell of type \$div"):
        odd.expression("v0")
    with pytest.raises(ToolError, match=r"no loop can hold cell x of type \$sdff"):
        component({"x": cell("$sdff", D=[2, 3], Q=[4, 5])})
    ring = component({"x": cell("$not", A=[6, 3], Y=[4, 5]), "y": cell("$not", A=[4, 5], Y=[6, 7])})
    with pytest.raises(ToolError, match="waits for itself"):
        ring.cone([4, 5])


def test_a_design_without_lanes_stays_as_it_is() -> None:
    text = "module plain(a, o);\n  input a;\n  output o;\n  assign o = a;\nendmodule\n"
    found, header, cpp = with_loops(text)
    assert found == text
    assert "_step" not in header + cpp
