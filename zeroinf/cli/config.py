"""`zeroinf config`: the DeepSpeed JSON that follows from a model's shapes; below it, `zeroinf config show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zeroinf.cli.command import group
from zeroinf.cli.config_show import show
from zeroinf.cli.environment import option
from zeroinf.cli.params import asked_of, options_of, refuse_group_options
from zeroinf.errors import OutputError
from zeroinf.options.contradictions import refuse_idle_offload
from zeroinf.options.options import ConfigOptions, ModelOptions, TransferOptions, ZeroRankOptions, ZeroRestOptions


@group(invoke_without_command=True, short_help="DeepSpeed JSON for a model; where options come from (`show`).")
@options_of(ModelOptions, required=False)
@options_of(ZeroRestOptions)
@options_of(TransferOptions)
@options_of(ZeroRankOptions)
@option("-o", "--output-file", type=click.Path(path_type=Path), help="Write a new file instead of stdout.")
@click.pass_context
def config(ctx: click.Context, /, output_file: Path | None, **asked: Any) -> None:
    """Print the DeepSpeed JSON for ZeRO-3 inference that follows from a model's shapes.

    Any DeepSpeed script can load it, and so can `zeroinf run --zero-config FILE`. No weights are downloaded.

    \b
      zeroinf config --model EleutherAI/pythia-160m --offload cpu
      zeroinf config --model mixtral-8x7b --num-gpus 4 \\
        --offload nvme --nvme-path /local -o zero.json
      zeroinf config show run --batch-size 8
    """
    import json

    from zeroinf.engines.zero.config import build_zero_config

    if ctx.invoked_subcommand is not None:
        refuse_group_options(ctx)
        return
    if asked["model"] is None:
        raise click.MissingParameter(ctx=ctx, param=next(p for p in config.params if p.name == "model"))
    options = asked_of(ctx, ConfigOptions, asked)
    refuse_idle_offload(options, "zero")
    text = json.dumps(build_zero_config(_plan(options)), indent=2) + "\n"
    if output_file is None:
        click.echo(text, nl=False)
    else:
        _write_new(output_file, text)


def _plan(options: ConfigOptions) -> Any:
    from zeroinf.options.model import anatomy_of, source_of
    from zeroinf.planner.descriptor import refuse_beside_codes
    from zeroinf.planner.plan import Plan

    anatomy = anatomy_of(options, source_of(options, "cuda"), "cuda")
    refuse_beside_codes(anatomy, "zero")
    return Plan(
        anatomy=anatomy,
        engine="zero",
        offload=options.offload,
        dtype=anatomy.dtype,
        device="cuda",
        world_size=options.num_gpus,
        batch_size=options.batch_size,
        nvme_paths=options.nvme_paths,
        pin_memory=options.pin_memory,
        aio=options.aio,
    )


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputError(f"{path} exists already", hint="choose another name, or remove it") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


config.add_command(show)
