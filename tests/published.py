"""Where the compact files of published answers are found."""
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "known_answers"


def known_file(name):
    "The file; those without a licence for copies lie in the folder that REALIGN_KNOWN_ANSWERS names, else the test is skipped."
    for folder in filter(None, (HERE, os.environ.get("REALIGN_KNOWN_ANSWERS"))):
        if (Path(folder) / name).exists(): return Path(folder) / name
    pytest.skip(f"{name} may not be copied here (see tests/known_answers/README.md); REALIGN_KNOWN_ANSWERS names no folder that holds it")
