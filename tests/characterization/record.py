"""Write the golden files anew: `python -m tests.characterization.record`, in the root of the repository.

The only writer of tests/characterization/golden/: run it when a change of behaviour is meant, and review the
difference that git shows. Tests compare and never write.
"""

from __future__ import annotations

from tests.characterization import test_pipeline, test_profiles_life
from tests.characterization.golden import FOLDER


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = test_pipeline.made() | test_profiles_life.made()
    for stale in FOLDER.iterdir():
        if stale.name not in made:
            stale.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
