"""Torch's compiler: not executed by a start, all there for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiers import full

_COMPILER = "[name for name in ('torch._dynamo.eval_frame', 'torch._inductor') if name in sys.modules]"


def _python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


_UNUSED = ("scipy", "sklearn", "pandas", "torchvision", "torch.distributed.tensor", "torch.nn.attention.flex_attention")


def test_a_plan_and_a_run_execute_no_compiler_and_import_nothing_that_they_do_not_use(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """From the first import to the last token; what reads the masks of packed and of padded rows included."""
    program = f"""
import sys
from zeroinf.cli.main import main
model, out = sys.argv[1:]
plan = ["plan", model, "--json", "--no-advice", "--input-len", "8", "--max-new-tokens", "8"]
run = ["run", model, "-q", "--prompt", "a", "--prompt", "b c", "-o", out]
for arguments in (plan, run):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
unused = [name for name in {_UNUSED} if name in sys.modules]
print({_COMPILER}, unused, "transformers.masking_utils" in sys.modules)
"""
    said = _python(program, str(small_checkpoint("llama")), str(tmp_path / "out.jsonl"))
    assert said.splitlines()[-1] == "[] [] True"


def test_whoever_compiles_gets_the_whole_compiler_with_what_was_marked_before() -> None:
    program = f"""
import sys
from zeroinf.compat.dynamo import defer_dynamo
defer_dynamo()
import torch
import torch._dynamo as package

@torch.compiler.disable
def hidden(x): return torch.compiler.is_compiling(), x + 1
@torch.compiler.disable(recursive=False)
def also(x): return torch.compiler.is_compiling(), x + 2
@torch.compiler.assume_constant_result
def constant(): return 3
@torch.compiler.allow_in_graph
def opaque(x):
    torch._dynamo.graph_break()
    return x * 2
one = torch.ones(1)
assert hidden(one) == (False, 2) and also(one) == (False, 3) and constant() == 3
assert not {_COMPILER}

compiled = torch.compile(lambda x: (torch.compiler.is_compiling(), hidden(x), also(x), constant()), backend="eager")
assert compiled(one) == (True, (False, 2), (False, 3), 3)
from torch._dynamo.eval_frame import OptimizedModule
assert sys.modules["torch._dynamo"] is package is torch._dynamo and type(package).__name__ == "module"
assert package.eval_frame.OptimizedModule is OptimizedModule
from torch._dynamo.trace_rules import is_callable_allowed
assert is_callable_allowed(opaque) and not is_callable_allowed(hidden)
"""
    _python(program)


@pytest.mark.parametrize(
    ("module", "taken"),
    [("eval_frame", "optimize"), full("source", "guards.ConstantSource"), full("backends.registry", "list_backends")],
)
def test_a_module_of_the_compiler_can_be_what_is_imported_first(module: str, taken: str) -> None:
    """It is executed once: what others have taken out of it, here `taken`, is still its own."""
    program = f"""
import sys
from zeroinf.compat.dynamo import defer_dynamo
defer_dynamo()
import torch._dynamo.{module} as first
assert first is sys.modules["torch._dynamo.{module}"] is torch._dynamo.{module}
assert torch._dynamo.{taken} is first.{taken.rpartition(".")[2]}
assert first.__spec__.loader is first.__loader__ and first.__spec__.origin == first.__file__
"""
    _python(f"import torch\n{program}")
