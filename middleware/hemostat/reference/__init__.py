"""Reference models behind one protocol."""

from __future__ import annotations

from hemostat.config.schema import Settings
from hemostat.reference.protocol import Reference


def make_reference(settings: Settings) -> Reference | None:
    """The configured reference, not started; None with `reference.backend: none`."""
    wanted = settings.reference
    match wanted.backend:
        case "transformers":
            from hemostat.reference.transformers import TransformersReference  # noqa: PLC0415  only what is used

            assert wanted.model is not None
            return TransformersReference(wanted.model, wanted.dtype, wanted.device, wanted.threads)
        case "vllm":
            from hemostat.reference.vllm import VllmReference  # noqa: PLC0415

            assert wanted.url is not None
            return VllmReference(wanted.url, wanted.api_key, wanted.model, settings.shadow.top_k)
        case _:
            return None


def make_compressed_scorer(settings: Settings) -> Reference | None:
    """The upstream as a scorer of its own tokens, for the noise floor; None where that is not measured."""
    if settings.reference.backend == "none" or settings.shadow.floor_fraction <= 0.0:
        return None
    from hemostat.reference.vllm import VllmReference  # noqa: PLC0415

    upstream = settings.upstream
    return VllmReference(upstream.url, upstream.api_key, top_k=settings.shadow.top_k, ca=upstream.ca)
