"""The Systolith chip: synthesizable Amaranth HDL and the definitions everything derives from."""
