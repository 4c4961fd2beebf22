"""One request's output, in the form of chat or completions that was asked for: one choice or several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from tests.support.fake_vllm.answers import DONE, RefusedError, dumps, error_event
from tests.support.fake_vllm.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from tests.support.fake_vllm.model import Step
from tests.support.fake_vllm.tools import ToolStream, tool_call

if TYPE_CHECKING:
    from tests.support.fake_vllm.server import FakeVllm


class _Choice:
    """One of the outputs: its tokens so far."""

    def __init__(self, index: int, prompt: list[int], steps: Iterator[Step], tool_id: str | None) -> None:
        """tool_id: of the tool call; None: no tools are parsed."""
        self.index, self.prompt, self.tool_id = index, prompt, tool_id
        self._steps = enumerate(steps)
        self.parser = None if tool_id is None else ToolStream(tool_id)
        self.completed = self.offset = 0

    def next(self) -> tuple[int, Step] | None:
        return next(self._steps, None)


class Generation:
    """One request's output, in the form that was asked for."""

    def __init__(
        self, fake: FakeVllm, chat: bool, body: dict[str, Any], prompts: list[list[int]], limit: int, request_id: str
    ) -> None:
        self.fake, self.chat, self.body, self.prompts, self.id = fake, chat, body, prompts, request_id
        options = body.get("stream_options") or {}
        self.usage = fake.force_usage or bool(options.get("include_usage"))
        self.continuous = fake.force_usage or (self.usage and bool(options.get("continuous_usage_stats")))
        self.return_ids = bool(body.get("return_token_ids")) and fake.returns_token_ids
        tools = bool(body.get("tools")) and body.get("tool_choice", "auto") == "auto" and fake.tool_parser
        each = body.get("n") or 1
        self.choices = [
            _Choice(
                index := each * number + child,
                prompt,
                fake.steps(prompt, body if not child else body | {"seed": (body.get("seed") or 0) + child}, limit),
                self._tool_id(index) if tools else None,
            )
            for number, prompt in enumerate(prompts)
            for child in range(each)
        ]
        self.steps: list[list[Step]] = [[] for _ in self.choices]
        """Of each choice so far."""

    def _tool_id(self, index: int) -> str:
        name = f"{self.id}-{index}" if index else self.id
        return f"chatcmpl-tool-{blake2b(name.encode(), digest_size=8).hexdigest()}"

    async def decoded(self) -> AsyncIterator[tuple[_Choice, Step]]:
        """The steps of all choices, as they come: one of each choice in turn."""
        with self._in_batches():
            running = list(self.choices)
            while running:
                for choice in list(running):
                    step = choice.next()
                    if step is None:
                        running.remove(choice)
                        continue
                    await self._wait(step[0])
                    self.steps[choice.index].append(step[1])
                    yield choice, step[1]

    def _in_batches(self) -> AbstractContextManager[None]:
        lora = self.fake.lora
        return nullcontext() if lora is None else lora.generation(self.fake.answers_as(self.body))

    async def _wait(self, position: int) -> None:
        await asyncio.sleep(self.fake.token_delay)
        while position == self.fake.hold_after:
            await asyncio.sleep(0.01)
        if self.fake.lora is not None and self.body.get("model") in self.fake.lora.broken:
            raise RefusedError("Internal server error", None, "InternalServerError", 500)
        if position == self.fake.die_after:
            raise ConnectionError("the fake engine dies here, as it was told to")

    def prompt_logprobs(self, prompt: list[int]) -> list[dict[str, Any] | None]:
        rows = prompt_logprobs(self.fake, prompt, self.body)
        if self.fake.last_prompt_logprob != 0:
            rows[-1] = {
                name: row | {"logprob": self.fake.last_prompt_logprob} for name, row in (rows[-1] or {}).items()
            }
        return rows[: len(rows) - self.fake.short_prompt_logprobs]

    def _usage(self, prompts: list[list[int]], completed: int) -> dict[str, Any]:
        prompt = sum(map(len, prompts))
        return {"prompt_tokens": prompt, "total_tokens": prompt + completed, "completion_tokens": completed}

    async def whole(self) -> dict[str, Any]:
        steps: list[list[Step]] = [[] for _ in self.choices]
        async for choice, step in self.decoded():
            steps[choice.index].append(step)
        make = self._whole_chat if self.chat else self._whole_completion
        first = self.prompts[0]
        prompt_k = self.body.get("prompt_logprobs")
        extra = {
            "prompt_logprobs": None if prompt_k is None else self.prompt_logprobs(first),
            "prompt_token_ids": first if self.return_ids else None,
            "prompt_text": None,
        }
        usage = self._usage(self.prompts, sum(map(len, steps)))
        return {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [make(choice, steps[choice.index]) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": self.fake.fingerprint,
            "usage": usage | {"prompt_tokens_details": None, "completion_tokens_details": None},
            **(extra if self.chat else {}),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _whole_chat(self, choice: _Choice, steps: list[Step]) -> dict[str, Any]:
        text = "".join(step.text for step in steps)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        finish = steps[-1].finish
        if choice.tool_id is not None and (call := tool_call(text)) is not None:
            before, name, arguments = call
            message["content"] = before or None
            message["tool_calls"] = [
                {"id": choice.tool_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            ]
            finish = "tool_calls"
        return {
            "index": choice.index,
            "message": message | {"reasoning": None},
            "logprobs": chat_logprobs(steps, self.body) if self.body.get("logprobs") else None,
            "finish_reason": finish,
            "stop_reason": steps[-1].stop_reason,
            "token_ids": [step.token for step in steps] if self.return_ids else None,
            "routed_experts": None,
        }

    def _whole_completion(self, choice: _Choice, steps: list[Step]) -> dict[str, Any]:
        wanted, prompt_k = self.body.get("logprobs"), self.body.get("prompt_logprobs")
        return {
            "index": choice.index,
            "text": "".join(step.text for step in steps),
            "logprobs": None if wanted is None else completion_logprobs(steps, self.body, 0),
            "finish_reason": steps[-1].finish,
            "stop_reason": steps[-1].stop_reason,
            "token_ids": [step.token for step in steps] if self.return_ids else None,
            "prompt_logprobs": None if prompt_k is None else self.prompt_logprobs(choice.prompt),
            "prompt_token_ids": choice.prompt if self.return_ids else None,
            "routed_experts": None,
        }

    def _event(self, of: _Choice | None, choice: dict[str, Any] | None, **more: Any) -> bytes:
        """of: None for the event with the usage of all choices."""
        event: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [] if choice is None else [choice],
        }
        if of is None:
            event["usage"] = self._usage(self.prompts, sum(choice.completed for choice in self.choices))
        elif self.continuous:
            details = {"completion_tokens_details": None} if self.chat else {}
            event["usage"] = self._usage([of.prompt], of.completed) | details
        finished = choice is None or (choice["finish_reason"] is not None and not self.usage)
        if finished and self.fake.fingerprint is not None:
            event["system_fingerprint"] = self.fake.fingerprint
        return b"data: " + dumps(event | more) + b"\n\n"

    async def events(self) -> AsyncIterator[bytes]:
        begun = False
        async for choice, step in self.decoded():
            if choice.completed == self.fake.error_after:
                yield error_event(RefusedError("Internal server error", None, "InternalServerError", 500).body)
                break
            if not begun and self.chat:
                for each in self.choices:
                    yield self._role_event(each)
            begun = True
            choice.completed += 1
            event = self._chat_event(choice, step) if self.chat else self._completion_event(choice, step)
            if event is not None:
                yield event
        else:
            if self.usage:
                yield self._event(None, None)
        yield DONE

    def _role_event(self, choice: _Choice) -> bytes:
        role = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        prompt_ids = choice.prompt if self.return_ids else None
        return self._event(choice, role | {"finish_reason": None}, prompt_token_ids=prompt_ids, prompt_text=None)

    def _completion_event(self, choice: _Choice, step: Step) -> bytes:
        logprobs = None
        if self.body.get("logprobs") is not None:
            logprobs = completion_logprobs([step], self.body, choice.offset)
            choice.offset += len(logprobs["tokens"][0])
        return self._event(
            choice,
            {
                "index": choice.index,
                "text": step.text,
                "logprobs": logprobs,
                "finish_reason": step.finish,
                "stop_reason": step.stop_reason,
                "prompt_token_ids": choice.prompt if self.return_ids and choice.completed == 1 else None,
                "token_ids": [step.token] if self.return_ids else None,
            },
        )

    def _chat_event(self, of: _Choice, step: Step) -> bytes | None:
        delta: dict[str, Any] | None = {"content": step.text}
        finish = step.finish
        if of.parser is not None:
            delta = of.parser.feed(step.text, step.finish is not None)
            if of.parser.called and finish == "stop":
                finish = "tool_calls"
        elif self.fake.tool_parser and not step.text:
            delta = None
        ids = [step.token] if self.return_ids else None
        logprobs = chat_logprobs([step], self.body) if self.body.get("logprobs") else None
        if delta is None and finish is None and (self.fake.lose_tool_tokens or (logprobs is None and ids is None)):
            return None
        choice: dict[str, Any] = {
            "index": of.index,
            "delta": delta or {},
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if finish is not None:
            choice["stop_reason"] = step.stop_reason
        return self._event(of, choice | {"token_ids": ids})
