"""Slopes against differences of the losses, KL against its definition, hidden states against what made them."""

import numpy as np
import pytest
from tests.support.records import log_softmax

from hemostat_calibration.learning.contextual import hidden_states
from hemostat_calibration.learning.contextual.objective import Lists, exact_gains

V, D, T = 40, 6, 5


def setting(seed=0):
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(V, D)).astype(np.float32)
    c = rng.normal(size=(T, D)).astype(np.float16)
    t = (0.5 * rng.normal(size=(T, D))).astype(np.float16)
    return embedding, c, t, (0.3 * rng.normal(size=(T, D))).astype(np.float32)


def kl(log_r, log_c):
    return (np.exp(log_r) * (log_r - log_c)).sum(-1)


def differences(loss, image, step=1e-3):
    result = np.empty_like(image)
    for j in range(D):
        shift = step * np.eye(D)[j]
        result[:, j] = (loss(image + shift) - loss(image - shift)) / (2.0 * step)
    return result


def test_lists_against_their_definition():
    embedding, c, t, image = setting()
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(V)[:7] for _ in range(T)]).astype(np.int32)
    log_c = log_softmax(c.astype(float) @ embedding.T)
    log_r = log_softmax((c.astype(float) + t) @ embedding.T)
    at_c, at_r = (np.take_along_axis(a, ids, 1) for a in (log_c, log_r))
    at_c[0, 6], at_r[0, 6], ids[0, 6] = -np.inf, -np.inf, 0  # a padded place
    lists = Lists(embedding, ids, np.exp(at_r).astype(np.float32), at_c.astype(np.float32))

    def loss(i):
        p = np.exp(at_c) * np.exp(np.einsum("tkd,td->tk", embedding[ids], i))
        behind = 1.0 - np.exp(at_c).sum(1)
        z = p.sum(1) + behind
        r_behind = 1.0 - np.exp(at_r).sum(1)
        inside = np.where(np.exp(at_r) > 0, np.exp(at_r) * -np.log(np.where(p > 0, p, 1.0) / z[:, None]), 0.0)
        return inside.sum(1) - r_behind * np.log(behind / z)

    everyone = np.arange(T)
    np.testing.assert_allclose(lists.slope(everyone, image), differences(loss, image.astype(float)), atol=3e-3)
    gains = lists.gains(everyone, image, np.array([1.0, 0.5]))
    expected = [loss(np.zeros((T, D))) - loss(s * image.astype(float)) for s in (1.0, 0.5)]
    np.testing.assert_allclose(gains, expected, atol=1e-4)


@pytest.mark.parametrize("clamp", [0.2, 10.0])
def test_exact_gains_are_differences_of_kl(clamp):
    embedding, c, t, image = setting()
    compressed = c.astype(np.float32)
    reference = compressed + t
    log_r, log_c = log_softmax(reference @ embedding.T), log_softmax(compressed @ embedding.T)
    result = exact_gains(embedding, reference, compressed, [image, -image], np.array([1.0, 0.3]), clamp)
    for of_image, sign in zip(result, (1.0, -1.0), strict=True):
        for values, scale in zip(of_image, (1.0, 0.3), strict=True):
            delta = np.clip(sign * scale * image @ embedding.T, -clamp, clamp)
            np.testing.assert_allclose(values, kl(log_r, log_c) - kl(log_r, log_softmax(log_c + delta)), atol=1e-4)


def test_hidden_states_come_back_from_their_logits():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    h = (rng.normal(size=(400, D)) @ rng.normal(size=(D, D)) + 1.0).astype(np.float32)
    known = hidden_states.estimate_prior(h, 0.01)
    for anchors, error in ((20, 0.05), (4, 3.0)):
        rows = weight[:anchors]
        z = h @ rows.T + rng.normal(size=(400, 1))  # a constant of the row says nothing
        offset, gain = hidden_states.linear_recovery(rows, known)
        result = offset + (z - z.mean(1, keepdims=True)) @ gain.T
        assert np.sqrt(np.square(result - h).mean()) < error
        # Too few anchors leave the rest at its mean, not at nothing.
        assert np.square(result - h).mean() < np.square(h - h.mean(0)).mean()
    offset, gain = hidden_states.linear_recovery(weight[:20], hidden_states.isotropic_prior(weight, 0.01))
    z = h @ weight[:20].T
    np.testing.assert_allclose(offset + (z - z.mean(1, keepdims=True)) @ gain.T, h, atol=0.1)


def test_the_metric_is_the_curvature_of_kl():
    rng = np.random.default_rng(0)
    weight = (0.5 * rng.normal(size=(V, D))).astype(np.float32)
    h = rng.normal(size=(64, D)).astype(np.float32)
    metric, mean = hidden_states.fisher_metric(weight, h, damping=0.0)
    log_r = log_softmax(h.astype(float) @ weight.T)
    np.testing.assert_allclose(mean, np.exp(log_r).mean(0), atol=1e-6)
    for _ in range(5):
        step = 0.02 * rng.normal(size=D)
        moved = log_softmax((h + step) @ weight.T)
        assert kl(log_r, moved).mean() == pytest.approx(0.5 * step @ metric @ step, rel=0.03)
    damped, _ = hidden_states.fisher_metric(weight, h, damping=0.1)
    np.testing.assert_allclose(damped - metric, 0.1 * np.trace(metric) / D * np.eye(D), atol=1e-6)


@pytest.mark.parametrize("rare", [0.0, 1.0, 300.0])
def test_the_metric_is_positive_definite_where_every_row_says_the_same(rare):
    """One id has nearly all of the mass, and the few that are left out of the sum lie far away from it."""
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(40, 6)).astype(np.float32)
    weight[1:] *= rare
    weight[0] = 8.0 * np.eye(6)[0]
    weight[1:, 0] = 0.0
    h = np.zeros((20, 6), np.float32)
    h[:, 0] = 1.5
    metric, mean = hidden_states.fisher_metric(weight, h)
    assert mean[0] > hidden_states.METRIC_MASS
    assert np.linalg.eigvalsh(metric).min() > 0.0
    np.linalg.cholesky(metric)
