"""The markers of a reasoning model, found by a real tokenizer: with tokens of their own, and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from hemostat.config.models import Reasoning
from hemostat.config.reasoning_parsers import PARSERS
from hemostat.config.schema import Settings
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.thinking_markers import find_markers
from hemostat_calibration.reasoning import Thinking, find_thinking
from hemostat_lab.demo.checkpoints import Checkpoints


class Server:
    """The tokenizer of a vLLM server, as /tokenize answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def tokenize(self, model: str, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def plain(checkpoints: Checkpoints) -> Server:
    """SmolLM2's: `<think>` is several tokens."""
    return Server(Tokenizer.from_file(str(checkpoints.reference / "tokenizer.json")))


@pytest.fixture
def special(plain: Server) -> Server:
    """The same with markers of their own."""
    plain.tokenizer.add_special_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    return plain


async def test_auto_takes_markers_that_are_single_tokens(special: Server) -> None:
    result = await find_markers(special, "m", Reasoning())
    assert result.markers is not None
    [[start]], [[end]] = result.markers.start, result.markers.end
    assert special.tokenizer.id_to_token(start) == "<think>"
    assert special.tokenizer.id_to_token(end) == "</think>"
    assert result.detail == f"<think> is id {start}, </think> is id {end}"


async def test_auto_does_not_take_a_model_without_them_for_a_reasoning_model(plain: Server) -> None:
    result = await find_markers(plain, "m", Reasoning())
    assert result.markers is None
    assert "not taken to be a reasoning model" in result.detail


TEXTS = [
    "<think>\nThe user asks.\n</think>\n\nHello",
    "<think>What is it?</think>Hello",
    "<think>It is a list:\n- one\n- two.</think>\nHello",
    "<think> So it is (for now)</think> Hello",
    '<think>They say "yes"</think>Hello',
    "<think>\n\n</think>\n\nHello",
    "<think>**Bold**</think>\nHello",
]


@pytest.mark.parametrize("parser", ["olmo3", "deepseek_r1"])
@pytest.mark.parametrize("text", TEXTS)
async def test_markers_of_several_tokens_are_found_wherever_they_stand(plain: Server, parser: str, text: str) -> None:
    """The characters beside a marker share tokens with it: the split is right to the token."""
    result = await find_markers(plain, "m", Reasoning(parser=parser))
    assert result.markers is not None, result.detail
    assert "sequences of ids" in result.detail
    ids = np.array(await plain.tokenize("m", text), np.int32)
    thinking = find_thinking(np.zeros(0, np.int32), ids, result.markers)
    assert thinking is not None
    assert (thinking.begin, thinking.ended) == (0, True)
    written = plain.tokenizer.decode(ids[: thinking.answer_start].tolist(), skip_special_tokens=False)
    before, marker, _ = text.partition("</think>")
    assert written in {before + marker, before + marker + "\n"}, "at most a line end that shares the marker's token"


async def test_a_text_that_never_ends_its_thinking(plain: Server) -> None:
    result = await find_markers(plain, "m", Reasoning(parser="olmo3"))
    assert result.markers is not None
    ids = np.array(await plain.tokenize("m", "<think>\nFirst, a < b and c > d; then think of it"), np.int32)
    assert find_thinking(np.zeros(0, np.int32), ids, result.markers) == Thinking(0, len(ids), ended=False)


@pytest.mark.parametrize("parser", PARSERS)
async def test_every_parser_that_can_be_named_has_markers(plain: Server, parser: str) -> None:
    result = await find_markers(plain, "m", Reasoning(parser=parser))
    assert result.markers is not None, result.detail


async def test_ids_that_are_set_are_taken_as_they_are(special: Server) -> None:
    result = await find_markers(special, "m", Reasoning(start=[5], end=[6, 7]))
    assert result.markers is not None
    assert (result.markers.start, result.markers.end) == (((5,),), ((6, 7),))
    result = await find_markers(special, "m", Reasoning(end=[6]))
    assert result.markers is not None
    assert result.markers.start == ()


async def test_none_sends_no_request(plain: Server) -> None:
    result = await find_markers(Broken(), "m", Reasoning(parser="none"))
    assert result.markers is None


class Broken:
    async def tokenize(self, model: str, text: str) -> list[int]:
        raise ReferenceFailure(FailureReason.DOWN, "no tokenizer here")


@pytest.mark.parametrize("parser", ["auto", "qwen3"])
async def test_a_tokenizer_that_cannot_be_asked_is_one_without_markers(parser: str) -> None:
    result = await find_markers(Broken(), "m", Reasoning(parser=parser))
    assert result.markers is None
    assert "no tokenizer here" in result.detail


@pytest.mark.parametrize(
    ("reasoning", "error"),
    [
        ({"parser": "qwen4"}, "'qwen4' is none of auto, none, deepseek_r1"),
        ({"start": [1]}, "end: required with reasoning.start"),
        ({"end": [-1]}, "greater than or equal to 0"),
        ({"end": list(range(33))}, "at most 32"),
    ],
)
def test_settings_that_cannot_be(reasoning: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Settings.model_validate({"upstream": {"url": "http://localhost:1"}, "reasoning": reasoning})
