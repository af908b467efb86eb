"""The vector engine's bench."""

from systolith_hdl.config import get_config
from systolith_hdl.vector.engine import VectorEngine
from systolith_tb.runner import run_bench


def test_vector_engine() -> None:
    config = get_config("nano")
    engine = VectorEngine(config, number=config.engines.index("vector"))
    assert run_bench(engine, "vector", "systolith_tb.bench_vector") == 6
