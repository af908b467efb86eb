"""cocotb benches, their drivers, monitors and scoreboards, and the runner that builds them."""
