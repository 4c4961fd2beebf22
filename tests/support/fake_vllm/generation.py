"""One request's output, in the form of chat or completions that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from tests.support.fake_vllm.answers import DONE, RefusedError, dumps, error_event
from tests.support.fake_vllm.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from tests.support.fake_vllm.model import Step
from tests.support.fake_vllm.tools import ToolStream, tool_call

if TYPE_CHECKING:
    from tests.support.fake_vllm.server import FakeVllm


class Generation:
    """One request's output, in the form that was asked for."""

    def __init__(
        self, fake: FakeVllm, chat: bool, body: dict[str, Any], prompt: list[int], limit: int, request_id: str
    ) -> None:
        self.fake, self.chat, self.body, self.prompt, self.limit, self.id = fake, chat, body, prompt, limit, request_id
        options = body.get("stream_options") or {}
        self.usage = fake.force_usage or bool(options.get("include_usage"))
        self.continuous = fake.force_usage or (self.usage and bool(options.get("continuous_usage_stats")))
        self.return_ids = bool(body.get("return_token_ids")) and fake.returns_token_ids
        self.tools = bool(body.get("tools")) and body.get("tool_choice", "auto") == "auto" and fake.tool_parser
        self.tool_id = f"chatcmpl-tool-{blake2b(request_id.encode(), digest_size=8).hexdigest()}"

    async def _steps(self) -> AsyncIterator[Step]:
        with self._in_batches():
            async for step in self._own_steps():
                yield step

    def _in_batches(self) -> AbstractContextManager[None]:
        lora = self.fake.lora
        return nullcontext() if lora is None else lora.generation(self.fake.answers_as(self.body))

    async def _own_steps(self) -> AsyncIterator[Step]:
        for position, step in enumerate(self.fake.steps(self.prompt, self.body, self.limit)):
            await asyncio.sleep(self.fake.token_delay)
            while position == self.fake.hold_after:
                await asyncio.sleep(0.01)
            if self.fake.lora is not None and self.body.get("model") in self.fake.lora.broken:
                raise RefusedError("Internal server error", None, "InternalServerError", 500)
            if position == self.fake.die_after:
                raise ConnectionError("the fake engine dies here, as it was told to")
            yield step

    def _prompt_logprobs(self) -> list[dict[str, Any] | None]:
        rows = prompt_logprobs(self.fake, self.prompt, self.body)
        return rows[: len(rows) - self.fake.short_prompt_logprobs]

    def _usage(self, completed: int) -> dict[str, Any]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + completed, "completion_tokens": completed}

    async def whole(self) -> dict[str, Any]:
        steps = [step async for step in self._steps()]
        text = "".join(step.text for step in steps)
        last = steps[-1]
        ids = [step.token for step in steps] if self.return_ids else None
        prompt_ids = self.prompt if self.return_ids else None
        if self.chat:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
            }
            finish = last.finish
            if self.tools and (call := tool_call(text)) is not None:
                before, name, arguments = call
                message["content"] = before or None
                message["tool_calls"] = [
                    {"id": self.tool_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                ]
                finish = "tool_calls"
            choice: dict[str, Any] = {
                "index": 0,
                "message": message | {"reasoning": None},
                "logprobs": chat_logprobs(steps, self.body) if self.body.get("logprobs") else None,
                "finish_reason": finish,
                "stop_reason": last.stop_reason,
                "token_ids": ids,
                "routed_experts": None,
            }
            extra = {"prompt_logprobs": None, "prompt_token_ids": prompt_ids, "prompt_text": None}
        else:
            wanted, prompt_k = self.body.get("logprobs"), self.body.get("prompt_logprobs")
            choice = {
                "index": 0,
                "text": text,
                "logprobs": None if wanted is None else completion_logprobs(steps, self.body, 0),
                "finish_reason": last.finish,
                "stop_reason": last.stop_reason,
                "token_ids": ids,
                "prompt_logprobs": None if prompt_k is None else self._prompt_logprobs(),
                "prompt_token_ids": prompt_ids,
                "routed_experts": None,
            }
            extra = {}
        return {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": self.fake.fingerprint,
            "usage": self._usage(len(steps)) | {"prompt_tokens_details": None, "completion_tokens_details": None},
            **extra,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _event(self, choice: dict[str, Any] | None, completed: int, **more: Any) -> bytes:
        event: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [] if choice is None else [choice],
        }
        if choice is None:
            event["usage"] = self._usage(completed)
        elif self.continuous:
            details = {"completion_tokens_details": None} if self.chat else {}
            event["usage"] = self._usage(completed) | details
        finished = choice is None or (choice["finish_reason"] is not None and not self.usage)
        if finished and self.fake.fingerprint is not None:
            event["system_fingerprint"] = self.fake.fingerprint
        return b"data: " + dumps(event | more) + b"\n\n"

    async def events(self) -> AsyncIterator[bytes]:
        parser = ToolStream(self.tool_id) if self.tools else None
        completed = offset = 0
        async for step in self._steps():
            if completed == self.fake.error_after:
                yield error_event(RefusedError("Internal server error", None, "InternalServerError", 500).body)
                break
            if completed == 0 and self.chat:
                role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                prompt_ids = self.prompt if self.return_ids else None
                yield self._event(role | {"finish_reason": None}, 0, prompt_token_ids=prompt_ids, prompt_text=None)
            completed += 1
            ids = [step.token] if self.return_ids else None
            if self.chat:
                event = self._chat_event(step, ids, completed, parser)
                if event is not None:
                    yield event
                continue
            logprobs = None
            if self.body.get("logprobs") is not None:
                logprobs = completion_logprobs([step], self.body, offset)
                offset += len(logprobs["tokens"][0])
            yield self._event(
                {
                    "index": 0,
                    "text": step.text,
                    "logprobs": logprobs,
                    "finish_reason": step.finish,
                    "stop_reason": step.stop_reason,
                    "prompt_token_ids": self.prompt if self.return_ids and completed == 1 else None,
                    "token_ids": ids,
                },
                completed,
            )
        else:
            if self.usage:
                yield self._event(None, completed)
        yield DONE

    def _chat_event(self, step: Step, ids: list[int] | None, completed: int, parser: ToolStream | None) -> bytes | None:
        delta: dict[str, Any] | None = {"content": step.text}
        finish = step.finish
        if parser is not None:
            delta = parser.feed(step.text, step.finish is not None)
            if parser.called and finish == "stop":
                finish = "tool_calls"
        elif self.fake.tool_parser and not step.text:
            delta = None
        logprobs = chat_logprobs([step], self.body) if self.body.get("logprobs") else None
        if delta is None and finish is None and (self.fake.lose_tool_tokens or (logprobs is None and ids is None)):
            return None
        choice: dict[str, Any] = {"index": 0, "delta": delta or {}, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = step.stop_reason
        return self._event(choice | {"token_ids": ids}, completed)
