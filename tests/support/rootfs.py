"""A base image in place of python:…-slim and vllm-openai, out of this machine's own files: nothing can be pulled here.

It holds this Python with its standard library, pip, the few programs that the Dockerfiles call, and the libraries that
all of these are linked with. pip installs from WHEELHOUSE alone, to be mounted there: so a build needs no network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

WHEELHOUSE = "/wheelhouse"
PROGRAMS = ("sh", "ls", "install", "cat", "id", "find", "groupadd", "useradd")
OF_WHEELS = ("libgcc_s.so.1", "libstdc++.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")
"""What every manylinux wheel may expect of a system."""
FOLDERS = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/local/bin", "var")
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "shadow": "root:*:19000:0:99999:7:::\n",
    "gshadow": "root:*::\n",
    "login.defs": "",
    "pip.conf": f"[global]\nno-index = true\nfind-links = {WHEELHOUSE}\n",
}


def make(root: Path, wheelhouse: Path, packages: Iterable[str] = ()) -> None:
    """Fill the folder. packages: what the base image's own Python holds beside pip."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    for name in ("bin", "sbin"):
        (root / name).symlink_to("usr/bin")
    for name in ("lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").chmod(0o1777)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    programs = [path for name in PROGRAMS if (path := shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin"))]
    for program in programs:
        shutil.copy(program, root / "usr/bin")
    prefix = Path(sys.base_prefix)
    home = prefix if prefix == Path("/usr") else Path("/opt/python")  # elsewhere it may lie where only root may look
    (inside(root, home) / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(prefix / "bin" / VERSION, inside(root, home) / "bin")
    left_out = ("*-packages", "test", "tests", "__pycache__", "idlelib", "tkinter", "_tkinter*", "config-*", "*.a")
    library = prefix / "lib" / VERSION
    shutil.copytree(library, inside(root, home) / "lib" / VERSION, ignore=shutil.ignore_patterns(*left_out))
    for shared in prefix.glob("lib/libpython*.so.*"):
        shutil.copy(shared, root / "usr/lib")
    needed = linked(
        [
            *programs,
            prefix / "bin" / VERSION,
            *library.glob("lib-dynload/[!_]*.so"),
            *library.glob("lib-dynload/_[!t]*.so"),
        ]
    )
    system = next(path.parent for path in needed if path.name == "libc.so.6")
    for path in needed | {system / name for name in OF_WHEELS}:
        if not path.is_relative_to(prefix) or home == prefix:
            inside(root, path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, inside(root, path))
    if (wheels := Path("/usr/share/python-wheels")).is_dir():  # Debian's ensurepip takes pip from there, which
        shutil.copytree(wheels, inside(root, wheels))
        if (authorities := Path("/etc/ssl/certs/ca-certificates.crt")).is_file():  # does not start without these
            inside(root, authorities).parent.mkdir(parents=True)
            shutil.copy(authorities, inside(root, authorities))
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to(home / "bin" / VERSION)
    # A virtual environment in /usr/local, whichever layout the distribution's own Python has.
    (root / "usr/local/pyvenv.cfg").write_text(f"home = {home}/bin\ninclude-system-site-packages = false\n")
    site = root / "usr/local/lib" / VERSION / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheelhouse)]
    subprocess.run([*command, "--no-warn-conflicts", "--target", str(site), "pip", *packages], check=True)


def wheels_of(own: Path, folder: Path) -> Path:
    """Fill the folder with Hemostat's wheels and the wheels of all that it needs and is built with. pip gets them: uv
    installs wheels, but hands out none."""
    made = {path.name.partition("-")[0]: str(path) for path in own.glob("*.whl")}
    wanted = [f"{made['hemostat']}[tracing,postgres]", made["hemostat_vllm"], "hatchling", "pip"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder), *wanted], check=True)
    shutil.copy(made["hemostat_lab"], folder)
    return folder


def inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def linked(files: Iterable[Path | str]) -> set[Path]:
    """The shared libraries that these are linked with, the loader included."""
    said = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", said)}
