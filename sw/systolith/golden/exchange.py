"""Which lanes' words SHUFFLE gives to which."""

from __future__ import annotations

import numpy as np
from systolith_hdl.isa import SHUFFLE_GROUP


def shuffle_sources(fields: dict[str, int], lanes: int) -> np.ndarray:
    """The lane that each lane of the destination takes its word from, in a core of so many."""
    own = np.arange(fields["lanes"])
    if fields["spread"]:
        return np.full_like(own, fields["lane"])
    group = min(SHUFFLE_GROUP, lanes)
    select = np.array([fields[f"select.{place}"] for place in range(group)])
    return own - own % group + select[own % group]
