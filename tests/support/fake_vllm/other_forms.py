"""`/v1/responses` and `/v1/messages`: one choice, rendered as a chat, with its text or tool call in their forms."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from tests.support.fake_vllm.answers import RefusedError, dumps
from tests.support.fake_vllm.model import Step
from tests.support.fake_vllm.tools import tool_call

if TYPE_CHECKING:
    from tests.support.fake_vllm.generation import Generation

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def as_chat(path: str, body: dict[str, Any], *, kept: bool = False) -> dict[str, Any]:
    """The chat request that vLLM makes of it. kept: responses are."""
    if path == MESSAGES:
        if "messages" not in body or "max_tokens" not in body:
            raise RefusedError("1 validation error:\n  Field required", None)
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        more = {"messages": [*system, *body["messages"]], "stop": body.get("stop_sequences")}
        if body.get("tool_choice"):
            more["tool_choice"] = {"any": "required"}.get(choice := body["tool_choice"]["type"], choice)
        return {key: value for key, value in body.items() if key != "system"} | more
    given = body.get("input")
    if body.get("background") and body.get("previous_response_id"):
        # The two refusals of which one says whether responses are kept.
        text, code = ("not found", 404) if kept else ("set `VLLM_ENABLE_RESPONSES_API_STORE=1`", 400)
        raise RefusedError(text, "background", code=code)
    if given is None:
        raise RefusedError("1 validation error:\n  Field required", "body.input", "Bad Request")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else [*given]
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    return body | {"messages": messages, "max_tokens": body.get("max_output_tokens")}


def anthropic_error(refused: RefusedError) -> dict[str, Any]:
    error = refused.body["error"]
    return {"type": "error", "error": {"type": error["type"], "message": error["message"]}}


class OtherForm:
    """One request's output. generation: the same request as a chat. body: the client's."""

    def __init__(self, generation: Generation, path: str, body: dict[str, Any]) -> None:
        self._generation = generation
        self._path = path
        self._body = body
        self._parses_tools = generation.choices[0].tool_id is not None
        self._prompt = generation.prompts[0]
        self.steps: list[Step] = []

    def _id(self, prefix: str) -> str:
        return prefix + blake2b(f"{prefix}{self._generation.id}".encode(), digest_size=16).hexdigest()

    async def whole(self) -> dict[str, Any]:
        async for _, step in self._generation.decoded():
            self.steps.append(step)
        return self._message() if self._path == MESSAGES else self._response("ended")

    async def events(self) -> AsyncIterator[bytes]:
        make = self._message_events if self._path == MESSAGES else self._response_events
        for event in make(None):
            yield _event(event)
        async for _, step in self._generation.decoded():
            if len(self.steps) == self._generation.fake.error_after:
                error = {"type": "internal_error", "message": "Internal server error"}
                yield _event({"type": "error", "error": error})
                return
            self.steps.append(step)
            for event in make(step):
                yield _event(event)

    @property
    def _text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def _call(self) -> tuple[str, str, str] | None:
        return tool_call(self._text) if self._parses_tools else None

    def _usage(self) -> dict[str, Any]:
        return {"input_tokens": len(self._prompt), "output_tokens": len(self.steps)}

    # /v1/messages

    def _message(self) -> dict[str, Any]:
        call, text, content = self._call, self._text, []
        if call is not None:
            text = call[0]
        if text or call is None:
            content.append({"type": "text", "text": text})
        if call is not None:
            arguments = json.loads(call[2])
            content.append({"type": "tool_use", "id": self._id("chatcmpl-tool-"), "name": call[1], "input": arguments})
        return {
            "id": self._generation.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._generation.fake.answers_as(self._body),
            **self._stop(),
            "usage": self._usage(),
        }

    def _stop(self) -> dict[str, Any]:
        """A whole message leaves out what is null."""
        last = self.steps[-1]
        if self._call is not None:
            return {"stop_reason": "tool_use"}
        if last.stop_reason is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
        return {"stop_reason": _STOP_REASONS[last.finish or "stop"]}

    def _message_events(self, step: Step | None) -> list[dict[str, Any]]:
        if step is None:
            message = {
                "id": self._generation.id,
                "type": "message",
                "role": "assistant",
                "content": [],
                "model": self._generation.fake.answers_as(self._body),
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": len(self._prompt), "output_tokens": 0},
            }
            return [{"type": "message_start", "message": message}]
        events: list[dict[str, Any]] = []
        if not self._parses_tools and step.text:
            if not any(before.text for before in self.steps[:-1]):
                events.append(self._block({"type": "text", "text": ""}))
            events.append(_delta({"type": "text_delta", "text": step.text}))
        if step.finish is not None:
            if self._parses_tools:
                call, text = self._call, self._text
                block = {"type": "text", "text": ""}
                delta: dict[str, Any] = {"type": "text_delta", "text": text}
                if call is not None:
                    block = {"type": "tool_use", "id": self._id("chatcmpl-tool-"), "name": call[1], "input": {}}
                    delta = {"type": "input_json_delta", "partial_json": call[2]}
                events += [self._block(block), _delta(delta)]
            if events or self._text:
                events.append({"type": "content_block_stop", "index": 0})
            stop = {"stop_reason": None, "stop_sequence": None} | self._stop()
            events.append({"type": "message_delta", "delta": stop, "usage": self._usage()})
            events.append({"type": "message_stop"})
        return events

    def _block(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "content_block": block, "index": 0}

    # /v1/responses

    def _response(self, status: str) -> dict[str, Any]:
        """status: `ended` for the one of a response that has ended."""
        body, ended = self._body, status == "ended"
        if ended:
            status = "incomplete" if self.steps[-1].finish == "length" else "completed"
        usage = self._usage()
        return {
            "id": self._id("resp_"),
            "created_at": self._generation.fake.created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": self._generation.fake.answers_as(body),
            "object": "response",
            "output": [self._item("completed")] if ended else [],
            "parallel_tool_calls": True,
            "temperature": 1.0 if body.get("temperature") is None else float(body["temperature"]),
            "tool_choice": body.get("tool_choice", "auto" if body.get("tools") else "none"),
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p") or 1.0,
            "background": False,
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": None,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": body.get("text"),
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": None
            if not ended
            else {
                "input_tokens": usage["input_tokens"],
                "input_tokens_details": {
                    "cached_tokens": 0,
                    "cache_write_tokens": 0,
                    "input_tokens_per_turn": [],
                    "cached_tokens_per_turn": [],
                },
                "output_tokens": usage["output_tokens"],
                "output_tokens_details": {
                    "reasoning_tokens": 0,
                    "tool_output_tokens": 0,
                    "output_tokens_per_turn": [],
                    "tool_output_tokens_per_turn": [],
                },
                "total_tokens": usage["input_tokens"] + usage["output_tokens"],
            },
            "user": None,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": self._tokens(self._prompt) if ended else None,
            "output_messages": self._tokens([step.token for step in self.steps]) if ended else None,
        }

    def _tokens(self, ids: list[int]) -> list[dict[str, Any]] | None:
        if not self._body.get("enable_response_messages"):
            return None
        return [{"message": "raw", "tokens": ids, "type": "raw_message_tokens"}]

    def _item(self, status: str) -> dict[str, Any]:
        call = self._call
        if call is not None:
            return {
                "arguments": call[2],
                "call_id": self._id("call_"),
                "name": call[1],
                "type": "function_call",
                "id": self._id("fc_"),
                "status": status,
            }
        return {
            "id": self._id("msg_"),
            "content": [self._part(self._text)] if status == "completed" else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def _response_events(self, step: Step | None) -> list[dict[str, Any]]:
        begin = step is None
        if begin:
            response = self._response("in_progress")
            self._numbers = iter(range(10**6))
            return [self._numbered(type=f"response.{name}", response=response) for name in ("created", "in_progress")]
        assert step is not None
        events: list[dict[str, Any]] = []
        place = {"content_index": 0, "output_index": 0, "item_id": self._id("msg_")}
        if not self._parses_tools:
            if len(self.steps) == 1:
                item = self._item("in_progress")
                events.append(self._numbered(type="response.output_item.added", output_index=0, item=item))
                part = self._part("") | {"logprobs": []}
                events.append(self._numbered(type="response.content_part.added", **place, part=part))
            text = {"type": "response.output_text.delta", "delta": step.text, "logprobs": []}
            events.append(self._numbered(**place, **text))
        if step.finish is not None:
            if not self._parses_tools:
                done = {"type": "response.output_text.done", "text": self._text, "logprobs": []}
                events.append(self._numbered(**place, **done))
                part = self._part(self._text)
                events.append(self._numbered(type="response.content_part.done", **place, part=part))
            item = self._item("completed")
            events.append(self._numbered(type="response.output_item.done", output_index=0, item=item))
            events.append(self._numbered(type="response.completed", response=self._response("ended")))
        return events

    def _numbered(self, **event: Any) -> dict[str, Any]:
        """The members of such an event are in alphabetical order."""
        return dict(sorted((event | {"sequence_number": next(self._numbers)}).items()))


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "delta": delta, "index": 0}


def _event(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + b"data: " + dumps(event) + b"\n\n"
