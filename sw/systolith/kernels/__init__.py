"""The kernel library: functions for `systolith.jit` code, or alone with ``.on(device)``.

See docs/kernel-library.md.
"""

from .attention import attention, attention_forward, attention_grad
from .embedding import embedding, embedding_grad, scatter_add
from .image import avg_pool, avg_pool_grad, conv2d, conv2d_grad, max_pool, max_pool_grad
from .mlp import gelu_mlp, swiglu_mlp
from .norm import (
    batch_norm,
    batch_norm_grad,
    layernorm,
    layernorm_grad,
    rmsnorm,
    rmsnorm_grad,
)
from .optimizer import adamw
from .order import cumsum, top_k
from .products import matmul, transpose
from .softmax import (
    cross_entropy,
    cross_entropy_forward,
    cross_entropy_grad,
    softmax,
    softmax_grad,
)

__all__ = [
    "adamw",
    "attention",
    "attention_forward",
    "attention_grad",
    "avg_pool",
    "avg_pool_grad",
    "batch_norm",
    "batch_norm_grad",
    "conv2d",
    "conv2d_grad",
    "cross_entropy",
    "cross_entropy_forward",
    "cross_entropy_grad",
    "cumsum",
    "embedding",
    "embedding_grad",
    "gelu_mlp",
    "layernorm",
    "layernorm_grad",
    "matmul",
    "max_pool",
    "max_pool_grad",
    "rmsnorm",
    "rmsnorm_grad",
    "scatter_add",
    "softmax",
    "softmax_grad",
    "swiglu_mlp",
    "top_k",
    "transpose",
]
