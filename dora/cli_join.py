"""The command `dora join`: starts a program as a rank of a job that runs already."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dora.errors import SpecError
from dora.keys import load_key

# Of the look whether anybody answers at the rendezvous; a Wi-Fi that has gone to sleep takes 2 s.
_LOOK_S = 5.0


def join_command(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND", help="The job's program, as on its ranks.")
    ],
    *,
    rank: Annotated[int | None, typer.Option(min=0, help="Of this device; default: RANK.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Of the job; default: WORLD_SIZE.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where its rank 0 runs; default: MASTER_ADDR.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the rendezvous; default: MASTER_PORT.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="The job's secret; default: DORA_KEY or DORA_KEY_FILE.")
    ] = None,
) -> None:
    """Starts a program as a device that comes, or comes back, to a job that runs."""
    given = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}
    told = _told({name: str(value) for name, value in given.items() if value is not None})
    load_key(key_file=key_file)  # refuses what is no secret
    if key_file is not None:
        told["DORA_KEY_FILE"] = str(key_file)
    _check_reached(told)
    if shutil.which(command[0]) is None:
        raise SpecError(f"COMMAND: given {command[0]!r}, which is no program, allowed: python ...")
    environment = {**os.environ, **told}
    if key_file is not None:
        environment.pop("DORA_KEY", None)
    os.execvpe(command[0], command, environment)


def _told(given: Mapping[str, str]) -> dict[str, str]:
    """Returns what torch.distributed reads, from options or else from the environment."""
    flags = {
        "RANK": "--rank",
        "WORLD_SIZE": "--world-size",
        "MASTER_ADDR": "--host",
        "MASTER_PORT": "--port",
    }
    told = {}
    for name, flag in flags.items():
        value = given.get(name) or os.environ.get(name, "")
        is_number = value.isdigit() or name == "MASTER_ADDR"
        if not value or not is_number:
            raise SpecError(
                f"{flag}: given {value or 'nothing'}, allowed: what the job's ranks have as {name}"
            )
        told[name] = value
    if int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise SpecError(
            f"--rank: given {told['RANK']}, allowed: 0 to {int(told['WORLD_SIZE']) - 1}, by "
            "--world-size, which counts this device too"
        )
    # gloo would wait for connections with ranks that have long had theirs; they are not needed.
    told["TORCH_GLOO_LAZY_INIT"] = "1"
    # The store is there, also for rank 0, which would make a new one otherwise.
    told["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return told


def _check_reached(told: Mapping[str, str]) -> None:
    host, port = told["MASTER_ADDR"], int(told["MASTER_PORT"])
    try:
        socket.create_connection((host, port), timeout=_LOOK_S).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        hint = "the job's rank 0, or the torchrun that started it, has to run there"
        if told["RANK"] == "0":
            hint = "rank 0 hosts the rendezvous, and can come back only if a torchrun does instead"
        raise SpecError(
            f"--host, --port: given {host} {port}, where no job answers ({why}): {hint}"
        ) from None
