from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dora import _C, cli
from dora.doctor import Finding
from dora.errors import SpecError
from dora.peercheck import DEFAULT_PORT, answer_probe, check_peer, listen, parse_peer

KEY, OTHER_KEY = b"0123456789abcdef", b"fedcba9876543210"
STEPS = ["name", "route", "port", "version", "key", "clock"]


def talk(answer: Callable[[socket.socket], object], key: bytes = KEY) -> list[Finding]:
    """Checks a peer on loopback that answers its one caller with `answer(listener)`."""
    with listen(0, "127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(20)
        answered = pool.submit(answer, listener)
        port = listener.getsockname()[1]
        found = list(check_peer("127.0.0.1", port, key, timeout_s=0.5))
        answered.result(20)
    return found


def send_back(
    change: Callable[[bytes], bytes], *, num_answers: int = 3, key: bytes = KEY
) -> Callable[[socket.socket], None]:
    """Returns a responder of the real protocol whose last answer is changed."""

    def answer(listener: socket.socket) -> None:
        handshake = _C.Handshake.respond(key, rank=5)
        connection, _ = listener.accept()
        with connection:
            for number in range(1, num_answers + 1):
                handshake.input(connection.recv(handshake.needed, socket.MSG_WAITALL))
                reply = handshake.output()
                connection.sendall(change(reply) if number == num_answers else reply)
                if handshake.is_done:
                    break

    return answer


def broken_step(found: list[Finding]) -> Finding:
    """Returns the finding of the one step that failed, after which there must be none."""
    assert [f.subject for f in found] == STEPS[: len(found)]
    assert [f.status for f in found] == ["ok"] * (len(found) - 1) + ["broken"]
    assert found[-1].text and found[-1].fix
    return found[-1]


def test_peer_that_listens_passes_all_steps():
    answers = []
    found = talk(lambda listener: answers.append(answer_probe(listener, KEY)))
    assert [(f.subject, f.status) for f in found] == [(step, "ok") for step in STEPS]
    assert "dora doctor --listen" in found[4].text
    assert [(a.subject, a.status) for a in answers] == [("127.0.0.1", "ok")]


def test_rank_of_a_job_passes_all_steps():
    found = talk(send_back(lambda reply: reply))
    assert [f.status for f in found] == ["ok"] * len(STEPS)
    assert "rank 5" in found[4].text


def test_name_that_nobody_knows_is_told():
    failed = broken_step(list(check_peer("nowhere.invalid", DEFAULT_PORT, KEY)))
    assert failed.subject == "name"
    assert "hostname -I" in failed.fix


@pytest.mark.parametrize("name", ["a" * 70 + ".invalid", "a..b"])
def test_name_that_can_be_none_is_told(name):
    assert broken_step(list(check_peer(name, DEFAULT_PORT, KEY))).subject == "name"


def test_port_where_nobody_listens_is_told():
    with listen(0, "127.0.0.1") as listener:
        port = listener.getsockname()[1]
    failed = broken_step(list(check_peer("127.0.0.1", port, KEY)))
    assert failed.subject == "port"
    assert "refused" in failed.text
    assert f"dora doctor --listen {port}" in failed.fix


def test_port_that_does_not_answer_is_told():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        # A full queue of callers drops the next one, as a firewall does.
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(place)
        failed = broken_step(list(check_peer(*place, KEY, timeout_s=0.3)))
        for caller in callers:
            caller.close()
    assert failed.subject == "port"
    assert "no answer within 0.3 s" in failed.text
    assert "firewall" in failed.fix


@pytest.mark.parametrize("size", [0, 20, 500])
def test_peer_that_is_not_dora_is_told(size):
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n".ljust(500)[:size])

    failed = broken_step(talk(answer))
    assert failed.subject == "version"
    assert "is that port Dora's?" in failed.fix
    assert "not Dora" in failed.text or f"after {size} of" in failed.text


def test_silent_peer_is_told():
    checked = threading.Event()

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0]:
            checked.wait(20)

    with listen(0, "127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(answer, listener)
        found = list(check_peer(*listener.getsockname(), KEY, timeout_s=0.3))
        checked.set()
    failed = broken_step(found)
    assert failed.subject == "version"
    assert "within 0.3 s" in failed.text


def test_other_protocol_version_is_told():
    def change(reply: bytes) -> bytes:
        return reply[:2] + bytes([reply[2] + 1]) + reply[3:]

    failed = broken_step(talk(send_back(change, num_answers=1)))
    assert failed.subject == "version"
    assert "version" in failed.text


def test_other_key_is_told_on_both_sides():
    answers = []
    found = talk(lambda listener: answers.append(answer_probe(listener, OTHER_KEY)))
    failed = broken_step(found)
    assert failed.subject == "key"
    assert "dora key --out" in failed.fix
    assert answers[0].status == "broken"
    assert "key" in answers[0].text


@pytest.mark.parametrize("num_answers", [1, 2])
def test_altered_proof_is_told(num_answers):
    def change(reply: bytes) -> bytes:
        return reply[:-1] + bytes([reply[-1] ^ 1])

    failed = broken_step(talk(send_back(change, num_answers=num_answers)))
    assert failed.subject == "key"


def test_clock_that_is_off_is_a_warning(monkeypatch):
    ours = time.time
    monkeypatch.setattr(time, "time", lambda: ours() - 30)
    found = talk(lambda listener: answer_probe(listener, KEY))
    assert [f.status for f in found] == ["ok"] * 5 + ["missing"]
    assert re.match(r"(30|29\.\d*) s ahead of ours", found[-1].text)
    assert "timedatectl" in found[-1].fix


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096])
def test_listener_survives_strangers(sent):
    with listen(0, "127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        stranger = socket.create_connection(listener.getsockname())
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        failed = answer_probe(listener, KEY, timeout_s=5)
        stranger.close()
        answered = pool.submit(answer_probe, listener, KEY)
        found = list(check_peer(*listener.getsockname(), KEY))
        assert answered.result(20).status == "ok"
    assert failed.status == "broken" and failed.text
    assert len(found) == len(STEPS)


def test_taken_port_is_told():
    with listen(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SpecError, match=f"given {port} .*, allowed: a free port"):
            listen(port)
    with pytest.raises(SpecError, match="given 70000"):
        listen(70000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub", ("hub", DEFAULT_PORT)),
        ("hub:7", ("hub", 7)),
        ("10.0.0.2:65535", ("10.0.0.2", 65535)),
        ("fe80::1", ("fe80::1", DEFAULT_PORT)),
        ("[fe80::1]:7", ("fe80::1", 7)),
        ("[fe80::1]", ("fe80::1", DEFAULT_PORT)),
    ],
)
def test_peer_is_host_and_port(text, expected):
    assert parse_peer(text) == expected


@pytest.mark.parametrize("text", ["", ":7", "hub:", "hub:x", "hub:0", "hub:65536", "hub:-1"])
def test_peer_without_host_or_port_is_refused(text):
    with pytest.raises(SpecError, match="allowed: HOST or HOST:PORT"):
        parse_peer(text)


def test_doctor_checks_a_peer_that_listens(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DORA_KEY_FILE", raising=False)
    monkeypatch.setenv("DORA_KEY", KEY.decode())
    file = tmp_path / "key"
    file.write_bytes(KEY + b"\n")
    with listen(0, "127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer_probe, listener, KEY)
        peer = f"127.0.0.1:{listener.getsockname()[1]}"
        assert cli.main(["doctor", "--peer", peer, "--key-file", str(file)]) == 0
        assert "can work together" in capsys.readouterr().out
        assert answered.result(20).status == "ok"
        file.write_bytes(OTHER_KEY)
        pool.submit(answer_probe, listener, KEY)
        assert cli.main(["doctor", "--peer", peer, "--key-file", str(file)]) == 1
        assert "dora key --out" in " ".join(capsys.readouterr().out.split())


def test_doctor_listens_for_one_check(capsys, monkeypatch):
    monkeypatch.delenv("DORA_KEY_FILE", raising=False)
    monkeypatch.setenv("DORA_KEY", KEY.decode())
    with listen(0) as listener:
        port = listener.getsockname()[1]

    def check() -> list[Finding]:
        for _ in range(400):
            found = list(check_peer("127.0.0.1", port, KEY))
            if found[-1].subject != "port":
                break
            time.sleep(0.05)
        return found

    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check)
        assert cli.main(["doctor", "--listen", str(port), "--once"]) == 0
        assert [f.status for f in checked.result(30)] == ["ok"] * len(STEPS)
    printed = capsys.readouterr().out
    assert f"dora doctor --peer ADDRESS:{port}" in printed
    assert "127.0.0.1: ok" in printed
