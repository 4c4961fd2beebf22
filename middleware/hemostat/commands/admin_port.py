"""Commands that talk to the admin port of a running `hemostat serve`: their options, and their requests."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from hemostat.commands.arguments import UsageError
from hemostat_calibration.messages import in_words, shown_address

if TYPE_CHECKING:
    import httpx

DEFAULT_ADMIN = "http://127.0.0.1:8081"
VARIABLE = "HEMOSTAT_ADMIN__TOKEN"
"""The variable with `admin.token`, which chart and Compose set: the commands work where the process itself runs."""
FORMER_VARIABLE = "HEMOSTAT_ADMIN_TOKEN"
"""The name that only these commands read before; it still works."""
ADMIN_SECONDS = 30.0
"""The timeout of a request."""


def add_admin_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--admin",
        # For the engine plugin, the variable may name several (`a,b`, `dns+http://name`); any one will do.
        default=_of_one(os.environ.get("HEMOSTAT_ADMIN_URL") or DEFAULT_ADMIN),
        metavar="URL",
        help=f"Address of the admin port (HEMOSTAT_ADMIN_URL; default: {DEFAULT_ADMIN}).",
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"The admin token. Default: {VARIABLE}, or the file in {VARIABLE}_FILE.",
    )


def _of_one(urls: str) -> str:
    """Returns the first of several addresses. With a password, which is refused and may hold commas, all of it."""
    return (urls if "@" in urls else urls.split(",", maxsplit=1)[0]).removeprefix("dns+")


def _token(options: argparse.Namespace) -> str | None:
    """Returns the admin token of these options, or of the environment. Raises ConfigError if its file does not hold
    it."""
    from hemostat.config.loading import secret_from_environment  # noqa: PLC0415

    if options.token:
        return str(options.token)
    return secret_from_environment("admin", "token", os.environ) or os.environ.get(FORMER_VARIABLE)


def has_token(options: argparse.Namespace) -> bool:
    """Returns True if these options, or the environment, have an admin token. Raises ConfigError."""
    return bool(_token(options))


def admin_request(options: argparse.Namespace, method: str, path: str, **body: Any) -> httpx.Response:
    """Sends a request to the admin port, and returns the response. Raises UsageError if it cannot be reached or
    refuses."""
    import httpx  # noqa: PLC0415

    from hemostat.ipc.http_bodies import IDENTITY, AnswerRefused, read_answer_now  # noqa: PLC0415
    from hemostat_calibration.profiles.profile import MAX_BYTES  # noqa: PLC0415

    shown = shown_address(options.admin)
    token = _token(options)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with (
            httpx.Client(base_url=options.admin, timeout=ADMIN_SECONDS, trust_env=False, headers=IDENTITY) as client,
            client.stream(method, path, headers=headers, **body) as answer,
        ):
            response = httpx.Response(answer.status_code, content=read_answer_now(answer, MAX_BYTES))
    except UnicodeEncodeError:
        raise UsageError(f"--token ({VARIABLE}) is not ASCII; give the value of admin.token") from None
    except httpx.InvalidURL:  # its text has a part of the address
        raise UsageError(f"--admin: {shown} is not an address; write it like {DEFAULT_ADMIN}") from None
    except (httpx.HTTPError, AnswerRefused) as error:
        raise UsageError(
            f"{shown}: {in_words(error)} (is hemostat serve running? --admin names its admin port)"
        ) from None
    if response.is_success:
        return response
    try:
        detail = response.json()["detail"]
    except (ValueError, LookupError, TypeError):
        detail = response.text[:300]
    raise UsageError(f"{shown}{path} answered {response.status_code}: {detail}")


def admin_json(options: argparse.Namespace, method: str, path: str, **body: Any) -> dict[str, Any]:
    """Sends a request to the admin port as `admin_request` does, and returns the JSON object of the answer. Raises
    UsageError for any other answer."""
    try:
        answer = admin_request(options, method, path, **body).json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UsageError(f"{shown_address(options.admin)}{path} answered no JSON object; --admin names the admin port")
    return answer
