"""Hatch's build hook that compiles the relay's hot path with mypyc; off unless HATCH_BUILD_HOOKS_ENABLE=1.

pyproject.toml names the modules (`tool.hatch.build.targets.wheel.hooks.custom`). The wheel then holds, next to each
module's source, an extension module that Python prefers on import, and one shared library that all of these use. They
are made in a temporary folder: a source tree with extension modules in it would keep on running old code after an edit.
For the same reason an editable install is never compiled.

MYPYC_OPT_LEVEL  of the C compiler; 3 unless set. 0 compiles in a fraction of the time, for tests.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "hemostat_compiled"
"""The shared library; mypyc adds `__mypyc` to its name. It lies above all packages: from its place mypyc derives what
`__file__` of the modules is."""


class CompileHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory(prefix="hemostat-mypyc-")
        built = Path(self._folder.name, "built")
        compile_modules(Path(self.root), self.config["modules"], Path(self._folder.name, "c"), built)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(path): str(path.relative_to(built)) for path in built.rglob("*.*")})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()


def compile_modules(root: Path, modules: list[str], sources: Path, built: Path) -> None:
    """Write extension modules into `built`, and the C code they are made of into `sources`.

    modules: paths below root/middleware. Ends the process where mypy finds an error or the C compiler fails.
    """
    # Only the hook's own dependencies, so not at the top: hatchling imports this file for other versions, too.
    from mypyc.build import mypycify  # noqa: PLC0415
    from setuptools import Distribution  # noqa: PLC0415

    paths = [str(Path("middleware", module)) for module in modules]
    before = Path.cwd()
    os.chdir(root)  # where mypy looks for its settings, and what their paths are relative to
    try:
        extensions = mypycify(
            ["--config-file=pyproject.toml", "--follow-imports=silent", "--cache-dir", os.devnull, *paths],
            opt_level=os.environ.get("MYPYC_OPT_LEVEL", "3"),
            debug_level="0",
            target_dir=str(sources),
            group_name=LIBRARY,
        )
        command = Distribution({"name": "hemostat", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(built), str(sources / "objects")
        command.ensure_finalized()
        command.run()
    finally:
        os.chdir(before)
