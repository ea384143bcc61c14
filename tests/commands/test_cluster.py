"""A cluster that is not there is told in seconds: `vllm-flow eval` with RAY_ADDRESS or --ray-address."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from vllm_flow import cli
from vllm_flow.eval.sweep import cluster, connection
from vllm_flow.eval.sweep.cluster import ClusterError, check, split

Serve = Callable[[socket.socket], None]


@contextlib.contextmanager
def listener(serve: Serve) -> Iterator[str]:
    """The address of somebody who does `serve` with whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def never_answers(connection: socket.socket) -> None:
    threading.Event().wait(30)
    connection.close()


def hangs_up(connection: socket.socket) -> None:
    connection.close()


def web_server(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.close()


def grpc_server(connection: socket.socket) -> None:
    assert connection.recv(100).startswith(b"PRI * HTTP/2.0")
    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nobody_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address}: Connection refused"):
        check(address)


def test_somebody_accepts_and_never_answers() -> None:
    with (
        listener(never_answers) as address,
        pytest.raises(ClusterError, match=f"{address}: nothing answers within 0.3 s"),
    ):
        check(address, patience=0.3)


@pytest.mark.parametrize("serve", [hangs_up, web_server])
def test_somebody_else_listens(serve: Serve) -> None:
    with listener(serve) as address, pytest.raises(ClusterError, match="no Ray|reset"):
        check(address)


def test_what_greets_as_ray_does_is_left_to_ray() -> None:
    with listener(grpc_server) as address:
        check(address)
        check(f"ray://{address}")
    check("auto")


def test_addresses() -> None:
    assert split("head:6379") == ("head", 6379)
    assert split("head") == ("head", 6379)
    assert split("ray://head:10001") == ("head", 10001)
    assert split("ray://head") == ("head", 10001)
    assert split("[::1]:6379") == ("::1", 6379)
    for wrong in (
        "http://head:8265",
        "head:x",
        "head:0",
        "head:²",
        "head:99999",
        "ray://",
        ":1",
        "",
    ):
        with pytest.raises(ClusterError, match="HOST:PORT"):
            split(wrong)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ClusterError, match="no Ray cluster at no-such-host.invalid:6379: "):
        check("no-such-host.invalid:6379")


@pytest.mark.parametrize("by", ["--ray-address", "RAY_ADDRESS"])
def test_the_command_says_so_with_status_2(
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
) -> None:
    """From the arguments to the exit status; the model and the data are known."""
    ray = pytest.importorskip("ray")
    from pathlib import Path

    from tests.commands.subjects import eval_argv, no_engines, pope_data

    folder = Path(str(tmp_path))
    pope_data(folder)
    connected, hardware = connection.connected, connection.hardware
    no_engines(monkeypatch)
    monkeypatch.setattr(connection, "connected", connected)
    monkeypatch.setattr(connection, "hardware", hardware)
    monkeypatch.setattr(cluster, "PATIENCE", 0.3)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    address = f"127.0.0.1:{free_port()}"
    argv = eval_argv(folder)
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        argv += ["--ray-address", address]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"vllm-flow eval: no Ray cluster at {address}: ")
    assert not (folder / "run").exists()
