"""Functions that the chip has in hardware, as JAX primitives with derivatives.

They run and differentiate under plain JAX as well. The chip computes each from a table of its own,
in one instruction, and so it does the first derivatives. Higher ones are ordinary arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.source_info_util import register_exclusion
from jax.interpreters import ad, batching, mlir

__all__ = ["gelu", "softplus"]

# Messages and debug maps name the statement that called into this module.
register_exclusion(__file__)

_gelu_p = Primitive("systolith_gelu")
_gelu_dx_p = Primitive("systolith_gelu_dx")
_softplus_p = Primitive("systolith_softplus")


def _cdf(x: Any) -> Any:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _density(x: Any) -> Any:
    return jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


def _gelu(x: Any) -> Any:
    return x * _cdf(x)


def _gelu_dx(x: Any) -> Any:
    return _cdf(x) + x * _density(x)


def _define(primitive: Any, reference: Any) -> None:
    """Gives an elementwise primitive the meaning of a plain JAX function."""
    primitive.def_impl(jax.jit(reference))
    primitive.def_abstract_eval(lambda x: x.update(weak_type=False))
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=False))
    batching.defvectorized(primitive)


_define(_gelu_p, _gelu)
_define(_gelu_dx_p, _gelu_dx)
_define(_softplus_p, jax.nn.softplus)
ad.defjvp(_gelu_p, lambda g, x: g * _gelu_dx_p.bind(x))
ad.defjvp(_gelu_dx_p, lambda g, x: g * (_density(x) * (2.0 - x * x)))


ad.defjvp(_softplus_p, lambda g, x: g * jax.lax.logistic(x))


def _floats(x: jax.Array, name: str) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floats, not {x.dtype.name}")
    return x


def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)``, Phi the standard normal distribution function (the erf form).

    One instruction of the scalar engine; so is its derivative.
    """
    return _gelu_p.bind(_floats(x, "gelu"))


def softplus(x: jax.Array) -> jax.Array:
    """``log(1 + exp(x))``, without overflow. Its derivative is the logistic function.

    One instruction of the scalar engine; so is its derivative.
    """
    return _softplus_p.bind(_floats(x, "softplus"))
