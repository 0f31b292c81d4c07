"""`fptquant push`: a checkpoint to the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fptquant.cli.app import command
from fptquant.cli.options import Checkpoint, require_checkpoint
from fptquant.console import err, grid, out
from fptquant.errors import FPTQuantError
from fptquant.files import first_line
from fptquant.units import megabytes

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@command()
def push(
    checkpoint: Checkpoint,
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="on the hub; made if it isn't there", show_default=False)
    ],
    public: Annotated[bool, typer.Option("--public", help="a new repository is for everybody, not private")] = False,
    revision: Annotated[str, typer.Option(help="branch to push to")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would go, and send nothing")] = False,
) -> None:
    """Upload CHECKPOINT to the Hugging Face hub, to a private repository unless said otherwise.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    require_checkpoint(checkpoint)
    if not _NAME.fullmatch(repository):
        raise FPTQuantError(f"'{repository}' is no repository: give ORG/NAME")
    folder = checkpoint.expanduser()
    files = _files(folder)
    if dry_run:
        shown = grid("file", "size")
        for file in files:
            shown.add_row(str(file.relative_to(folder)), megabytes(file.stat().st_size))
        out.print(shown)
        total = megabytes(sum(file.stat().st_size for file in files))
        visible = "public" if public else "private"
        place = f"{repository}, branch {revision} ({visible}, if it is new)"
        out.print(f"dry run: {len(files)} files, {total}, would go to {place}")
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        with err.status(f"uploading to {repository}"):
            api.create_repo(repository, private=not public, exist_ok=True)
            names = [file.relative_to(folder).as_posix() for file in files]
            done = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=names,
                revision=revision,
                commit_message="Upload a checkpoint of vllm-fptquant",
            )
    except Exception as error:  # network, authorization, quota: each library below has kinds of its own
        raise FPTQuantError(
            f"'{repository}' can't be pushed to ({first_line(error)}): see to the network, and to a token that may "
            "write (`hf auth login`, or HF_TOKEN)"
        ) from None
    out.print(f"pushed to {done}", highlight=False, soft_wrap=True)


def _files(folder: Path) -> list[Path]:
    """What belongs to a checkpoint: no hidden files or directories."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
