"""Mistakes that need no model are refused at once: before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_RUN = ("run", "-m", "demo", "--prompt", "x")
_MISTAKES = {
    ("run", "-m", "demo", "-i", "absent.jsonl"): "no such input file: absent.jsonl",
    ("run", "-m", "demo", "-i", "there.jsonl"): "the request cannot be run: ",
    ("run", "-m", "demo", "-i", "empty.jsonl"): "empty input: empty.jsonl holds no request",
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
    (*_RUN, "--json-schema", '{"type": "object"}'): "hint: it takes the name of a file",
    (*_RUN, "--overwrite"): "--overwrite without --output-file",
    ("runn",): "no such command: zeroinf runn\n\nhint: did you mean zeroinf run?",
    ("store", "lst"): "no such command: zeroinf store lst\n\nhint: did you mean zeroinf store list?",
    ("config", "demo"): "no such command: zeroinf config demo\n\nhint: one of show",
    ("pull", "m"): "did you mean zeroinf download?",
    ("org/model",): "hint: to run that model: zeroinf run org/model --prompt TEXT",
    ("run",): "error: no model is named\n\nhint: zeroinf run MODEL;",
    ("run", "demo", "Hello"): "error: unexpected: Hello\n\nhint: a prompt goes behind --prompt",
    ("run", "-m", "demo", "Hello"): "the model is given twice, as 'demo' and as 'Hello'",
    (*_RUN, "--max-length", "9"): "hint: zeroinf calls it --max-new-tokens: it counts new tokens only",
    (*_RUN, "--max_new_tokens", "9"): "no such option: --max_new_tokens\n\nhint: zeroinf calls it --max-new-tokens\n",
    (*_RUN, "--temprature", "1"): "hint: did you mean --temperature?",
    (*_RUN, "--nothing-like-it"): "hint: zeroinf run --help-all lists those that there are",
    (*_RUN, "--gpu-memory-utilization", "90"): "--gpu-memory-utilization: 90 is no part of a whole, such as 0.9",
    (*_RUN, "--gpu-memory-utilization", "0.9", "--gpu-memory", "9GiB"): "--gpu-memory-utilization say the same",
    (*_RUN, "--gpu-memory", "0.9"): "error: --gpu-memory: 0.9 what? write 90%, or 0.9GiB",
    (*_RUN, "--gpu-memory", "0%"): "error: --gpu-memory: 0% must be above 0% and at most 100%",
    (*_RUN, "-ngl", "20"): "no such option: -ngl\n\nhint: zeroinf calls it --resident-blocks",
    (*_RUN, "--ctx-size", "4096"): "hint: zeroinf calls it --max-model-len",
    ("serve", "demo", "--max-model-len", "128"): "128 holds prompt and completion, and --max-new-tokens is 128",
    ("serve", "demo", "--max-model-len", "9", "--max-prompt-tokens", "8"): "both say how long prompts are",
    ("plan", "demo", "--max-model-len", "128"): "128 holds prompt and completion, and --output-len is 128",
    ("plan", "demo", "--max-model-len", "900", "--input-len", "8"): "both say how long prompts are",
    (
        *_RUN,
        "-n",
        "32",
    ): "would all be equal: decoding is greedy\n\nhint: add --temperature 1; for tokens of a completion",
    (*_RUN, "--dtype", "fp61"): "error: --dtype: no choice 'fp61'\n\nhint: did you mean fp16? one of auto, bfloat16",
    (*_RUN, "--offload", "dram"): "error: --offload: no choice 'dram'\n\nhint: one of auto, none, cpu, nvme",
    (*_RUN, "--num-gpus", "many"): "error: --num-gpus: 'many' is no whole number",
    (*_RUN, "--gpu-memory", "24"): "error: --gpu-memory: 24 what? write 24GiB",
    (*_RUN, "--gpu-memory", "24576"): "error: --gpu-memory: 24576 what? write 24576MiB",
    (*_RUN, "--ray", "auto", "--num-gpus", "2"): "--num-gpus with --ray: each node runs with all of its GPUs",
    (*_RUN, "--ray", "auto", "--ray-nodes", "8:2"): "MAX no less than MIN",
    (*_RUN, "--ray", "ray://head:10001"): "Ray's client cannot drive a job",
    (*_RUN, "--ray-nodes", "2:8"): "--ray-nodes has no effect without --ray",
    ("plan", "demo", "--host-memory", "64Gi"): "'64Gi' is not a size: write 24GiB",
}
_HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "numpy", "scipy", "sympy", "pandas", "matplotlib", "rich")
_PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr
from zeroinf.cli.main import main
said = []
heavy = sys.argv[2:]
for sys.argv[1:] in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as stderr:
        try:
            main()
        except SystemExit as end:
            said.append((end.code, stderr.getvalue()))
print(json.dumps([said, sorted(set(heavy) & set(sys.modules))]))
"""


def test_mistakes_that_need_no_model_are_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(list(_MISTAKES)), *_HEAVY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers, loaded = json.loads(done.stdout)
    assert not loaded
    for (arguments, message), (code, said) in zip(_MISTAKES.items(), answers, strict=True):
        assert code not in (0, 1), arguments
        assert message in said, arguments
        assert said.startswith("error: "), arguments
