"""`make dist`: everything that is installed, in build/dist/. Standard library only.

hemostat-V.tar.gz          the sources, from which all wheels are made
hemostat-V-….whl           pure Python, and with the compiled relay for each supported CPython of this machine
hemostat_vllm-V-….whl      the plugin for vLLM, and what it shares with the proxy
hemostat_lab-V-….whl       the laboratory
hemostat-V.tgz             the Helm chart
hemostat-V.image.tar, …    the two images, for `docker load`, where buildah can get their base images
hemostat-V.cdx.json        the packages that the image installs in addition to Hemostat (SBOM, CycloneDX)
SHA256SUMS                 for `sha256sum --check`

make dist ARGS="--build-arg BASE=registry.example.com/python:3.13-slim"     as for `buildah build`
make dist ARGS="--buildah=--isolation=chroot"                               any other argument of it
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import environment
from environment import ROOT, SetupError

import helm

BUILD = ROOT / "build"
DIST, LOG, TOOLS = BUILD / "dist", BUILD / "dist.log", BUILD / "dist-environment"
REQUIREMENTS = ("build>=1.3,<2", "cyclonedx-bom>=7.2,<8")
IMAGES = {"hemostat": ("Dockerfile", ("BASE",)), "hemostat-engine": ("Dockerfile.engine", ("BASE", "VLLM"))}
"""Image -> its file in deploy/, and the arguments there that name base images."""
COMPILE = {"HATCH_BUILD_HOOKS_ENABLE": "1"}


@dataclass(frozen=True)
class Interpreter:
    """A CPython of this machine. version: such as 3.12. lacks: why nothing can be compiled for it; empty if it can."""

    version: str
    path: str
    lacks: str


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "middleware/hemostat/__init__.py").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def supported() -> list[str]:
    """The versions of Python that pyproject.toml names."""
    return re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())


def interpreters() -> Iterator[Interpreter]:
    """One for each supported version that is here."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    ask = (
        "import os, sys, sysconfig; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], sys.executable,"
        " os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')), sep='\\n')"
    )
    for wanted in supported():
        name = f"python{wanted}"
        for path in [*filter(None, [shutil.which(name)]), *map(str, sorted(pyenv.glob(f"*/bin/{name}"), reverse=True))]:
            asked = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False)
            if asked.returncode == 0 and asked.stdout.splitlines()[:2] == ["cpython", wanted]:
                _, _, program, headers = asked.stdout.splitlines()
                lacks = "" if headers == "True" else "it has no Python.h"
                if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
                    lacks = "there is no C compiler"
                yield Interpreter(wanted, program, lacks)
                break


def arguments_of(file: str) -> dict[str, str]:
    """The build arguments of a file in deploy/, with their defaults."""
    found = re.findall(r'^ARG (\w+)="?([^"\s]*)"?$', (ROOT / "deploy" / file).read_text(), re.MULTILINE)
    return dict(found)


def checksums(folder: Path) -> str:
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


class Distribution:
    """Writes the files into `DIST`, which it empties first. Every step may raise SetupError."""

    def __init__(self, build_arguments: Sequence[str], buildah_arguments: Sequence[str]) -> None:
        self.version = version()
        self._given = dict(argument.partition("=")[::2] for argument in build_arguments)
        known = {name for file, _ in IMAGES.values() for name in arguments_of(file)}
        if unknown := sorted(self._given.keys() - known):
            raise SetupError(f"--build-arg {unknown[0]}: no Dockerfile has it: they have {', '.join(sorted(known))}")
        self._buildah = [*buildah_arguments]
        self._missing: list[str] = []

    def make(self) -> list[str]:
        """Makes everything. Returns what could not be made, with the reason, one line each."""
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir(parents=True)
        LOG.write_text("")
        for n, step in enumerate(steps := (self.sources, self.wheels, self.chart, self.images, self.sbom), 1):
            report(f"[{n}/{len(steps)}] {(step.__doc__ or '').rstrip('.')}")
            began, before = time.monotonic(), set(DIST.iterdir())
            step()
            for path in sorted(set(DIST.iterdir()) - before):
                report(f"      {path.name}  {path.stat().st_size / 2**20:.1f} MiB  {time.monotonic() - began:.0f} s")
        (DIST / "SHA256SUMS").write_text(checksums(DIST))
        return self._missing

    def sources(self) -> None:
        """The sources."""
        if not (TOOLS / "bin" / "python").exists():
            environment.create(TOOLS)
        self._run("pip cannot install the tools", self._tool("pip"), "install", *REQUIREMENTS)
        self._run("no sources", self._tool("python"), "-m", "build", "--sdist", "--outdir", str(DIST), str(ROOT))

    def wheels(self) -> None:
        """Wheels from these sources: pure Python, then with the compiled relay."""
        unpacked = BUILD / "dist-sources"
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(DIST / f"hemostat-{self.version}.tar.gz") as archive:
            archive.extractall(unpacked, filter="data")
        sources = unpacked / f"hemostat-{self.version}"
        command = ["wheel", "--no-deps", "--wheel-dir", str(DIST), str(sources)]
        others = [str(sources / folder) for folder in environment.FOLDERS if folder != "."]
        self._run("no wheel", self._tool("pip"), *command, *others)
        available = {interpreter.version: interpreter for interpreter in interpreters()}
        for wanted in supported():
            interpreter = available.get(wanted)
            why = "it is not on this machine" if interpreter is None else interpreter.lacks
            if interpreter is None or why:
                self._miss(f"a wheel for CPython {wanted} with the compiled relay: {why}")
                continue
            report(f"      compiling for CPython {wanted}: {interpreter.path}")
            pip = (self._tool("pip"), "--python", interpreter.path)
            self._run(f"not compiled for CPython {wanted}", *pip, *command, variables=COMPILE)
        shutil.rmtree(unpacked)

    def chart(self) -> None:
        """The Helm chart."""
        try:
            program = helm.find()
        except helm.HelmError as error:
            self._miss(f"the chart: {error}")
            return
        self._run("no chart", str(program), "package", str(ROOT / "helm" / "hemostat"), "--destination", str(DIST))

    def images(self) -> None:
        """The images, which need their base images."""
        if shutil.which("buildah") is None:
            self._miss("the images: buildah is not installed")
            return
        for name, (file, bases) in IMAGES.items():
            path, defaults = ROOT / "deploy" / file, arguments_of(file)
            why = next(filter(None, (cannot_pull((defaults | self._given)[base]) for base in bases)), "")
            if why:
                self._miss(f"the image {name}: its base image cannot be had: {why}")
                continue
            tag, archive = f"{name}:{self.version}", DIST / f"{name}-{self.version}.image.tar"
            given = [f"--build-arg={key}={value}" for key, value in self._given.items() if key in defaults]
            command = ["buildah", "build", "--format", "docker", *given, *self._buildah]
            self._run(f"no image {name}", *command, "--file", str(path), "--tag", tag, str(ROOT))
            self._run(f"no archive of {name}", "buildah", "push", tag, f"docker-archive:{archive}:{tag}")

    def sbom(self) -> None:
        """The list of what the image installs (SBOM)."""
        arguments = arguments_of("Dockerfile") | self._given
        extras = ",".join(filter(None, (arguments["BASIC_EXTRAS"], arguments["EXTRAS"])))
        installed = BUILD / "dist-installed"
        environment.create(installed)
        wheel = DIST / f"hemostat-{self.version}-py3-none-any.whl"
        pip = (self._tool("pip"), "--python", str(installed / "bin" / "python"))
        wanted = f"{wheel}[{extras}]" if extras else str(wheel)
        self._run("the wheel cannot be installed", *pip, "install", "--find-links", str(DIST), wanted)
        self._run("pip cannot be removed", *pip, "uninstall", "--yes", "pip", "setuptools")
        for path in installed.glob("lib/python*/site-packages/hemostat*.dist-info/direct_url.json"):
            path.unlink()  # where the wheel was on this machine
        output = ["--output-reproducible", "--of", "JSON", "-o", str(DIST / f"hemostat-{self.version}.cdx.json")]
        self._run("no SBOM", self._tool("cyclonedx-py"), "environment", *output, str(installed / "bin" / "python"))
        shutil.rmtree(installed)

    def _tool(self, name: str) -> str:
        return str(TOOLS / "bin" / name)

    def _run(self, failure: str, *command: str, variables: dict[str, str] | None = None) -> None:
        if not environment.run(command, BUILD, LOG, report, variables=os.environ | (variables or {})):
            raise SetupError(f"{failure}: see the end of {LOG}")

    def _miss(self, what: str) -> None:
        self._missing.append(what)
        report(f"      missing: {what}")


def cannot_pull(image: str) -> str:
    """Returns why buildah cannot get an image; "" if it can, or has it already."""
    pulled = subprocess.run(
        ["buildah", "pull", "--quiet", "--policy", "missing", image], capture_output=True, text=True, check=False
    )
    return "" if pulled.returncode == 0 else (pulled.stderr.strip().splitlines() or ["buildah says nothing"])[-1]


def report(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__.partition("\n")[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="of the Dockerfiles")
    parser.add_argument("--buildah", action="append", default=[], metavar="ARG", help="a further one of buildah build")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        missing = Distribution(options.build_arg, options.buildah).make()
    except SetupError as error:
        print(f"dist: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("dist: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    files = len(list(DIST.iterdir()))
    report(f"{files} files in {os.path.relpath(DIST)}" + (", without:" if missing else ""))
    for what in missing:
        report(f"  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
