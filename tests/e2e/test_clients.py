"""The clients that people use, through the whole of Hemostat: they get what vLLM itself would have given them.

Every case is sent to vLLM directly and through `hemostat serve`, at shadow.rate 0 and 1, one at a time and greedily.
What became of each sampled request is counted, and the last test compares that with Hemostat's own figures.

litellm and langchain are imported where they are used: that takes ten seconds, in every process that collects tests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import openai
import pytest
from tests.support.slow import slow_unless
from tests.support.stack import Stack, hemostat

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    # Third parties' own affair: litellm's and pydantic's warnings about litellm's models.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning:pydantic"),
]


class Engine(Protocol):
    url: str
    model: str


# --- what is sent -----------------------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


CAPITAL = [user("What is the capital of France?")]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]
SHOWN = [
    # So small a model calls a tool only if it has seen how.
    message
    for city in ("Paris", "Rome", "Oslo", "Lima", "Cairo")
    for message in (user(f"Weather in {city}?"), {"role": "assistant", "content": call(city)})
]
JSON = {"response_format": {"type": "json_object"}}
STREAM: dict[str, Any] = {"stream": True}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
TOO_LONG = [user("word " * 3000)]

SCORED = "scored"
GRAMMAR = "grammar"
"""Without the plugin in the engine nobody says which ids a grammar allowed."""
"""What becomes of the request when it is sampled: this, or why it is skipped."""

Send = Callable[[str, str], Any]
"""(base URL, model) -> what the client made of the answer."""


@dataclass(frozen=True)
class Case:
    send: Send
    becomes: str = SCORED
    shows: str | None = None
    """Stands in the answer: the case is what it is called."""
    choices: int = 1
    """Of the answer: each is scored by itself."""


def with_openai(create: str, **arguments: Any) -> Send:
    def send(url: str, model: str) -> Any:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            api = client.chat.completions if create == "chat" else client.completions
            return whole(lambda: api.create(**{"model": model, "temperature": 0, "max_tokens": 8} | arguments))

    return send


def with_litellm(provider: str, **arguments: Any) -> Send:
    def send(url: str, model: str) -> Any:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices at its import
        import litellm

        litellm.suppress_debug_info = True
        common = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 8, "max_retries": 0}
        asked = {"model": model} | common | arguments
        asked["model"] = f"{provider}/{asked['model']}"
        return whole(lambda: litellm.completion(**asked))

    return send


def with_langchain(messages: list[dict[str, str]], bound: dict[str, Any] | None = None, **arguments: Any) -> Send:
    def send(url: str, model: str) -> Any:
        import langchain_openai

        own = arguments | {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
        stream = own.pop("stream", False)
        with httpx.Client(timeout=120) as http:  # its own ones stay open
            common = {"model": model, "temperature": 0, "max_tokens": 8, "http_client": http}
            chat: Any = langchain_openai.ChatOpenAI(**common | own)
            if bound:
                chat = chat.bind(**bound)
            return whole(lambda: chat.stream(messages) if stream else chat.invoke(messages))

    return send


OPENAI: dict[str, Case] = {
    "chat": Case(with_openai("chat", messages=CAPITAL), shows="Paris"),
    "chat, stream": Case(with_openai("chat", messages=CAPITAL, **STREAM), shows="Paris"),
    "chat, stream with usage": Case(with_openai("chat", messages=CAPITAL, **USAGE), shows="completion_tokens"),
    "completions": Case(with_openai("text", prompt="The capital of France is"), shows="Paris"),
    "completions, stream with usage": Case(with_openai("text", prompt="1, 2, 3,", **USAGE), shows="completion_tokens"),
    "tool call": Case(
        with_openai(
            "chat", messages=[*SHOWN, user("Weather in Tokyo?")], max_tokens=48, tools=TOOLS, tool_choice="auto"
        ),
        shows="'name': 'weather'",
    ),
    "tool call, stream": Case(
        with_openai("chat", messages=[*SHOWN, user("Weather in Tokyo?")], max_tokens=48, tools=TOOLS, **STREAM),
        shows="'name': 'weather'",
    ),
    "JSON mode": Case(with_openai("chat", messages=[user("A city, as JSON.")], max_tokens=12, **JSON), GRAMMAR, "{"),
    "JSON mode, stream": Case(with_openai("chat", messages=[user("A city, as JSON.")], **JSON, **STREAM), GRAMMAR, "{"),
    "own logprobs": Case(with_openai("chat", messages=CAPITAL, logprobs=True, top_logprobs=5), shows="top_logprobs"),
    "own logprobs, stream": Case(
        with_openai("chat", messages=CAPITAL, logprobs=True, top_logprobs=5, **STREAM), shows="top_logprobs"
    ),
    "completions, own logprobs, stream": Case(
        with_openai("text", prompt="The capital of France is", logprobs=5, **STREAM), shows="token_logprobs"
    ),
    "stop": Case(
        with_openai("chat", messages=[user("Count from 1 to 10.")], max_tokens=24, stop=["3", "three"]), shows="'stop'"
    ),
    "stop, stream": Case(
        with_openai("chat", messages=[user("Count from 1 to 10.")], max_tokens=24, stop=["3", "three"], **STREAM),
        shows="'stop'",
    ),
    "n": Case(with_openai("chat", messages=CAPITAL, n=2, temperature=1, seed=7), SCORED, "'index': 1", 2),
    "n, stream": Case(
        with_openai("chat", messages=CAPITAL, n=2, temperature=1, seed=7, **STREAM), SCORED, "'index': 1", 2
    ),
    "unknown model": Case(with_openai("chat", messages=CAPITAL, model="nope"), "no_reference", "404"),
    "unknown model, stream": Case(
        with_openai("chat", messages=CAPITAL, model="nope", **STREAM), "no_reference", "NotFoundError"
    ),
    "bad parameter": Case(with_openai("chat", messages=CAPITAL, top_p=7), "request_refused", "400"),
    "too long": Case(with_openai("chat", messages=TOO_LONG), "request_refused", "maximum context length"),
    "too long, stream": Case(
        with_openai("chat", messages=TOO_LONG, **STREAM), "request_refused", "maximum context length"
    ),
}
LITELLM: dict[str, Case] = {
    "chat": Case(with_litellm("openai", messages=CAPITAL), shows="Paris"),
    "chat, stream with usage": Case(with_litellm("openai", messages=CAPITAL, **USAGE), shows="completion_tokens"),
    "hosted_vllm, stream": Case(with_litellm("hosted_vllm", messages=CAPITAL, **STREAM), shows="Paris"),
    "tool call, stream": Case(
        with_litellm("hosted_vllm", messages=[*SHOWN, user("Weather in Tokyo?")], max_tokens=48, tools=TOOLS, **STREAM),
        shows="'name': 'weather'",
    ),
    "JSON mode": Case(with_litellm("openai", messages=[user("A city, as JSON.")], **JSON), GRAMMAR, "{"),
    "own logprobs": Case(
        with_litellm("hosted_vllm", messages=CAPITAL, logprobs=True, top_logprobs=5), shows="top_logprobs"
    ),
    "unknown model": Case(with_litellm("openai", messages=CAPITAL, model="nope"), "no_reference", "404"),
    "too long, stream": Case(
        with_litellm("openai", messages=TOO_LONG, **STREAM), "request_refused", "maximum context length"
    ),
}
LANGCHAIN: dict[str, Case] = {
    "invoke": Case(with_langchain(CAPITAL), shows="Paris"),
    "stream": Case(with_langchain(CAPITAL, stream=True), shows="Paris"),
    "stream with usage": Case(with_langchain(CAPITAL, stream=True, stream_usage=True), shows="output_tokens"),
    "tool call": Case(
        with_langchain([*SHOWN, user("Weather in Tokyo?")], {"tools": TOOLS, "tool_choice": "auto"}, max_tokens=48),
        shows="'name': 'weather'",
    ),
    "JSON mode, stream": Case(with_langchain([user("A city, as JSON.")], JSON, stream=True), GRAMMAR, "{"),
    "own logprobs, stream": Case(
        with_langchain(CAPITAL, stream=True, logprobs=True, top_logprobs=5), shows="top_logprobs"
    ),
    "stop": Case(
        with_langchain([user("Count from 1 to 10.")], {"stop": ["3", "three"]}, max_tokens=24), shows="'stop'"
    ),
    "unknown model": Case(with_langchain(CAPITAL, model="nope"), "no_reference", "404"),
    "bad parameter, stream": Case(with_langchain(CAPITAL, stream=True, top_p=7), "request_refused", "400"),
}
CASES = {
    f"{client}: {name}": case
    for client, cases in (("openai", OPENAI), ("litellm", LITELLM), ("langchain", LANGCHAIN))
    for name, case in cases.items()
}
QUICK = {
    *("openai: chat", "openai: chat, stream with usage", "openai: completions", "openai: tool call, stream"),
    *("openai: JSON mode, stream", "openai: own logprobs, stream", "openai: completions, own logprobs, stream"),
    *("openai: stop, stream", "openai: n, stream", "openai: unknown model", "openai: unknown model, stream"),
    *("openai: bad parameter", "openai: too long, stream"),
    *("litellm: chat", "litellm: hosted_vllm, stream", "litellm: tool call, stream", "litellm: unknown model"),
    *("langchain: invoke", "langchain: stream with usage", "langchain: bad parameter, stream"),
}
"""Every ending, and every client with a stream, without one and with an error."""

# --- what comes back --------------------------------------------------------------------------------------------------


def whole(ask: Callable[[], Any]) -> Any:
    """The answer, or the error, as plain data without what differs from one request to the next."""
    try:
        answer = ask()
        if hasattr(answer, "model_dump"):
            return plain(answer)
        return merged(answer)
    except openai.LengthFinishReasonError as error:  # langchain's, where JSON was asked for and does not end
        return {"error": type(error).__name__, "answer": plain(error.completion)}
    except openai.APIStatusError as error:  # litellm's errors are of this kind too
        return {"error": type(error).__name__, "status": error.status_code, "message": str(error), "body": error.body}
    except openai.APIError as error:  # in a stream that has begun
        return {"error": type(error).__name__, "message": str(error), "body": error.body}


def plain(answer: Any) -> Any:
    return normal(answer.model_dump(mode="json", exclude_unset=True))


def normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: 0 if k in ("id", "created") and v is not None else normal(v) for k, v in value.items()}
    return [normal(item) for item in value] if isinstance(value, list) else value


def merged(stream: Iterable[Any]) -> Any:
    """A stream as one answer, and the forms that its events had: how many tokens share an event is chance."""
    from langchain_core.messages import BaseMessageChunk

    answer: Any = None
    forms: list[str] = []
    for chunk in stream:
        event = plain(chunk)
        if isinstance(chunk, BaseMessageChunk):
            answer = chunk if answer is None else answer + chunk
        else:
            answer = merge(answer, event)
        if (form := shape(event)) not in forms:
            forms.append(form)
    assert forms, "an empty stream"
    return {"answer": plain(answer) if isinstance(answer, BaseMessageChunk) else answer, "forms": sorted(forms)}


GROWING = frozenset({"content", "text", "arguments"})


def merge(old: Any, new: Any, key: str = "") -> Any:
    if old is None or new is None:
        return old if new is None else new
    if isinstance(new, dict):
        return {k: merge(old.get(k), new.get(k), k) for k in old | new}
    if isinstance(new, list):
        if new and isinstance(new[0], dict) and "index" in new[0]:
            by_index = {item["index"]: item for item in old}
            for item in new:
                by_index[item["index"]] = merge(by_index.get(item["index"]), item)
            return [by_index[index] for index in sorted(by_index)]
        return old + new
    return old + new if key in GROWING else new


def shape(value: Any) -> str:
    """An event's keys, in order. The candidates of a completion's token are keys, too: which
    token an event begins with is chance, and `merge` keeps them."""
    if isinstance(value, dict):
        if all(isinstance(item, float) for item in value.values()):
            return "{}"
        return "{" + ",".join(f"{key}:{shape(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"[{shape(value[0])}]"
    return ""


def assert_same_forms(ours: list[str], theirs: list[str]) -> None:
    """A stream may lack the events that have nothing but a piece of the text: on a busy machine, all tokens come in the
    first event and in the last one."""
    pieces = [
        {form for form in forms if "delta:{content:}" in form and "stop_reason" not in form} for forms in (ours, theirs)
    ]
    assert set(ours) - pieces[0] == set(theirs) - pieces[1]
    assert pieces[0] == pieces[1] or not all(pieces)


# --- the tests --------------------------------------------------------------------------------------------------------


@dataclass
class Proxies:
    by_rate: dict[int, Stack]
    sent: Counter[str] = field(default_factory=Counter)
    """Of the requests at rate 1: what is to become of them."""


@pytest.fixture(scope="module")
def proxies(vllm_server: Engine, sampled: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxies]:
    plain_settings = {"upstream": {"url": vllm_server.url}, "shadow": {"rate": 0}}
    with hemostat(plain_settings, tmp_path_factory.mktemp("clients")) as never:
        yield Proxies({0: never, 1: sampled})
    import litellm

    for name, client in litellm.in_memory_llm_clients_cache.cache_dict.items():
        if not name.startswith("async_"):  # these have no connections
            client.close()


@pytest.fixture(scope="module")
def direct(vllm_server: Engine) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def answer(case: str) -> Any:
        if case not in known:
            known[case] = CASES[case].send(vllm_server.url, vllm_server.model)
        return known[case]

    return answer


@pytest.fixture(scope="module")
def before(proxies: Proxies) -> dict[str, Any]:
    return proxies.by_rate[1].wait_settled()


@pytest.mark.parametrize("case", slow_unless(QUICK, tuple(CASES)))
def test_the_answer_is_vllms(
    case: str, proxies: Proxies, before: dict[str, Any], vllm_server: Engine, direct: Callable[[str], Any]
) -> None:
    expected = direct(case)
    shows = CASES[case].shows
    assert shows is None or shows in str(expected)
    for rate, stack in proxies.by_rate.items():
        answer = CASES[case].send(stack.url, vllm_server.model)
        proxies.sent[CASES[case].becomes] += rate * CASES[case].choices
        if isinstance(answer, dict) and "forms" in answer:
            assert_same_forms(answer.pop("forms"), expected["forms"])
            assert answer == {"answer": expected["answer"]}, f"at rate {rate}"
        else:
            assert answer == expected, f"at rate {rate}"


def test_every_sampled_request_is_accounted_for(proxies: Proxies, before: dict[str, Any]) -> None:
    """Runs last: what the tests above sent was scored, or skipped for its reason."""
    stack = proxies.by_rate[1]
    scored = proxies.sent.pop(SCORED, 0)
    requests = stack.wait_settled(before["shadowed"] + scored)
    assert requests["scored"] - before["scored"] == scored
    assert Counter(requests["skipped"]) - Counter(before["skipped"]) == proxies.sent
    assert requests["dropped"] == before["dropped"]
    assert proxies.by_rate[0].requests()["shadowed"] == 0
