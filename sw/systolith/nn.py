"""Functions that the chip has in hardware, as JAX primitives with derivatives.

They run and differentiate under plain JAX as well. The chip computes each from a table of its own,
in one instruction, and so it does the first derivatives. Higher ones are ordinary arithmetic.
`tabulated` makes such a function of any other, for the chip alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.source_info_util import register_exclusion
from jax.interpreters import ad, batching, mlir

from .kernels.tabulated import tabulated

__all__ = ["gelu", "leaky_relu", "mish", "silu", "softplus", "tabulated"]

# Messages and debug maps name the statement that called into this module.
register_exclusion(__file__)

_gelu_p = Primitive("systolith_gelu")
_gelu_dx_p = Primitive("systolith_gelu_dx")
_gelu_tanh_p = Primitive("systolith_gelu_tanh")
_gelu_tanh_dx_p = Primitive("systolith_gelu_tanh_dx")
_silu_p = Primitive("systolith_silu")
_silu_dx_p = Primitive("systolith_silu_dx")
_mish_p = Primitive("systolith_mish")
_mish_dx_p = Primitive("systolith_mish_dx")
_softplus_p = Primitive("systolith_softplus")


def _cdf(x: Any) -> Any:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _density(x: Any) -> Any:
    return jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


def _gelu(x: Any) -> Any:
    return x * _cdf(x)


def _gelu_dx(x: Any) -> Any:
    return _cdf(x) + x * _density(x)


def _gelu_tanh(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=True)


def _gelu_tanh_dx(x: Any) -> Any:
    scale = math.sqrt(2.0 / math.pi)
    t = jnp.tanh(scale * (x + 0.044715 * x * x * x))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (scale * (1.0 + 3 * 0.044715 * x * x))


def _silu_dx(x: Any) -> Any:
    s = jax.lax.logistic(x)
    return s * (1.0 + x * (1.0 - s))


def _mish(x: Any) -> Any:
    return x * jnp.tanh(jax.nn.softplus(x))


def _mish_dx(x: Any) -> Any:
    t = jnp.tanh(jax.nn.softplus(x))
    return t + x * (1.0 - t * t) * jax.lax.logistic(x)


def _define(primitive: Any, reference: Any) -> None:
    """Gives an elementwise primitive the meaning of a plain JAX function."""
    primitive.def_impl(jax.jit(reference))
    primitive.def_abstract_eval(lambda x: x.update(weak_type=False))
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=False))
    batching.defvectorized(primitive)


_define(_gelu_p, _gelu)
_define(_gelu_dx_p, _gelu_dx)
_define(_gelu_tanh_p, _gelu_tanh)
_define(_gelu_tanh_dx_p, _gelu_tanh_dx)
_define(_silu_p, lambda x: x * jax.lax.logistic(x))
_define(_silu_dx_p, _silu_dx)
_define(_mish_p, _mish)
_define(_mish_dx_p, _mish_dx)
_define(_softplus_p, jax.nn.softplus)
ad.defjvp(_gelu_p, lambda g, x: g * _gelu_dx_p.bind(x))
ad.defjvp(_gelu_dx_p, lambda g, x: g * (_density(x) * (2.0 - x * x)))
ad.defjvp(_softplus_p, lambda g, x: g * jax.lax.logistic(x))
for _p, _dx_p, _dx in (
    (_gelu_tanh_p, _gelu_tanh_dx_p, _gelu_tanh_dx),
    (_silu_p, _silu_dx_p, _silu_dx),
    (_mish_p, _mish_dx_p, _mish_dx),
):
    ad.defjvp(_p, lambda g, x, _dx_p=_dx_p: g * _dx_p.bind(x))
    # the second derivative: that of the formula
    ad.defjvp(_dx_p, lambda g, x, _dx=_dx: jax.jvp(_dx, (x,), (g,))[1])


def _floats(x: jax.Array, name: str) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floats, not {x.dtype.name}")
    return x


def gelu(x: jax.Array, approximate: bool = False) -> jax.Array:
    """``x * Phi(x)``, Phi the standard normal distribution function (the erf form); with
    `approximate` ``x * (1 + tanh(u)) / 2``, u = sqrt(2 / pi) (x + 0.044715 x^3) (the tanh form).

    One instruction of the scalar engine; so is its derivative.
    """
    return (_gelu_tanh_p if approximate else _gelu_p).bind(_floats(x, "gelu"))


def silu(x: jax.Array) -> jax.Array:
    """``x / (1 + exp(-x))``, also known as swish.

    One instruction of the scalar engine; so is its derivative.
    """
    return _silu_p.bind(_floats(x, "silu"))


def mish(x: jax.Array) -> jax.Array:
    """``x * tanh(softplus(x))``.

    One instruction of the scalar engine; so is its derivative.
    """
    return _mish_p.bind(_floats(x, "mish"))


def leaky_relu(x: jax.Array, negative_slope: float = 0.01) -> jax.Array:
    """``x``, or ``negative_slope * x`` where that is negative; the slope is a number.

    One instruction of the vector engine, and one more for the product with its derivative.
    """
    return _leaky_relu(_floats(x, "leaky_relu"), float(negative_slope))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _leaky_relu(x: jax.Array, slope: float) -> jax.Array:
    choose = jnp.maximum if slope <= 1.0 else jnp.minimum
    return choose(x * slope, x)


@_leaky_relu.defjvp
def _leaky_relu_jvp(slope: float, x: Any, g: Any) -> Any:
    (x,), (g,) = x, g
    return _leaky_relu(x, slope), g * jnp.where(x >= 0, 1.0, slope).astype(x.dtype)


def softplus(x: jax.Array) -> jax.Array:
    """``log(1 + exp(x))``, without overflow. Its derivative is the logistic function.

    One instruction of the scalar engine; so is its derivative.
    """
    return _softplus_p.bind(_floats(x, "softplus"))
