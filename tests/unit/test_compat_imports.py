"""Imports of torch and transformers are quicker in zeroinf's own processes, and give the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import importlib.util, json, sys
from pathlib import Path

import pytest
from zeroinf.compat.imports import quicken_imports
quicken_imports(Path(sys.argv[1]))
import transformers
from transformers.utils import import_utils

models = Path(transformers.__file__).parent / "models"
spec = importlib.util.spec_from_file_location("transformers.utils.plain", import_utils.__file__)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
asked = [(models, "models"), (str(models / "__init__.py"), None), (str(models / "llama"), None)]
same = [import_utils.define_import_structure(*one) == plain.define_import_structure(*one) for one in asked]
print(json.dumps([same, transformers.LlamaConfig().model_type, transformers.is_scipy_available()]))
"""


@pytest.mark.full
def test_transformers_knows_the_same_modules_of_its_own_whether_they_are_read_or_remembered(tmp_path: Path) -> None:
    def found() -> list[object]:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "cache")], capture_output=True, text=True, check=True
        )
        assert not done.stderr
        answer: list[object] = json.loads(done.stdout)
        return answer

    expected = [[True, True, True], "llama", False]
    assert found() == expected
    (kept,) = (tmp_path / "cache" / "transformers-modules").iterdir()
    whole = kept.read_text()
    assert found() == expected
    kept.write_text(whole[: len(whole) // 2])
    assert found() == expected
    assert kept.read_text() == whole


def test_a_folder_that_nothing_can_be_kept_in_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = _PROGRAM.partition("models = ")[0] + "print(transformers.LlamaConfig().model_type)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("llama\n", "")
