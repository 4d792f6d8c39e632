"""The command `dora`; with `cli_network` the only reader of the environment. `cli_plan` has plans.

Whatever the user can repair is one line on stderr and exit code 2. Exit code 1 says that the
answer is no: nothing meets the QoE, the machine can not run Dora, the demo failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dora import catalog, views
from dora.cli_bench import PASSED_ON, bench_command
from dora.cli_join import join_command
from dora.cli_network import doctor, key
from dora.cli_plan import compare_command, plan_command, simulate_command
from dora.cli_report import report_command, write_report
from dora.cli_testbed import testbed_command
from dora.cli_top import top_command
from dora.console import FORCE, check_free, err, out, progress_of
from dora.demo.launch import DemoError, follow, open_home, with_energy
from dora.demo.screen import Screen
from dora.demo.worker import Settings
from dora.doctor import num_cores
from dora.errors import DoraError, SpecError
from dora.factory import build
from dora.files import load, save
from dora.partition import partition
from dora.profiler import profile_model
from dora.runtime.batch import as_call
from dora.runtime.overhead import measure_overhead
from dora.scheduler import build_schedule, format_grid
from dora.simulator import format_timeline
from dora.spec import Cluster, ModelProfile, Plan, Spec, Timeline

app = typer.Typer(
    name="dora",
    help="Spreads one PyTorch model over the unlike devices that you already own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_STOPPED = 130  # exit code after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `dora ARGUMENTS...` and returns the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(arguments, standalone_mode=False, prog_name="dora")
        if code == _STOPPED:  # typer catches Ctrl-C and says nothing
            _complain("stopped", _STOPPED)
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has seen enough; nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = _complain("stopped", _STOPPED)
    except DemoError as error:
        code = _complain(str(error), 1)
    except DoraError as error:
        # The grid below the first line of a ScheduleError is for logs.
        code = _complain(str(error).splitlines()[0], 2)
    except OSError as error:
        code = _complain(f"{error.filename or 'file'}: {error.strerror}", 2)
    except Exception as error:
        # A wrong command line; the name of the exception depends on the version of typer.
        if not hasattr(error, "format_message"):
            raise
        code = _complain(f"{error.format_message()} See: dora --help", 2)
    return int(code or 0)


def _complain(line: str, code: int) -> int:
    err.print(f"dora: {line}", soft_wrap=True)
    return code


def _terminate(*_: Any) -> None:
    raise SystemExit(143)


@app.command()
def devices(
    name: Annotated[str, typer.Argument(help="A catalogue name, or a part of one.")] = "",
) -> None:
    """Lists the devices of the catalogue."""
    names = [known for known in catalog.device_names() if name.lower() in known]
    out.print(views.device_table([catalog.device(known) for known in names or [name]]))
    out.print('In a cluster file: device = "NAME"; every value can be overridden there.')


app.command()(doctor)
app.command()(key)


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="path/file.py:FACTORY or package.module:FACTORY; "
            "FACTORY() returns (module, inputs of one call)"
        ),
    ],
    *,
    file: Annotated[Path, typer.Option("--out", help="The profile to write.")],
    device: Annotated[str, typer.Option(help="Name of this device in the cluster file.")] = "",
    sizes: Annotated[str, typer.Option(help="Micro-batch sizes to measure.")] = "1,2,4,8",
    training: Annotated[bool, typer.Option("--train/--infer", help="With backward?")] = True,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch; default: all cores.")
    ] = num_cores(),
    force: FORCE = False,
) -> None:
    """Measures every block of a model on this device."""
    check_free(file, force)
    if not re.fullmatch(r"\d+(,\d+)*", sizes):
        raise SpecError(f"--sizes: given {sizes!r}, allowed: counts like 1,2,4,8")
    module, sample = build(model)
    torch.set_num_threads(threads)
    args, kwargs = as_call(sample)
    chain = partition(module, args, kwargs)
    with progress_of(f"measuring {chain.num_blocks} blocks") as progress:
        measured = profile_model(
            chain,
            args,
            kwargs,
            device_name=device or socket.gethostname(),
            microbatch_sizes=[int(size) for size in sizes.split(",")],
            training=training,
            name=model,
            progress=progress,
            overhead=measure_overhead,
        )
    save(measured, file)
    out.print(views.profile_table(measured))
    out.print(f"Written: {file}. Next: dora plan {file} CLUSTER.toml", soft_wrap=True)


app.command("plan")(plan_command)
app.command("simulate")(simulate_command)
app.command("compare")(compare_command)
app.command("testbed")(testbed_command)
app.command("report")(report_command)
app.command("bench", context_settings=PASSED_ON)(bench_command)
app.command("top")(top_command)
app.command("join")(join_command)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A plan, profile, timeline or cluster, or a run.")],
) -> None:
    """Says what is in a file that Dora wrote, or how a run went."""
    if not path.is_dir():
        _show_file(path)
        return
    result = path / "results.json"
    if not result.exists():
        raise SpecError(f"{path}: given a folder without results.json, allowed: a finished run")
    _show_demo(path, json.loads(result.read_text(encoding="utf-8")))


def _show_file(path: Path) -> None:
    if path.suffix == ".toml":
        _show_cluster(catalog.load_cluster(path))
        return
    kinds: dict[str, tuple[type[Spec], Callable[[Any], None]]] = {
        "Plan": (Plan, _show_plan),
        "ModelProfile": (ModelProfile, lambda spec: out.print(views.profile_table(spec))),
        "Timeline": (Timeline, lambda spec: out.print(format_timeline(spec))),
        "Cluster": (Cluster, _show_cluster),
    }
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        given = str(body["schema"]).split("/", maxsplit=1)[0]
        kind, show = kinds[given]
    except (ValueError, KeyError, TypeError):
        raise SpecError(
            f"{path}: given a file without such a schema, allowed: {', '.join(kinds)} in JSON, or "
            "a cluster in TOML"
        ) from None
    show(load(kind, path))


def _show_cluster(cluster: Cluster) -> None:
    out.print(views.device_table(cluster.devices))
    for medium in cluster.media:
        rate = medium.rate_bytes_per_s * 8 / 1e6
        out.print(f"{medium.name}: {rate:.4g} Mbit/s, {medium.latency_s * 1e3:.3g} ms")


def _show_plan(given: Plan) -> None:
    out.print(views.plan_table([given], None, "time"))
    if given.cost is None:
        out.print(f"{views.describe(given)}, not priced")
    for line in views.plan_lines(given):
        out.print(line)
    training = given.schedule_kind != "wavefront"
    out.print(format_grid(build_schedule(given, training=training)))


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--out", help="Default: a new dora-run.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of training.")] = 60,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps, to see that it runs.")
    ] = False,
    force: FORCE = False,
) -> None:
    """Trains and serves a real model over the devices of a home, emulated on this machine."""
    settings = Settings(steps=steps)
    if quick:
        settings = Settings(
            steps=min(steps, 8), held_out_batches=1, generated_chars=5, max_chars=400_000
        )
    folder = _new_folder(folder, force)
    save(settings, folder / "settings.json")
    with open_home() as home:
        out.print(
            f"A character model learns the modules of Python's standard library in a home of "
            f"{len(home.cluster.devices)} devices. Files: {folder}\n{home.summary}\n",
            soft_wrap=True,
        )
        with Screen(out) as screen:
            result = screen.show(
                follow(home, folder, {"DORA_STATUS": f"{folder.absolute()}/status", **os.environ})
            )
        result = with_energy(home, result, folder)
    (folder / "results.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    out.print(f"\nWritten by the model after that training:\n{result['generated']}\n")
    _show_demo(folder, result)


def _show_demo(folder: Path, result: dict[str, Any]) -> None:
    out.print(views.demo_table(result))
    out.print(
        f"Dora's model after {len(result['contenders']['dora']['losses'])} steps: loss "
        f"{result['loss_after']:.3f}, perplexity on held-out text {result['perplexity']:.2f}"
    )
    page, trace = write_report(folder, force=True)
    out.print(f"report: {page}", soft_wrap=True)
    out.print(f"trace, to open in ui.perfetto.dev: {trace}", soft_wrap=True)
    out.print(f"checkpoint: {folder / 'checkpoint'}", soft_wrap=True)


def _new_folder(folder: Path | None, force: bool) -> Path:
    """Creates the folder of a run; without a name, the first of dora-run, dora-run-2, ..."""
    if folder is None:
        names = ("dora-run", *(f"dora-run-{number}" for number in range(2, 10_000)))
        folder = next(path for path in map(Path, names) if not path.exists())
    elif folder.exists() and any(folder.iterdir()) and not force:
        raise SpecError(f"{folder}: exists and is not empty, allowed: a new folder, or --force")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
