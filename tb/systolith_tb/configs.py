"""Configurations of benches and tests: the presets, and small ones of features that no small preset
has."""

import dataclasses
import os

from systolith_hdl.config import PRESETS, CoreConfig

#: Two FP8 products per PE and cycle on the smallest core.
NANO_FP8 = dataclasses.replace(PRESETS["nano"], name="nano-fp8", fp8_rate=2)

CONFIGS: dict[str, CoreConfig] = {**PRESETS, NANO_FP8.name: NANO_FP8}


def bench_config() -> CoreConfig:
    """The configuration that a bench was built with, named by ``$SYSTOLITH_CONFIG``."""
    return CONFIGS[os.environ["SYSTOLITH_CONFIG"]]
