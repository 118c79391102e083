"""pyllmc/hub.py: what its errors say, and huggingface_hub itself against a server in this process."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import types
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from pyllmc import cli, hub
from pyllmc.datasets import __main__

ROOT = Path(__file__).resolve().parent.parent


def test_errors_are_told_by_what_they_mean(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace())

    def kind(name, *bases):
        return type(name, bases, {})

    not_found = kind("RepositoryNotFoundError", OSError)
    for error, reason in (
        (not_found("404 Client Error.\nA page of advice"), "there is no such repository, or it is not public"),
        (kind("GatedRepoError", not_found)("403"), "there is no such repository, or it is not public"),
        (kind("LocalEntryNotFoundError", FileNotFoundError)("An error happened"), "no connection"),
        (kind("OfflineModeIsEnabled", ConnectionError)("Cannot reach"), "HF_HUB_OFFLINE is set"),
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
    ):
        with pytest.raises(OSError) as caught, hub._asking("x/y", "do z"):
            raise error
        assert str(caught.value) == f"x/y: the Hugging Face hub does not give it ({reason}); try again, or do z"
    with pytest.raises(OSError, match="cannot write what is fetched: No space left") as caught:
        with hub._asking("x/y", "do z"):
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/file")
    assert caught.value.filename == "/cache/file"
    with pytest.raises(KeyboardInterrupt), hub._asking("x/y", "do z"):
        raise KeyboardInterrupt


# ---- huggingface_hub itself ------------------------------------------------------------------------------------------


def respond(handler):
    """As much of the hub as a dataset's repository needs: its revision, its files and their content in parts."""
    path, repositories = urllib.parse.unquote(handler.path), handler.server.repositories
    repository = r"/(?:api/)?datasets/(\w+/[\w-]+)"
    if found := re.fullmatch(repository + r"/tree/abc(?:/([\w/]+))?(?:\?.*)?", path):
        files = repositories[found[1]]
        names = [name for name in files if name.rpartition("/")[0] == (found[2] or "")]
        entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in names]
        answer_json(handler, [{"type": "directory", "path": "more", "oid": "0"}, *entries])
    elif found := re.fullmatch(repository + r"/resolve/abc/([\w./]+)", path):
        answer_file(handler, repositories[found[1]][found[2]])
    elif (found := re.fullmatch(repository + r"(?:\?.*)?", path)) and found[1] in repositories:
        answer_json(handler, {"id": found[1], "sha": "abc", "siblings": []})
    else:
        answer_json(handler, {}, 404, X_Error_Code="RepoNotFound")


def answer_json(handler, content, status=200, **headers):
    handler.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)


def answer_file(handler, data):
    """The part that is asked for; the first one breaks off in the middle."""
    headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "abc", "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-\d*", handler.headers.get("Range") or "")
    start, cut = int(wanted[1]) if wanted else 0, None
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    if handler.command == "GET":
        handler.server.parts.append(start)
        cut = len(data) // 2 if len(handler.server.parts) == 1 else None
    part = data[start:]
    handler.answer(206 if wanted else 200, part[:cut], len(part), **headers)


@pytest.fixture
def server(serve):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (pip install 'pyllmc[hub]')")
    server = serve(respond)
    server.repositories, server.parts = {}, []
    return server


def run_with_hub(tmp_path, port, *words):
    """Prepares FineWeb in a process whose hub is at this port and whose samples need no disk of 20 GB."""
    program = (
        "import sys\nfrom pyllmc.cli import run_main\nfrom pyllmc.datasets import __main__, fineweb\n"
        "fineweb.SAMPLES = {'10B': fineweb.Sample('sample/10BT', 10)}\nsys.exit(run_main(__main__.main, sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "fineweb", *words, "--output", str(tmp_path / "out")],
        env=os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
        },
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_sample_and_ready_shards_through_huggingface_hub(tmp_path, server):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (pip install 'pyllmc[parquet]')")
    import pyarrow

    (tmp_path / "in").mkdir()
    for number in range(3):
        texts = [f"{number}: " + "once upon a time " * count for count in range(1, 30)]
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in" / f"{number:03d}_00000.parquet")
    files = {f"sample/10BT/{path.name}": path.read_bytes() for path in (tmp_path / "in").iterdir()}
    server.repositories["HuggingFaceFW/fineweb"] = {"README.md": b"#"} | files
    words = ["--shard-size", "1000"]
    assert (
        cli.run_main(
            __main__.main, ["fineweb", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "local"), *words]
        )
        == 0
    )
    done = run_with_hub(tmp_path, server.server_port, *words)
    assert done.returncode == 0, done.stderr
    assert len(server.parts) == 4, "three files, one of them twice, since it broke off"
    made = {path.name: path.read_bytes() for path in (tmp_path / "local").glob("*.bin")}
    assert len(made) > 4 and made == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")}

    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2
    ready = {
        f"edu_fineweb_{name}.bin": header.tobytes() + np.array([50256, number], "<u2").tobytes()
        for number, name in enumerate(("val_000000", "train_000001"))
    }
    server.repositories["karpathy/fineweb-edu-100B-gpt2-token-shards"] = ready
    done = run_with_hub(tmp_path, server.server_port, "--type", "edu", "--shards", "1")
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "out" / name).read_bytes() for name in ready} == ready


def test_no_network_and_no_such_repository(tmp_path, server):
    for port, reason in (
        (server.server_port, "there is no such repository, or it is not public"),
        (9, "no connection"),  # where nothing has listened for decades
    ):
        done = run_with_hub(tmp_path, port)
        assert done.returncode == cli.EXIT_ERROR and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == (
            f"error: HuggingFaceFW/fineweb/sample/10BT: the Hugging Face hub does not give it ({reason}); try again, "
            "or get the files in another way and name their folder with --input"
        )
    assert os.listdir(tmp_path) == ["home"] or os.listdir(tmp_path) == []
