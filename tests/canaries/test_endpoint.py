"""`hemostat canaries … --first-token` against a vendor's endpoint, which has the OpenAI API and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fake_vendor import FakeVendor
from tests.support.fake_vllm import FakeVllm, serving

from hemostat.canaries import endpoint
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, COULD_NOT_TELL, EQUAL
from hemostat.config.fields import base_url
from hemostat_calibration.canary_endpoint import PASSES, EndpointSet

PROMPTS = 24


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{n} A prompt, number {n}\n" for n in range(PROMPTS)))
    return path


@pytest.fixture
def vendor() -> FakeVendor:
    return FakeVendor()


@pytest.fixture
def url(vendor: FakeVendor) -> Iterator[str]:
    with serving(vendor) as url:
        yield url


def take(url: str, prompts: Path, *more: str) -> Path:
    path = prompts.with_name("first.json")
    arguments = ["canaries", "take", url, str(path), "--first-token", "--prompts", str(prompts), *more]
    assert main(arguments) == EQUAL
    return path


def replayed(url: str, path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["canaries", "replay", url, str(path)])
    return code, capsys.readouterr().out.splitlines()


def test_an_unchanged_endpoint_is_equal_after_two_passes_and_another_model_is_changed(
    url: str, vendor: FakeVendor, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = take(url, prompts)
    assert f"taken: first tokens of {PROMPTS} prompts of vendor/model at 20" in capsys.readouterr().out
    bodies = vendor.seen[1:]
    assert len(bodies) == PASSES * PROMPTS
    assert len({body["seed"] for body in bodies}) > PROMPTS
    assert {(body["max_tokens"], body["temperature"], body["top_p"]) for body in bodies} == {(1, 1.0, 1.0)}
    vendor.seen.clear()
    code, lines = replayed(url, path, capsys)
    assert (code, len(lines), len(vendor.seen)) == (EQUAL, 1, 2 * PROMPTS)
    assert lines[0].startswith(f"equal: 0 of {PROMPTS} sequences differ")
    vendor.model = FakeVllm(noise=0.2)
    code, lines = replayed(url, path, capsys)
    assert (code, lines[0].split(":")[0]) == (CHANGED, "changed")


def test_two_endpoints_are_compared(
    url: str, vendor: FakeVendor, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeVendor(path="/inference")) as same, serving(FakeVendor(FakeVllm(seed=1))) as other:
        found = [
            main(["canaries", "compare", url, each, "--first-token", "--prompts", str(prompts)])
            for each in (f"{same}/inference/v1#vendor/model", other)
        ]
    assert found == [EQUAL, CHANGED]


def test_a_vendor_that_caches_is_named_and_no_statement_is_made(
    url: str, vendor: FakeVendor, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = take(url, prompts)
    vendor.caches = True
    code, lines = replayed(url, path, capsys)
    assert code == COULD_NOT_TELL
    assert lines[1].strip().startswith("these answers to the same prompt are the same: the endpoint caches answers")
    path.unlink()
    path = take(url, prompts)
    vendor.model, vendor.caches = FakeVllm(noise=0.2), False
    code, lines = replayed(url, path, capsys)
    assert code == COULD_NOT_TELL, "the noise is not known"
    assert lines[1].strip().startswith("the baseline's answers to the same prompt are the same")
    path.unlink()
    vendor.caches = vendor.seeds = True
    path = take(url, prompts)
    code, lines = replayed(url, path, capsys)
    assert (code, len(lines)) == (EQUAL, 1), "a cache that looks at the seed does not answer"


def test_a_vendor_that_rounds_is_named_and_coarse_values_are_no_evidence_of_being_equal(
    url: str, vendor: FakeVendor, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vendor.decimals = 4
    path = take(url, prompts)
    code, lines = replayed(url, path, capsys)
    assert code == EQUAL
    assert lines[1].strip() == "log-probabilities are rounded to 4 decimals: changes below 0.0001 nats are not seen"
    before, vendor.model = vendor.model, FakeVllm(noise=0.2)
    assert replayed(url, path, capsys)[0] == CHANGED
    vendor.model, vendor.decimals = before, 1
    code, lines = replayed(url, path, capsys)
    assert (code, "rounded to 1 decimal:" in lines[1]) == (COULD_NOT_TELL, True)


def test_a_vendor_that_serves_two_versions_is_named(
    url: str, vendor: FakeVendor, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = take(url, prompts), FakeVllm(noise=0.5)
    vendor.other = other
    code, lines = replayed(url, path, capsys)
    assert code == CHANGED
    assert f"of {PROMPTS} prompts are in two groups" in lines[1]
    assert lines[1].strip().startswith("these answers to ")
    path.unlink()
    path = take(url, prompts)
    code, lines = replayed(url, path, capsys)
    assert code == COULD_NOT_TELL, "both versions answered then, too"
    assert lines[1].strip().startswith("the baseline's answers to ")


def test_servers_of_other_forms_are_asked_in_theirs(
    url: str, vendor: FakeVendor, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", (0.0, 0.0))
    vendor.most, vendor.newer_length, vendor.busy = 5, True, 2
    taken = EndpointSet.from_bytes(take(url, prompts).read_bytes())
    assert (taken.listed, taken.chat) == (5, True)
    assert "max_completion_tokens" in vendor.seen[-1]
    vendor.chat, vendor.most = False, 20
    path = take(url, prompts, "--overwrite")
    taken = EndpointSet.from_bytes(path.read_bytes())
    assert (taken.listed, taken.chat) == (20, False)
    assert main(["canaries", "replay", url, str(path)]) == EQUAL


def test_a_vllm_is_an_endpoint_too(prompts: Path) -> None:
    prompts.write_text("".join(f"p{n} say: {chr(97 + n)}\n" for n in range(PROMPTS)))
    with serving(FakeVllm()) as url:
        assert main(["canaries", "replay", url, str(take(url, prompts))]) == COULD_NOT_TELL, "it draws nothing here"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"logprobs": False}, "sends no log-probabilities with the answers of vendor/model"),
        ({"api_key": "secret"}, "answered 401: Incorrect API key provided."),
        ({"most": 3}, "top_logprobs must be at most 3"),
        ({"busy": 1000}, "answered 429: Rate limit reached."),
        ({"chat": False, "completions": False}, "answered 404: Not Found"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_one_line(
    fault: dict[str, object],
    text: str,
    url: str,
    vendor: FakeVendor,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", (0.0,))
    path = take(url, prompts)
    for name, value in fault.items():
        assert hasattr(vendor, name)
        setattr(vendor, name, value)
    capsys.readouterr()
    assert main(["canaries", "replay", url, str(path)]) == COULD_NOT_TELL
    assert text in capsys.readouterr().err
    assert main(["canaries", "take", url, f"{path}.2", "--first-token", "--prompts", str(prompts)]) == COULD_NOT_TELL
    captured = capsys.readouterr().err
    assert text in captured
    assert captured.count("\n") == 1


def test_first_tokens_have_no_cause_and_go_through_no_router(
    url: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(take(url, prompts))
    assert main(["canaries", "cause", url, path]) == COULD_NOT_TELL
    assert "has first tokens only, which show no cause" in capsys.readouterr().err
    assert main(["canaries", "replay", url, path, "--through"]) == COULD_NOT_TELL
    assert "leave out --through" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("https://api.example.com/openai/v1/", "https://api.example.com/openai"),
        ("https://api.example.com/v1", "https://api.example.com"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
    ],
)
def test_an_address_may_have_a_path_as_vendors_addresses_do(address: str, base: str) -> None:
    assert base_url(address) == base


@pytest.mark.parametrize("address", ["ftp://x/v1", "https://a:b@x/v1", "https://x/v1?key=1", "api.example.com/v1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"http|password|path"):
        base_url(address)
