"""Device, DeviceArray and jit."""

import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith_hdl.config import ConfigError


@pytest.fixture
def device():
    with systolith.Device("golden", config="nano") as opened:
        yield opened


class Pair(NamedTuple):
    first: object
    second: object


def ones(*shape):
    return np.ones(shape, np.float32)


def test_same_pytrees_in_and_out(device):
    def fn(pair, scale, *, offset, nothing=None):
        return {"sum": pair.first + pair.second["b"], "pair": Pair(pair.first * scale, [offset])}

    args = (Pair(ones(3), {"b": ones(3)}), 2.0)
    got = systolith.jit(fn, device=device)(*args, offset=np.float32(4))
    want = fn(*jax.tree.map(jnp.asarray, args), offset=jnp.float32(4))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_decorator(device):
    @systolith.jit(device=device)
    def double(x):
        """Doubles."""
        return 2.0 * x

    np.testing.assert_array_equal(double(ones(3)), 2 * ones(3))
    assert double.__name__ == "double" and double.__doc__ == "Doubles."


@pytest.mark.parametrize(
    "argument", [1.5, np.float32(1.5), np.float64(1.5), jnp.float32(1.5), ones(2, 3), jnp.ones(3),
                 True, np.array([True, False]), ones(3).astype(ml_dtypes.bfloat16),
                 np.array([[-1, 2**31 - 1]], np.int32), np.int32(-5),
                 np.arange(-3, 3).astype(np.int8)],
)  # fmt: skip
def test_kinds_of_arguments(device, argument):
    got = systolith.jit(lambda x: x, device=device)(argument)
    want = jnp.asarray(argument)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_python_floats_do_not_promote(device):
    got = systolith.jit(lambda x, scale: x * scale, device=device)(
        ones(3).astype(ml_dtypes.bfloat16), 3.0
    )
    assert got.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "argument,words",
    [
        (np.ones(3), "float64"), (np.ones(3, np.int64), "int64"), (np.ones(3, complex), "complex"),
        (np.ones(3, np.uint8), "uint8"), (np.ones(3, ml_dtypes.float8_e4m3), "float8_e4m3"),
        (3, "int 3"),
        ("text", "str"), (jax.random.key(0), "key"),
    ],
)  # fmt: skip
def test_types_the_chip_lacks_name_the_argument(device, argument, words):
    fn = systolith.jit(lambda x, params: params["w"][1], device=device)
    with pytest.raises(TypeError, match=words) as caught:
        fn(1.0, {"w": [1.0, argument]})
    assert "arg1['w'][1]" in str(caught.value)


def test_shapes_the_chip_lacks(device):
    fn = systolith.jit(lambda x: x, device=device)
    for shape in ((2, 2, 2), (0,), (3, 0)):
        with pytest.raises(systolith.UnsupportedError, match="arg0"):
            fn(ones(*shape))


def test_shapes_that_do_not_go_together(device):
    """A wrong shape at call time is JAX's own error, with both shapes, and harms nothing."""
    fn = systolith.jit(lambda x, w: x @ w, device=device)
    good = ones(3, 4), ones(4, 2)
    fn(*good)
    with pytest.raises(TypeError, match=r"(?s)dot_general.*\(3, 5\).*\(4, 2\)|contracting.*5.*4"):
        fn(ones(3, 5), ones(4, 2))
    np.testing.assert_array_equal(np.asarray(fn(*good)), np.full((3, 2), 4, np.float32))


def test_compiles_once_for_each_signature(device):
    traced = []

    def fn(x):
        traced.append(None)
        return jax.tree.map(lambda leaf: leaf + 1.0, x)

    compiled = systolith.jit(fn, device=device)
    for argument in (ones(3), 2 * ones(3), jnp.ones(3), device.put(ones(3))):
        compiled(argument)
    assert len(traced) == 1
    compiled(ones(4))  # another shape
    compiled(ones(4).astype(ml_dtypes.bfloat16))  # another type
    compiled([ones(4)])  # another structure
    assert len(traced) == 4
    compiled(ones(3))
    assert len(traced) == 4


def test_state_stays_on_the_device(device, monkeypatch):
    written = []
    write = device.driver.write
    monkeypatch.setattr(
        device.driver, "write", lambda tensor, array: (written.append(tensor), write(tensor, array))
    )
    step = systolith.jit(lambda state, x: (state + x, state.sum()), device=device)
    state = ones(3, 5)
    for _ in range(4):
        state, total = step(state, 1.0)
    assert len(written) == 1 + 4  # the state once, the scalar every time
    np.testing.assert_array_equal(state, 5 * ones(3, 5))
    assert float(total) == 4 * 15


def test_same_array_for_two_arguments(device):
    x = device.put(ones(3))
    np.testing.assert_array_equal(systolith.jit(lambda a, b: a + b, device=device)(x, x), 2)


def test_memory_is_freed_with_its_handle(device):
    fn = systolith.jit(lambda x: x + 1.0, device=device)
    x = fn(ones(64))
    before = device.driver._memory.free_units
    for _ in range(10):
        x = fn(x)
    assert device.driver._memory.free_units == before
    del x
    assert device.driver._memory.free_units > before


def test_memory_is_freed_with_the_function(device):
    before = device.driver._memory.free_units
    fn = systolith.jit(lambda x: x + 1.0, device=device)
    fn(ones(64))
    assert device.driver._memory.free_units < before
    del fn
    gc.collect()
    device.put(ones(1))
    assert device.driver._memory.free_units == before


def test_out_of_memory_leaves_the_device_usable():
    with systolith.Device("golden", config="nano", dram_bytes=1 << 14) as device:
        fn = systolith.jit(lambda x: x + 1.0, device=device)
        with pytest.raises(systolith.OutOfMemory):
            fn(ones(64, 64))
        np.testing.assert_array_equal(fn(ones(3)), 2)


def test_closed_device(device):
    fn = systolith.jit(lambda x: x + 1.0, device=device)
    x = fn(ones(3))
    device.close()
    assert device.closed
    with pytest.raises(systolith.DeviceError, match="closed"):
        np.asarray(x)
    with pytest.raises(systolith.DeviceError, match="closed"):
        fn(ones(3))
    with pytest.raises(systolith.DeviceError, match="closed"):
        device.put(ones(3))
    device.close()
    del x, fn
    gc.collect()


def test_array_of_another_device(device):
    with systolith.Device("golden", config="nano") as other:
        x = other.put(ones(3))
        with pytest.raises(systolith.DeviceError, match="arg0 lies on another device"):
            systolith.jit(lambda x: x, device=device)(x)


def test_device_array(device):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = device.put(array)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 3), 2, 6, 2, np.float32)
    assert "float32[2, 3]" in repr(x)
    np.testing.assert_array_equal(np.asarray(x), array)
    np.testing.assert_array_equal(np.asarray(x, np.float64), array)
    np.testing.assert_array_equal(jnp.asarray(x) + 1, array + 1)
    assert jax.tree.leaves({"x": x}) == [x]
    with pytest.raises(ValueError):
        np.array(x, copy=False)
    scalar = device.put(np.float32(2.5))
    assert float(scalar) == 2.5 and scalar.item() == 2.5
    with pytest.raises(TypeError):
        len(scalar)
    flag = device.put(np.array(True))
    assert flag.dtype == bool and bool(flag) is True
    with pytest.raises(TypeError, match="float64"):
        device.put(np.ones(3))


def test_stats_disassembly_and_program(device, tmp_path):
    fn = systolith.jit(lambda a, b: a @ b, device=device)
    for look in (fn.stats, fn.disassemble):
        with pytest.raises(RuntimeError, match="not called"):
            look()
    fn(ones(5, 6), ones(6, 7))
    stats = fn.stats()
    assert stats["macs"] == 5 * 6 * 7
    assert stats["cycles"] is None and stats["busy"] is None  # golden has no clock
    assert stats["tensor_utilization"] is None
    assert set(stats["instructions"]) == set(device.config.engines)
    assert "MATMUL" in fn.disassemble() and "test_api.py" in fn.disassemble()
    path = tmp_path / "program"
    fn.program.save(path)
    assert systolith.Program.load(path).disassemble() == fn.disassemble()


def test_matmul_type(device):
    with pytest.raises(
        systolith.UnsupportedError,
        match=r"float64.*supported: bfloat16, float16, float8_e4m3fn, float8_e5m2, float32",
    ):
        systolith.jit(lambda x: x, device=device, matmul="float64")


def test_unknown_device_and_config():
    with pytest.raises(systolith.BackendError, match="golden"):
        systolith.Device("fpga")
    with pytest.raises(ConfigError, match="nano"):
        systolith.Device("golden", config="huge")


def test_a_step_that_cannot_be_compiled_leaves_the_device_usable(device):
    fn = systolith.jit(jnp.sort, device=device)
    with pytest.raises(systolith.UnsupportedError):
        fn(ones(3))
    np.testing.assert_array_equal(systolith.jit(jnp.abs, device=device)(-ones(3)), 1)
