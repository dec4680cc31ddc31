"""Mistakes that need no model are refused at once: before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_RUN = ("run", "-m", "demo", "--prompt", "x")
_MISTAKES = {
    ("run", "-m", "demo", "-i", "absent.jsonl"): "no such input file: absent.jsonl",
    (*_RUN, "-o", "there.jsonl"): "there.jsonl exists already",
    (*_RUN, "-o", "absent/out.jsonl"): "the folder of absent/out.jsonl does not exist",
    (*_RUN, "--offload", "nvme", "--nvme-path", "absent"): "--nvme-path absent is not a folder",
    ("plan", "-m", "llama-2-7b", "--offload", "nvme", "--nvme-path", "absent"): "--nvme-path absent is not a folder",
    ("plan", "-m", "llama-2-70x"): "no model 'llama-2-70x'",
    ("run", "-m", "llama-2-70x", "--prompt", "x"): "no model 'llama-2-70x'",
    ("run", "-m", "llama-2-70b", "--prompt", "x"): "llama-2-70b names a shape in the catalog",
    ("run", "-m", "./absent", "--prompt", "x"): "no such folder: './absent'",
    ("plan", "-m", "./absent.gguf"): "no such folder: './absent.gguf'",
    ("plan", "-m", "nobody/nothing"): "nobody/nothing is not in the local cache, and the model hub cannot be reached",
    ("eval", "-m", "./absent", "--text", "there.jsonl"): "no such folder: './absent'",
    ("plan", "-m", "llama-2-7b", "--machine", "8xB1"): "no machine '8xB1'",
    (*_RUN, "--temperature", "101"): "101",
    (*_RUN, "--temperature", "1", "--top-p", "1.5"): "1.5 is not in the range",
    (*_RUN, "--engine", "resident", "--wire", "int4"): "--wire has no effect with the resident engine",
    (*_RUN, "-b", "4", "--micro-batch-rows", "8"): "--micro-batch-rows 8, but with --batch-size 4",
    (*_RUN, "--offload", "none", "--resident-blocks", "3"): "--resident-blocks has no effect with --offload none",
    (*_RUN, "--overwrite"): "--overwrite without --output-file",
}
_PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr
from zeroinf.cli.main import main
said = []
for sys.argv[1:] in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as stderr:
        try:
            main()
        except SystemExit as end:
            said.append((end.code, stderr.getvalue()))
print(json.dumps([said, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


def test_mistakes_that_need_no_model_are_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(list(_MISTAKES))], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers, loaded = json.loads(done.stdout)
    assert not loaded
    for (arguments, message), (code, said) in zip(_MISTAKES.items(), answers, strict=True):
        assert code not in (0, 1), arguments
        assert message in said, arguments
