"""Settings of the general plugin, from the environment of vLLM's processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hemostat_calibration.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """folder: where adapters are written; None: the folder for temporary files. cpu_product: see `grouped`."""

    folder: Path | None = None
    cpu_product: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> AdapterSettings:
        """HEMOSTAT_ADAPTER_DIR, HEMOSTAT_ADAPTERS_CPU_PRODUCT. Raises InvalidArgumentError."""
        product = environment.get("HEMOSTAT_ADAPTERS_CPU_PRODUCT") or "1"
        if product not in ("0", "1"):
            raise InvalidArgumentError(f"HEMOSTAT_ADAPTERS_CPU_PRODUCT is {product!r}: it must be 0 or 1")
        folder = environment.get("HEMOSTAT_ADAPTER_DIR") or None
        return cls(Path(folder) if folder else None, product == "1")
