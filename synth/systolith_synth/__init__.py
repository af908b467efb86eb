"""Synthesis and place-and-route of the chip or a block, and the report about it.

`targets` says what can be built for; `netlist` takes the elaborated design apart; `flow` runs the
tools; `report` writes what they said; `baseline` holds cell counts against committed ones.
"""
