"""A real PostgreSQL server for one test, from the binaries of this machine."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

USER, PASSWORD = "tester", "p@ss/w{}rd"  # what must be quoted, and must not be shown
_SECONDS_TO_START = 60


def missing():
    """Why there can be no server here, or nothing."""
    if _binary("initdb") is None or _binary("postgres") is None:
        return "no PostgreSQL server is installed"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed (the extra postgresql)"
    return ""


@contextmanager
def postgres_server():
    """The URL of an empty database that asks for a password; stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # not tmp_path: its parents are closed to others
    # PostgreSQL refuses to be root.
    account = pwd.getpwnam("nobody") if os.getuid() == 0 else None
    identity = {"user": account.pw_uid, "group": account.pw_gid} if account else {}
    data, secret, log = folder / "data", folder / "secret", folder / "log"
    secret.write_text(PASSWORD)
    if account:
        for path in (folder, secret):
            os.chown(path, account.pw_uid, account.pw_gid)
    options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--no-sync"]
    options += ["--locale=C"]
    subprocess.run(
        [_binary("initdb"), "-D", data, *options],
        check=True,
        capture_output=True,
        cwd=folder,
        **identity,
    )
    port = _free_port()
    words = ["-h", "127.0.0.1", "-p", port, "-k", folder, "-c", "fsync=off"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [_binary("postgres"), "-D", data, *map(str, words)],
            stdout=output,
            stderr=output,
            cwd=folder,
            **identity,
        )
    try:
        _wait(server, port, log)
        yield f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder)


def _wait(server, port, log):
    import psycopg

    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            psycopg.connect(
                host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres"
            ).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def _binary(name):
    """A program of the server; Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
