"""The grouped products on a CPU, against vLLM's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402 - only where vLLM is installed

from hemostat_engine import product  # noqa: E402
from hemostat_engine.adapters import grouped, punica  # noqa: E402

SLOTS = 3
"""The last one is always empty, as where a slot is kept free; vLLM's operations are right only then."""
IDS = (7, 8, None)
VOCAB_SIZE = 40


class Grouped(PunicaWrapperCPU):  # type: ignore[misc] # the base is vLLM's
    """vLLM's class with our operations."""


punica.install(Grouped)


def both(ids: Sequence[int], prefill: bool = True, samples: Sequence[int] | None = None) -> list[Any]:
    """One of each, for rows that use the adapters with these ids (0: none)."""
    mapping = SimpleNamespace(
        index_mapping=tuple(ids), prompt_mapping=tuple(ids if samples is None else samples), is_prefill=prefill
    )
    result = []
    for wrapper_class in (PunicaWrapperCPU, Grouped):
        wrapper = wrapper_class(256, 256, "cpu")
        wrapper.update_metadata(mapping, list(IDS), SLOTS + 1, VOCAB_SIZE)
        result.append(wrapper)
    return result


def weights(
    generator: Any, inputs: int, outputs: Sequence[int], rank: int, used: int, dtype: Any, four: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A layer's buffers, padded to `rank`; the adapter in slot 1 has the rank `used`, that in slot 0 all of it."""
    a = [torch.randn(SLOTS, rank, inputs, generator=generator) / inputs**0.5 for _ in outputs]
    b = [torch.randn(SLOTS, size, rank, generator=generator) / max(rank, 1) ** 0.5 for size in outputs]
    for left, right in zip(a, b, strict=True):
        left[2], right[2] = 0.0, 0.0
        left[1, used:], right[1, :, used:] = 0.0, 0.0
    shaped = [tuple(t.to(dtype).unsqueeze(1) if four else t.to(dtype) for t in group) for group in (a, b)]
    return shaped[0], shaped[1]


def close(left: Any, right: Any, dtype: Any) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(left.float(), right.float(), rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.sampled_from([1, 8, 16]))
    rows = draw(st.one_of(st.lists(st.sampled_from([0, 7, 8]), min_size=1, max_size=12), st.just([7] * 8)))
    repeat = draw(st.sampled_from([1, 1, 7]))  # prompts: several rows a request
    return {
        "ids": [row for row in rows for _ in range(repeat)],
        "inputs": draw(st.sampled_from([1, 16, 33])),
        "outputs": draw(st.sampled_from([(8,), (24, 8, 8), (16, 16), (5, 1)])),
        "rank": rank,
        "used": draw(st.integers(0, rank)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "four": draw(st.booleans()),
        "prefill": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 1.0, 0.5])),
        "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def case(ids: Sequence[int], **more: Any) -> dict[str, Any]:
    plain = {"inputs": 16, "outputs": (24, 8, 8), "rank": 8, "used": 3, "dtype": torch.bfloat16, "four": True}
    return {"ids": list(ids), **plain, "prefill": True, "scale": 1.0, "packed": False, "seed": 0, **more}


@given(cases())
@example(case([7] * 8))
@example(case([7, 0, 8, 0, 7]))
@example(case([0] * 8))
@example(case([8] * 8, used=0))
@example(case([0, 7, 7, 7, 8] * 8, prefill=False))
@example(case([7, 0, 8, 0, 7], packed=True))
@example(case([7] * 8, packed=True, scale=0.5))
def test_linear_layer_equals_vllm_and_rows_without_adapter_are_identical(given_case: dict[str, Any]) -> None:
    c = given_case
    generator = torch.Generator().manual_seed(c["seed"])
    a, b = weights(generator, c["inputs"], c["outputs"], c["rank"], c["used"], c["dtype"], c["four"])
    x = torch.randn(len(c["ids"]), c["inputs"], generator=generator).to(c["dtype"])
    base = torch.randn(len(c["ids"]), sum(c["outputs"]), generator=generator).to(c["dtype"])
    base[0, 0] = -0.0
    outcomes = []
    with pytest.MonkeyPatch.context() as patched:
        if c["packed"]:
            pack_all(patched)
        for wrapper in both(c["ids"], c["prefill"]):
            y = base.clone()
            wrapper.add_lora_linear(y, x, a, b, c["scale"], c["outputs"])
            outcomes.append(y)
    theirs, ours = outcomes
    close(ours, theirs, c["dtype"])
    plain = torch.tensor([i == 0 for i in c["ids"]])
    bits = torch.int16 if c["dtype"] == torch.bfloat16 else torch.int32
    assert torch.equal(ours[plain].view(bits), base[plain].view(bits))


def pack_all(patched: pytest.MonkeyPatch) -> None:
    """Lets every layer of bfloat16 factors be packed where oneDNN can, at any speed."""
    patched.setattr(grouped, "MIN_PACKED_ELEMENTS", 0)
    patched.setattr(grouped, "multiplies_bfloat16", product.packs_bfloat16)


@pytest.mark.skipif(not product.packs_bfloat16(), reason="oneDNN cannot multiply packed bfloat16 matrices here")
def test_large_layers_of_bfloat16_are_packed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "multiplies_bfloat16", lambda: True)
    generator = torch.Generator().manual_seed(8)
    for rank, dtype, kind in (
        (8, torch.bfloat16, grouped.Float32),
        (64, torch.bfloat16, grouped.Packed),
        (64, torch.float32, grouped.Float32),
    ):
        a, b = weights(generator, 512, (512, 512), rank, rank, dtype, True)
        assert isinstance(grouped.read_factors(a, b, 0, (512, 512)).joined, kind)
    monkeypatch.setattr(grouped, "multiplies_bfloat16", lambda: False)
    a, b = weights(generator, 512, (512, 512), 64, 64, torch.bfloat16, True)
    assert isinstance(grouped.read_factors(a, b, 0, (512, 512)).joined, grouped.Float32)


@pytest.mark.parametrize("few", [True, False], ids=["float32", "in place"])
def test_last_slot_in_use_does_not_reach_rows_without_adapter(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(grouped, "MAX_JOINED_ROWS", 0)
    generator = torch.Generator().manual_seed(1)
    a, b = weights(generator, 16, (8, 8), 4, 4, torch.float32, True)
    for buffers in (a, b):
        for buffer in buffers:
            buffer[2] = 3.0
    x, base = torch.randn(4, 16, generator=generator), torch.randn(4, 16, generator=generator)
    ids = [0, 7, 0, 7]
    theirs, ours = base.clone(), base.clone()
    for wrapper, y in zip(both(ids), (theirs, ours), strict=True):
        wrapper.add_lora_linear(y, x, a, b, 1.0, (8, 8))
    # This is what the plugin is for: if vLLM's own operations no longer do it, they may serve again.
    assert not torch.equal(theirs[[0, 2]], base[[0, 2]])
    assert torch.equal(ours[[0, 2]], base[[0, 2]])
    close(ours[[1, 3]], theirs[[1, 3]], torch.float32)


def test_factors_are_read_again_when_vllm_loads_another_adapter_into_the_slot() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = weights(generator, 16, (8, 8), 4, 4, torch.float32, True)
    x, base = torch.randn(2, 16, generator=generator), torch.zeros(2, 16)
    theirs, ours = both([7, 7])
    for change in (1.0, -2.0, 0.0):
        with torch.inference_mode():
            for buffer in a:
                buffer[0] = buffer[0] * change
        result = []
        for wrapper in (theirs, ours):
            y = base.clone()
            wrapper.add_lora_linear(y, x, a, b, 1.0, (8, 8))
            result.append(y)
        close(result[1], result[0], torch.float32)
    assert not result[1].any()


def test_layer_whose_middle_slice_has_no_adapter() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = weights(generator, 16, (8, 4, 8), 4, 4, torch.bfloat16, True)
    a[1][:], b[1][:] = 0.0, 0.0
    for ids in ([7] * 3, [7, 0, 7]):
        x = torch.randn(3, 16, generator=generator).bfloat16()
        base = torch.randn(3, 20, generator=generator).bfloat16()
        result = []
        for wrapper in both(ids):
            y = base.clone()
            wrapper.add_lora_linear(y, x, a, b, 1.0, (8, 4, 8))
            result.append(y)
        close(result[1], result[0], torch.bfloat16)
        assert torch.equal(result[1][:, 8:12], base[:, 8:12])


@pytest.mark.parametrize("ids", [[7] * 3, [0, 8, 0], [0, 0, 0], [7, 0, 7, 8]])
def test_shrink_and_expand_apart_equal_vllm(ids: list[int]) -> None:
    """As layers with sharded factors call them."""
    generator = torch.Generator().manual_seed(4)
    outputs = (8, 4)
    a, b = weights(generator, 16, outputs, 4, 2, torch.float32, True)
    x, base = torch.randn(len(ids), 16, generator=generator), torch.randn(len(ids), 12, generator=generator)
    result = []
    for wrapper in both(ids):
        hidden = torch.zeros(2, len(ids), 4)
        wrapper.add_shrink(hidden, x, a, 1.0)
        y = base.clone()
        wrapper.add_expand(y, hidden, b, outputs, add_inputs=True)
        result.append(y)
    close(result[1], result[0], torch.float32)


@pytest.mark.parametrize("ids", [[7] * 3, [0, 8, 0], [0, 0, 0], [7, 0, 7, 8]])
def test_embedding_and_logits_equal_vllm(ids: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    (a,), (b,) = weights(generator, 16, (VOCAB_SIZE,), 4, 2, torch.float32, True)
    x, base = torch.randn(len(ids), 16, generator=generator), torch.randn(len(ids), VOCAB_SIZE, generator=generator)
    rows = torch.randn(len(ids), 4, generator=generator)
    logits, embedded = [], []
    for wrapper in both(ids):
        y = base.clone()
        wrapper.add_lora_logits(y, x, a, b, 1.0)
        logits.append(y)
        y = base.clone()
        wrapper.add_lora_embedding(y, rows, b)
        embedded.append(y)
    close(logits[1], logits[0], torch.float32)
    close(embedded[1], embedded[0], torch.float32)


def test_rows_that_vllm_did_not_announce_are_left_to_it() -> None:
    generator = torch.Generator().manual_seed(6)
    a, b = weights(generator, 16, (8,), 4, 4, torch.float32, True)
    _, ours = both([7, 7])
    y = torch.zeros(3, 8)
    with pytest.raises(RuntimeError):  # vLLM's own operation refuses it
        ours.add_lora_linear(y, torch.randn(3, 16, generator=generator), a, b, 1.0, (8,))


def test_three_dimensional_rows() -> None:
    """The transformers backend's layers have a batch dimension."""
    generator = torch.Generator().manual_seed(7)
    a, b = weights(generator, 16, (8,), 4, 4, torch.float32, True)
    x = torch.randn(4, 16, generator=generator)
    result = []
    for wrapper in both([7, 0, 7, 7]):
        y = torch.zeros(1, 4, 8)
        wrapper.add_lora_linear(y, x, a, b, 1.0, (8,))
        result.append(y)
    close(result[1], result[0], torch.float32)


@given(st.lists(st.integers(-1, 4), max_size=30))
def test_plan_covers_each_row_with_an_adapter_once(slots: list[int]) -> None:
    result = grouped.plan(slots)
    assert result.rows == len(slots)
    covered: dict[int, int] = {}
    for group in result.groups:
        rows = range(group.start, group.stop) if group.index is None else group.index.tolist()
        covered |= dict.fromkeys(rows, group.slot)
    assert covered == {row: slot for row, slot in enumerate(slots) if slot >= 0}


def test_logits_of_prompts_of_which_there_is_another_number_stay_as_they_are() -> None:
    """`prompt_logprobs`: vLLM's own operation takes them for the sampled rows, and its engine ends."""
    y, x = torch.randn(96, VOCAB_SIZE), torch.randn(96, 16)
    nothing = torch.zeros(SLOTS, 1, 8, 16), torch.zeros(SLOTS, 1, VOCAB_SIZE, 8)
    theirs, ours = both([7, 0, 8], samples=[7, 0, 8])
    with pytest.raises(RuntimeError, match="einsum"):
        theirs.add_lora_logits(y.clone(), x, *nothing, 1.0)
    before = y.clone()
    ours.add_lora_logits(y, x, *nothing, 1.0)
    assert torch.equal(y, before)
