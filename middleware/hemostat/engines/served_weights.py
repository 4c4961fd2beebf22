"""The weights that are compared with the reference now, by what the engines' plugins report."""

from __future__ import annotations

from collections.abc import Collection

from hemostat.engines.registry import EngineRegistry


class ServedWeights:
    """Owns the fingerprint in force of one model's weights; "" while none is known.

    Engines with different weights under one name are a rolling update (or its end): the weights in force stay until no
    engine reports them any more. Engines that report none, or that are silent, change nothing.
    """

    def __init__(self, engines: EngineRegistry) -> None:
        self._engines = engines
        self._model = ""
        self._current = ""

    def of(self, model: str, names: Collection[str], now: float) -> str:
        """Returns the fingerprint of the weights that are compared now; "" if it is not known. model: the first of its
        served `names`. now: monotonic seconds.
        """
        if model != self._model:
            self._model, self._current = model, ""
        live = self._engines.weights(names, now)
        if len(live) == 1:
            self._current = next(iter(live))
        elif live and self._current and self._current not in live:
            self._current = max(sorted(live), key=live.__getitem__)
        return self._current
