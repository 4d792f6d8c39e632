"""The commands of `dora` about keys and the way to other devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dora import views
from dora.console import FORCE, check_free, out, waiting
from dora.doctor import examine
from dora.errors import SpecError
from dora.keys import HOW_TO_SET, load_key, new_key


def key(
    file: Annotated[
        Path | None, typer.Option("--out", help="Write it there, readable by you alone.")
    ] = None,
    force: FORCE = False,
) -> None:
    """Makes a new random key, which all devices of a job must share."""
    made = new_key()
    if file is None:
        out.print(made, soft_wrap=True)
        return
    check_free(file, force)
    file.unlink(missing_ok=True)
    # A new file, so that nobody who had the old one open can read the key.
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(made + "\n")
    out.print(
        f"Written: {file}. Copy it to every device, and there: export DORA_KEY_FILE={file}",
        soft_wrap=True,
    )


def doctor(
    port: Annotated[
        int | None, typer.Argument(help="With --listen: default 29610; 0 takes a free one.")
    ] = None,
    *,
    peer: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="Check the way to another device.")
    ] = "",
    listen: Annotated[
        bool, typer.Option("--listen", help="Answer such checks on PORT, until Ctrl-C.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="With --listen: answer one.")] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="Default: what DORA_KEY_FILE names, or DORA_KEY itself.")
    ] = None,
) -> None:
    """Says what this machine has for Dora, what is missing and how to get it."""
    if peer and listen:
        raise SpecError("--peer and --listen: given both, allowed: one on each of two devices")
    if not listen and (once or port is not None):
        raise SpecError("PORT and --once: given without --listen, allowed: dora doctor --listen")
    if listen:
        _listen(port, _key_of(key_file), once)
    elif peer:
        _check(peer, _key_of(key_file))
    else:
        _examine()


def _examine() -> None:
    findings = list(examine(os.environ))
    out.print(views.finding_table(findings))
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)
    out.print("This machine can run Dora. See it work: dora demo")


def _check(peer: str, shared_key: bytes) -> None:
    # Here, since `dora doctor` itself must also run where the engine does not.
    from dora import peercheck

    host, port = peercheck.parse_peer(peer)
    with waiting(f"checking {peer}"):
        findings = list(peercheck.check_peer(host, port, shared_key))
    out.print(views.finding_table(findings))
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)
    out.print(f"This device and {host} can work together.")


def _listen(port: int | None, shared_key: bytes, once: bool) -> None:
    from dora import peercheck

    listener = peercheck.listen(peercheck.DEFAULT_PORT if port is None else port)
    with listener:
        place = " or ".join(peercheck.own_addresses()) or "no network"
        number = listener.getsockname()[1]
        out.print(f"Listening on port {number} ({place}); Ctrl-C ends it. On the other device:")
        out.print(f"  dora doctor --peer ADDRESS:{number}")
        try:
            while True:
                finding = peercheck.answer_probe(listener, shared_key)
                out.print(f"{finding.subject}: {finding.status}: {finding.text}", soft_wrap=True)
                if once:
                    raise typer.Exit(0 if finding.status == "ok" else 1)
        except KeyboardInterrupt:
            return


def _key_of(file: Path | None) -> bytes:
    """Returns the shared key, which these commands can not do without."""
    shared = load_key(key_file=file)
    if shared is None:
        raise SpecError(f"key: given none, allowed: --key-file FILE, or {HOW_TO_SET}")
    return shared
