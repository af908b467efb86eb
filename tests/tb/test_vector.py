"""The vector engine's bench."""

from systolith_hdl.config import get_config
from systolith_hdl.vector.engine import VectorEngine
from systolith_tb.runner import run_bench


def test_vector_engine() -> None:
    assert run_bench(VectorEngine(get_config("nano")), "vector", "systolith_tb.bench_vector") == 5
