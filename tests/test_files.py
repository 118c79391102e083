"""pyllmc/files.py: either the whole new file, or what was there before."""

import os
import resource
import stat

import numpy as np
import pytest

from pyllmc.files import atomic_write, atomic_writes, open_regular, read_exact, read_into, sha256_of


def folder_content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "file.bin"
    for content in (b"old", b"new and longer"):
        with atomic_write(path) as file:
            file.write(content)
        assert folder_content(tmp_path) == {"file.bin": content}


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file.bin") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyboardInterrupt(), OSError("no errno"), FileNotFoundError(2, "x", "y")]
)
def test_a_failing_block_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"half of the new")
        raise error
    assert caught.value is error
    assert folder_content(tmp_path) == {"file.bin": b"old"}


def test_a_full_disk(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught, atomic_write(path) as file:
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path) and "cannot write this file" in caught.value.strerror
    assert folder_content(tmp_path) == {"file.bin": b"old"}


def test_files_that_belong_together_change_together(tmp_path):
    old = {"1": b"old", "2": b"old"}
    paths = [tmp_path / name for name in "123"]
    for path in paths[:2]:
        path.write_bytes(b"old")
    for full in (0, 2):
        # What was written to one of them is still in its buffer when the block ends.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(OSError) as caught, atomic_writes(*paths) as files:
                for number, file in enumerate(files):
                    file.write(b"longer than ten" if number == full else b"new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (caught.value.filename, caught.value.strerror) == (
            str(tmp_path),
            "cannot write the files here: File too large",
        )
        assert folder_content(tmp_path) == old
    with pytest.raises(KeyboardInterrupt), atomic_writes(*paths) as files:
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError) as caught, atomic_writes(paths[0], tmp_path / "nowhere" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "nowhere" / "file") and folder_content(tmp_path) == old
    with atomic_writes(*paths) as files:
        for file in files:
            file.write(b"new")
        assert folder_content(tmp_path).items() >= old.items()
    assert folder_content(tmp_path) == {"1": b"new", "2": b"new", "3": b"new"}


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "nowhere" / "file.bin"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path):
        pass
    assert caught.value.filename == str(path)


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file.bin").mkdir()
    with pytest.raises(ValueError, match="not a regular file"), atomic_write(tmp_path / "file.bin") as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=f"{name}: .*not a regular file"), atomic_write(tmp_path / name) as file:
            file.write(b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_links_are_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.bin").symlink_to(tmp_path / "real" / "file.bin")
    with atomic_write(tmp_path / "link.bin") as file:
        file.write(b"x")
    assert (tmp_path / "link.bin").is_symlink() and (tmp_path / "real" / "file.bin").read_bytes() == b"x"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_reading_exactly(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(10)))
    with open_regular(path) as file:
        assert read_exact(file, 4, "the start") == b"\0\1\2\3"
        array = np.zeros(2, np.uint16)
        read_into(file, array, "the middle")
        assert array.tobytes() == b"\4\5\6\7"
        with pytest.raises(ValueError, match="file.bin: ends inside the end: 3 bytes needed, 2 found"):
            read_exact(file, 3, "the end")
        file.seek(8)
        with pytest.raises(ValueError, match="ends inside the end: 4 bytes needed, 2 found; the file is truncated"):
            read_into(file, array, "the end")


def test_sha256(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file.bin").startswith("ba7816bf8f01cfea")
