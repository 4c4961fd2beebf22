"""The best correction b @ a of rank r of a weight's error, in the metric of the inputs and of the outputs.

For a layer y = W x whose compressed weight lacks ΔW = W_reference − W_compressed, the correction minimises

    tr(S_o (ΔW − b a) S_i (ΔW − b a)ᵀ),    S_i = E[x xᵀ],  S_o = E[g gᵀ]

- With S_o = 1 this is E‖(ΔW − b a) x‖², the squared error of the layer's outputs: the exact solution of QERA
  (Zhang et al. 2024, arXiv 2410.06040, theorem 1) and of EoRA (Liu et al. 2024, arXiv 2410.21271). With the diagonal of
  S_i alone it is QERA's approximate one and LQER's (Zhang et al. 2024, arXiv 2402.02446), with neither metric the
  singular value decomposition of ΔW. (LoftQ, Li et al. 2023, arXiv 2310.08659, alternates such a step with the
  quantization. Here the quantized weight is given.)
- With g, the gradient of the loss at the layer's outputs, ½ × the minimum is the expected loss to second order, if
  x and g are independent: the Fisher information of W is then S_i ⊗ S_o (K-FAC, Martens & Grosse 2015,
  arXiv 1503.05671, section 3.1). Such errors can be compared between layers (`sharing`).

**Solution.** With any L_i L_iᵀ = S_i and L_o L_oᵀ = S_o, M = L_oᵀ ΔW L_i = U Σ Vᵀ, the minimum is reached where
L_oᵀ b a L_i = U_r Σ_r V_rᵀ (Eckart & Young 1936, Mirsky 1960), and is the sum of the other squared singular values.
The usual formula b a = L_o⁻ᵀ U_r Σ_r V_rᵀ L_i⁻¹ divides by directions that were never seen. This one does not,

    b a = (ΔW L_i V_r) Σ_r⁻¹ (U_rᵀ L_oᵀ ΔW),

as L_oᵀ (ΔW L_i V_r) Σ_r⁻¹ (U_rᵀ L_oᵀ ΔW) L_i = M V_r Σ_r⁻¹ U_rᵀ M = U_r Σ_r V_rᵀ. It is exact for singular S_i and S_o:
fewer rows than columns, inputs that are always 0 or equal to another, outputs without influence. No ridge is needed.
Among all minimisers it is this one: the code is z = Σ_r⁻¹ U_rᵀ L_oᵀ ΔW x, and b = ΔW L_i V_r is E[ΔW x zᵀ] with
E[z zᵀ] = 1, that is the least-squares prediction of the whole error from the code, also at outputs that S_o gives
no weight. So the mean squared error of no output is larger than without the correction.

**Numerics.** float64. Only the eigenvectors of M Mᵀ or of Mᵀ M are computed, of the smaller side, and only that side's
S is factored. Singular values below about 1e-7 of the largest are lost in rounding, which is 1e-14 of its square:
such components are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError


def low_rank(
    delta: npt.NDArray[np.floating[Any]], rank: int, inputs: Gram | None = None, outputs: Gram | None = None
) -> tuple[LowRank, Floats]:
    """Returns the correction of rank `rank` or less of `delta` [outputs, inputs], and the weighted squared error that
    is left.

    The errors are by rank, float64 [R + 1], R = min(rank, outputs, inputs): the first is without any correction. They
    never increase, and are convex.

    inputs, outputs: second moments of the layer's inputs x and of the gradients at its outputs; None: all directions
    count alike. They are divided by their number of vectors: the error is a mean by token. The correction has fewer
    than R components where more would not reduce the error. Its factors have the lengths that `LowRank.for_rounding`
    gives them. Raises InvalidArgumentError on shapes that do not fit, a negative rank, or values that are not finite.

    >>> delta = np.array([[3.0, 0.0], [0.0, 4.0]])
    >>> factors, errors = low_rank(delta, 1, DiagonalGram(1, np.array([4.0, 1.0])))
    >>> (factors.b @ factors.a).round(6).tolist(), errors.tolist()
    ([[3.0, 0.0], [0.0, 0.0]], [52.0, 16.0])
    """
    if delta.ndim != 2 or rank < 0 or not np.isfinite(delta).all():
        raise InvalidArgumentError(f"delta of shape {delta.shape}, rank {rank}: a finite matrix, and 0 or more")
    for gram, width, name in ((inputs, delta.shape[1], "inputs"), (outputs, delta.shape[0], "outputs")):
        if gram is not None and gram.width != width:
            raise InvalidArgumentError(f"{name} are statistics of {gram.width} entries: the layer has {width}")
    exact = delta.astype(np.float64)
    if delta.shape[0] > delta.shape[1]:
        transposed_a, transposed_b, errors = _solve(exact.T, rank, outputs, inputs)
        a, b = transposed_b.T, transposed_a.T
    else:
        a, b, errors = _solve(exact, rank, inputs, outputs)
    return LowRank(a.astype(np.float32), b.astype(np.float32)).for_rounding(), errors


def _solve(delta: Floats, rank: int, inputs: Gram | None, outputs: Gram | None) -> tuple[Floats, Floats, Floats]:
    """Returns (a, b, errors) where delta [m, n] has m ≤ n: M Mᵀ = L_oᵀ ΔW S_i ΔWᵀ L_o is the smaller side.

    M Mᵀ U = U Σ², so ΔW L_i V = ΔW L_i Mᵀ U Σ⁻¹ = ΔW S_i ΔWᵀ L_o U Σ⁻¹: L_i is not needed.
    """
    weighted = _times(delta, inputs)
    second = weighted @ delta.T
    root = _root(outputs)
    projected = second if root is None else _scaled(_scaled(second, root).T, root)
    values, vectors = np.linalg.eigh(0.5 * (projected + projected.T))
    most = min(rank, len(values))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    errors = np.append(np.cumsum(values[::-1])[::-1], 0.0)[: most + 1]
    kept = int((values[:most] > len(values) * np.finfo(np.float64).eps * values[:1].sum()).sum())
    lifted = vectors[:, :kept] if root is None else _unprojected(root, vectors[:, :kept])
    singular = np.sqrt(values[:kept])
    return (lifted.T @ delta) / singular[:, None], (second @ lifted) / singular, errors


def _root(gram: Gram | None) -> Floats | None:
    """Returns L with L Lᵀ = S: [width, width], or [width] where it is diagonal; None for S = 1."""
    if gram is None:
        return None
    mean = gram.mean()
    if isinstance(gram, DiagonalGram):
        diagonal: Floats = np.sqrt(np.maximum(mean, 0.0))
        return diagonal
    result: Floats
    try:
        result = np.asarray(np.linalg.cholesky(mean), dtype=np.float64)
    except np.linalg.LinAlgError:  # singular, as with fewer vectors than entries
        values, vectors = np.linalg.eigh(mean)
        result = vectors * np.sqrt(np.maximum(values, 0.0))
    return result


def _times(matrix: Floats, gram: Gram | None) -> Floats:
    """Returns matrix S."""
    if gram is None:
        return matrix
    return matrix @ gram.mean() if isinstance(gram, FullGram) else matrix * gram.mean()


def _scaled(matrix: Floats, root: Floats) -> Floats:
    """Returns matrix L."""
    return matrix @ root if root.ndim == 2 else matrix * root


def _unprojected(root: Floats, vectors: Floats) -> Floats:
    """Returns L vectors."""
    return root @ vectors if root.ndim == 2 else root[:, None] * vectors
