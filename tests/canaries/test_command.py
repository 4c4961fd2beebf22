"""`hemostat canaries` against a fake vLLM, without anything else of Hemostat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fake_vllm import FakeVllm, serving

from hemostat.canaries import client, texts
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, EQUAL, TOLERANCE
from hemostat.config.schema import Canaries
from hemostat.reference import server as server_module
from hemostat.report import progress
from hemostat_calibration.canaries import REPLAYS, TOLERANCE_NATS, CanarySet

COULD_NOT_TELL = 2
PROMPTS = "".join(f"p{n}\n" for n in range(16))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("canaries") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def taken(prompts: Path) -> Path:
    """A set of a `FakeVllm()`. No test changes it."""
    path = prompts.with_name("set.json")
    with pytest.MonkeyPatch.context() as patch, serving(FakeVllm()) as url:
        patch.setattr(client, "ANSWER_TOKENS", 4)
        patch.setattr(texts, "FREE_TEXTS", 0)
        assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    return path


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def url(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(texts, "FREE_TEXTS", 0)
    with serving(fake) as url:
        yield url


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that could not tell."""
    capsys.readouterr()
    assert main(["canaries", *arguments]) == COULD_NOT_TELL
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hemostat: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_tolerance_is_the_cores() -> None:
    assert TOLERANCE == TOLERANCE_NATS == Canaries().tolerance_nats


def test_progress_is_shown_while_a_set_is_taken_and_compared(
    url: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    path = tmp_path / "set.json"
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    captured = capsys.readouterr()
    assert captured.out.startswith("taken: ")
    assert captured.out.count("\n") == 1, "the progress is on standard error"
    lines = captured.err.splitlines()
    assert lines[0].startswith("answers written: 1 of 16")
    assert lines[15].startswith("answers written: 16 of 16")
    assert f"sequences scored: {16 * REPLAYS} of {16 * REPLAYS}" in captured.err
    assert main(["canaries", "replay", url, str(path)]) == EQUAL
    assert "sequences scored: 16 of 16" in capsys.readouterr().err


def test_a_set_is_taken_in_several_replays_and_says_what_of(
    url: str, fake: FakeVllm, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.json"
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    assert "taken: 16 sequences of fake on vLLM 0.32.0" in capsys.readouterr().out
    result = CanarySet.from_bytes(path.read_bytes())
    assert (result.origin.model, result.origin.version, result.origin.max_model_len) == ("fake", "0.32.0", 2048)
    assert result.baseline.shape == (REPLAYS, result.scored)
    answers = [body for body in fake.requests if "prompt_logprobs" not in body]
    assert [body["temperature"] for body in answers] == [0.0, 1.0] * 8
    scored = [body for body in fake.requests if "prompt_logprobs" in body]
    assert len(scored) == 2 + REPLAYS * 16  # if it decodes given tokens, and if it scores, before the answers
    assert len({body["cache_salt"] for body in fake.requests}) == len(fake.requests)
    expected = (1, 0.0, 0, client.PRIORITY)
    keys = ("max_tokens", "temperature", "prompt_logprobs", "priority")
    assert {tuple(body[key] for key in keys) for body in scored[1:]} == {expected}


def test_an_unchanged_server_is_equal_after_one_replay(
    taken: Path, url: str, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.requests.clear()
    assert main(["canaries", "replay", url, str(taken)]) == EQUAL
    assert capsys.readouterr().out.startswith("equal: 0 of 16 sequences differ")
    assert len(fake.requests) == 16


def test_answers_are_decoded_where_the_plugin_is_and_a_fault_of_decoding_alone_is_found(
    url: str, fake: FakeVllm, taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, path = tmp_path / "prompts", tmp_path / "set.json"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(16)))
    fake.plugin = True
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    result = CanarySet.from_bytes(path.read_bytes())
    assert (result.decoded, result.baseline.shape) == (True, (REPLAYS, result.scored))
    fake.requests.clear()
    assert main(["canaries", "replay", url, str(path)]) == EQUAL
    asked = [(body["prompt"], body["vllm_xargs"]["hemostat_force"]) for body in fake.requests]
    assert asked == [(canary.prompt.tolist(), canary.answer.tolist()) for canary in result.canaries]
    fake.fault = "decoding"
    assert main(["canaries", "replay", url, str(path)]) == CHANGED
    assert main(["canaries", "replay", url, str(taken)]) == EQUAL, "a prefill of the whole sequence does not see it"
    fake.fault, fake.not_a_number = "", True
    assert [main(["canaries", "replay", url, str(each)]) for each in (path, taken)] == [CHANGED, CHANGED]
    fake.not_a_number = False
    for lost in ({"plugin": False}, {"plugin": True, "raw_logprobs": False}):
        for name, value in lost.items():
            setattr(fake, name, value)
        assert "does not decode the tokens that it is given" in refused(["replay", url, str(path)], capsys)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"chat_template": "Another template."}, "16 of 16 texts have other token ids: the chat template or the tok"),
        ({"default_temperature": 0.2}, "free answers are drawn in another way: −log p minus the entropy had a mean of"),
    ],
)
def test_what_clients_texts_become_is_compared(
    fault: dict[str, object],
    text: str,
    url: str,
    fake: FakeVllm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(texts, "FREE_TEXTS", 8)
    prompts, path = tmp_path / "prompts", tmp_path / "set.json"
    prompts.write_text("".join(f"A prompt, number {n}\n" for n in range(16)))
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    sent = [body for body in fake.requests if "messages" in body]
    assert {("temperature" in body, "top_p" in body, "seed" in body) for body in sent} == {(False, False, False)}
    assert main(["canaries", "replay", url, str(path)]) == EQUAL
    capsys.readouterr()
    for name, value in fault.items():
        setattr(fake, name, value)
    assert main(["canaries", "replay", url, str(path)]) == CHANGED
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("changed: 0 of 16 sequences differ")
    assert second.strip().startswith(text)


def test_a_date_in_a_chat_template_is_no_change_and_a_model_without_a_template_has_texts_too(
    url: str, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "FREE_TEXTS", 8)
    path = tmp_path / "set.json"
    (tmp_path / "prompts").write_text(PROMPTS)

    def take() -> int:
        return main(["canaries", "take", url, str(path), "--prompts", str(tmp_path / "prompts"), "--overwrite"])

    fake.chat_template = "Today is Monday, 31 August 2026."
    assert take() == EQUAL
    fake.chat_template = "Today is Tuesday, 1 September 2026."
    assert main(["canaries", "replay", url, str(path)]) == EQUAL
    fake.chat_template = None
    assert take() == EQUAL
    assert main(["canaries", "replay", url, str(path)]) == EQUAL
    fake.default_temperature = 0.2
    assert main(["canaries", "replay", url, str(path)]) == CHANGED
    fake.max_logprobs = 4
    assert take() == EQUAL, "a server that lists fewer tokens is asked for its token ids alone"
    assert main(["canaries", "replay", url, str(path)]) == EQUAL


def test_another_model_under_the_same_name_is_changed_in_two_replays(
    taken: Path, url: str, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.requests.clear()
    fake.noise, fake.root = 0.3, "/models/other"
    assert main(["canaries", "replay", url, str(taken)]) == CHANGED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("changed: 16 of 16 sequences differ")
    assert lines[1:] == ["  path: fake, now /models/other"]
    assert len(fake.requests) == 2 * 16
    assert main(["canaries", "replay", url, str(taken), "--tolerance", "9"]) == EQUAL


def test_two_servers_are_compared(url: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeVllm()) as same, serving(FakeVllm(noise=0.3)) as other:
        assert main(["canaries", "compare", url, same, "--prompts", str(prompts)]) == EQUAL
        assert main(["canaries", "compare", url, other, "--prompts", str(prompts)]) == CHANGED
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["equal", "changed"]


def test_the_ids_of_another_tokenizer_are_not_compared(
    taken: Path,
    url: str,
    fake: FakeVllm,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "encode", lambda text: [byte ^ 1 for byte in text.encode()])
    assert f"could not tell: {url} has another tokenizer" in refused(["replay", url, str(taken)], capsys)
    with serving(FakeVllm()) as other:
        text = f"could not tell: {url} has another tokenizer"
        assert text in refused(["compare", other, url, "--prompts", str(prompts)], capsys)


def test_an_adapter_is_asked_for_by_its_name(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, fake: FakeVllm
) -> None:
    fake.adapters = ("lora",)
    path = tmp_path / "lora.json"
    assert main(["canaries", "take", f"{url}#lora", str(path), "--prompts", str(prompts)]) == EQUAL
    assert {body["model"] for body in fake.requests} == {"lora"}
    assert main(["canaries", "replay", url, str(path)]) == EQUAL  # the model of the set, unless another is named
    assert "serves fake, lora, not nothing" in refused(["replay", f"{url}#nothing", str(path)], capsys)


def test_a_server_that_refuses_the_priority_is_asked_without(taken: Path, url: str, fake: FakeVllm) -> None:
    fake.refuses_priority = True
    assert main(["canaries", "replay", url, str(taken)]) == EQUAL
    assert ["priority" in body for body in fake.requests] == [False] * 16


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"max_logprobs": -1}, "greater than max allowed"),
        ({"short_prompt_logprobs": True}, "sent prompt_logprobs of"),
        ({"status": 500}, "answered 500"),
        ({"max_model_len": 6}, "maximum context length is 6"),
        ({"last_prompt_logprob": math.nan}, "sent an invalid answer"),
        ({"last_prompt_logprob": None}, "sent an invalid answer"),
        ({"vocab_size": 64}, "out of vocabulary"),
        ({"hang": True}, "no answer in time"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_line(
    fault: dict[str, object],
    text: str,
    taken: Path,
    url: str,
    fake: FakeVllm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "hang" in fault:
        monkeypatch.setattr(server_module, "CONNECT_SECONDS", 0.5)
        monkeypatch.setattr("hemostat.commands.canaries.ANSWER_SECONDS", 0.5)
    for name, value in fault.items():
        assert hasattr(fake, name)
        setattr(fake, name, value)
    assert text in refused(["replay", url, str(taken)], capsys)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "0 prompts; give 16 to 100"),
        (b"one prompt\n", "1 prompts; give 16 to 100"),
        (b"\xff\xfe", "1: not UTF-8"),
        (b'{"prompt": 3}', "1: no prompt"),
        (b'{"prompt": ""}', "1: prompt is empty"),
        (b"x\n" * 300, "300 prompts"),
    ],
)
def test_a_prompt_file_that_is_none_is_one_line(
    data: bytes, text: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert text in refused(["take", url, str(tmp_path / "set"), "--prompts", str(path)], capsys)
    assert not (tmp_path / "set").exists()


def test_a_set_that_is_none_is_one_line(
    taken: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = taken.read_bytes()
    broken = tmp_path / "broken"
    for content in (b"", data[: len(data) // 2], b"[1]", b'{"schema": 2, "state": {}}'):
        broken.write_bytes(content)
        assert "hemostat canaries take writes such a file" in refused(["replay", url, str(broken)], capsys)
    assert "cannot be read (No such file" in refused(["replay", url, str(tmp_path / "none")], capsys)
    assert "exists; name another file, or add --overwrite" in refused(["take", url, str(taken)], capsys)
    assert "is no distance in nats" in refused(["replay", url, str(taken), "--tolerance", "-1"], capsys)
    assert "URL: " in refused(["replay", "localhost:1", str(taken)], capsys)


def test_prompts_that_are_too_long_are_cut_to_what_may_be_replayed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_TOKENS", 240)
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{n}\n{n} {'x' * 900}\n" for n in range(10, 18)))
    assert main(["canaries", "take", url, str(tmp_path / "set"), "--prompts", str(path)]) == EQUAL
    result = CanarySet.from_bytes((tmp_path / "set").read_bytes())
    assert 224 <= result.tokens <= 240
    assert sorted({len(canary.prompt) for canary in result.canaries}) == [2, 18]
