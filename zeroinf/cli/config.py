"""`zeroinf config`: the DeepSpeed JSON that follows from a model's shapes; below it, `zeroinf config show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zeroinf.cli.config_show import show
from zeroinf.cli.environment import option
from zeroinf.cli.params import (
    model_options,
    offload_options,
    refuse_group_options,
    refuse_unused_offload_options,
)
from zeroinf.errors import OutputError


@click.group(invoke_without_command=True, short_help="DeepSpeed JSON for a model; where options come from (`show`).")
@lambda command: model_options(command, required=False)
@offload_options
@option(
    "--num-gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the weights; the numbers hold for just that many.",
)
@option(
    "-b",
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rows that run together on each GPU.",
)
@option("-o", "--output-file", type=click.Path(path_type=Path), help="Write a new file instead of stdout.")
@click.pass_context
def config(ctx: click.Context, /, output_file: Path | None, **asked: Any) -> None:
    """Print the DeepSpeed JSON for ZeRO-3 inference that follows from a model's shapes.

    Any DeepSpeed script can load it, and so can `zeroinf run --zero-config FILE`. No weights are downloaded.

    \b
      zeroinf config --model EleutherAI/pythia-160m --offload cpu
      zeroinf config --model mixtral-8x7b --offload nvme --nvme-path /local --num-gpus 4 -o zero.json
      zeroinf config show run --batch-size 8
    """
    import json

    from zeroinf.engines.zero.config import build_zero_config

    if ctx.invoked_subcommand is not None:
        refuse_group_options(ctx)
        return
    if asked["model"] is None:
        raise click.MissingParameter(ctx=ctx, param=next(p for p in config.params if p.name == "model"))
    refuse_unused_offload_options(ctx)
    text = json.dumps(build_zero_config(_plan(**asked)), indent=2) + "\n"
    if output_file is None:
        click.echo(text, nl=False)
    else:
        _write_new(output_file, text)


def _plan(*, model: str, revision: str | None, dtype: str, trust_remote_code: bool, num_gpus: int, **asked: Any) -> Any:
    from zeroinf.model.inspect import read_anatomy
    from zeroinf.model.source import pick_dtype, resolve_model
    from zeroinf.planner.plan import AioSettings, Plan
    from zeroinf.planner.traits import refuse_beside_codes

    # Only shapes are wanted, so the catalog's will do; it knows no revisions.
    catalog_will_do = revision is None
    source = resolve_model(
        model, revision=revision, trust_remote_code=trust_remote_code, random_weights=catalog_will_do, in_full=True
    )
    anatomy = read_anatomy(source.config, dtype=pick_dtype(dtype, source, "cuda"), trust_remote_code=trust_remote_code)
    refuse_beside_codes(anatomy, "zero")
    return Plan(
        anatomy=anatomy,
        engine="zero",
        offload=asked["offload"],
        dtype=anatomy.dtype,
        device="cuda",
        world_size=num_gpus,
        batch_size=asked["batch_size"],
        nvme_paths=asked["nvme_paths"],
        pin_memory=asked["pin_memory"],
        aio=AioSettings(
            block_size_bytes=asked["aio_block_size"],
            queue_depth=asked["aio_queue_depth"],
            threads=asked["aio_threads"],
        ),
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
