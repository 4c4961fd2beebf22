"""The objective by which maps are judged: KL(r‖c') after a change of the compressed model's hidden state.

All figures are in a basis in which half a squared length is KL, to second order: with the metric F = L Lᵀ
(`hidden_states.fisher_metric`), hidden states are Lᵀ h and the embedding is (W − w̄) L⁻ᵀ, w̄ the mean embedding, so
that logits are unchanged up to a constant. A change of the hidden state is called an image, [n, d].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hemostat_calibration.arrays import Floats, Ids, Indices, Singles
from hemostat_calibration.learning.contextual.hidden_states import softmax

_BLOCK = 512
"""The number of rows at a time, where each needs a matrix of its own."""


class Lists:
    """The KL over the ids that the reference gave and one bucket for the rest: all that is known of a reference which
    gives only its likeliest ids. The Δz of the bucket is taken to be 0, the Δz of the mean embedding.
    """

    def __init__(self, embedding: Singles, ids: Ids, r: Singles, log_c: Singles) -> None:
        """embedding: [V, d]. ids: [n, J], 0 pads; r: the reference's probabilities of them, 0 where padded; log_c: the
        compressed model's logarithms of them, -inf where padded."""
        self._embedding = embedding
        self._ids, self._r = ids, r
        self._c = np.exp(np.minimum(log_c, 0.0))
        self._behind = np.maximum(1.0 - self._c.sum(axis=1, keepdims=True), 1e-6)

    def _changed(self, rows: Indices, image: Singles) -> tuple[Singles, Singles, Singles]:
        embedded = self._embedding[self._ids[rows]]
        delta = np.clip(np.einsum("tkd,td->tk", embedded, image), -20.0, 20.0)
        return embedded, delta, self._c[rows] * np.exp(delta)

    def slope(self, rows: Indices, image: Singles) -> Singles:
        """Returns the derivative of each row's loss by its image, float32 [n, d]. rows: indices [n]; image: [n, d]."""
        result = np.empty_like(image)
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            embedded, _, c = self._changed(rows[part], image[part])
            c = c / (c.sum(axis=1, keepdims=True) + self._behind[rows[part]])
            result[part] = np.einsum("tk,tkd->td", c - self._r[rows[part]], embedded)
        return result

    def gains(self, rows: Indices, image: Singles, scales: Floats) -> Floats:
        """Returns KL before minus after `scale` × image, nats, [scales, n]."""
        result = np.empty((len(scales), len(rows)))
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            _, delta, _ = self._changed(rows[part], image[part])
            c, r, behind = self._c[rows[part]], self._r[rows[part]], self._behind[rows[part]][:, 0]
            before = np.log(c.sum(axis=1) + behind)
            for i, scale in enumerate(scales):
                after = np.log((c * np.exp(scale * delta)).sum(axis=1) + behind)
                result[i, part] = scale * (r * delta).sum(axis=1) - after + before
        return result


def exact_gains(
    embedding: Singles,
    reference: Singles,
    compressed: Singles,
    images: Sequence[Singles],
    scales: Floats,
    clamp_nats: float,
) -> Floats:
    """Returns KL(r‖c) − KL(r‖c') over the whole vocabulary, for several images of the same rows: [images, scales, n],
    nats.

    Δz = clip(scale × embedding image, ±clamp_nats). embedding: [V, d]. reference, compressed: hidden states [n, d].

    >>> embedding, h_c = np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32)
    >>> h_r = np.array([[1.0, 0.0]], np.float32)
    >>> exact_gains(embedding, h_r, h_c, [h_r - h_c], np.array([0.5, 1.0]), clamp_nats=5.0).round(4).tolist()
    [[[0.0846], [0.1109]]]
    """
    result = np.empty((len(images), len(scales), len(reference)))
    step = max(1, (1 << 23) // len(embedding))
    for start in range(0, len(reference), step):
        part = slice(start, start + step)
        r, c = softmax(reference[part] @ embedding.T), softmax(compressed[part] @ embedding.T)
        for of_image, image in zip(result, images, strict=True):
            delta = image[part] @ embedding.T
            for of_scale, scale in zip(of_image, scales, strict=True):
                shift = np.clip(np.float32(scale) * delta, -clamp_nats, clamp_nats)
                of_scale[part] = np.einsum("tv,tv->t", r, shift)
                np.exp(shift, out=shift)
                of_scale[part] -= np.log(np.einsum("tv,tv->t", c, shift))
    return result
