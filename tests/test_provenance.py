"""What a run was made of: a resumed run has the files it began with, and is told what else differs."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pyllmc import checkpoint, cli, files, llmc, provenance, train
from pyllmc.backends import backend
from pyllmc.tokenfile import read_shard, write_tokens

TRAIN = [
    "--train-data", "data/part_*.bin", "--val-data", "data/val.bin", "--layers", "1", "--heads", "2",
    "--channels", "16", "--context", "16", "--batch-size", "2", "--seq-len", "8", "--max-steps", "4", "--threads", "1",
    "--out", "run", "--sample-every", "0", "--checkpoint-every", "2", "--keep-checkpoints", "2",
]  # fmt: skip
LLMC = "-i data/part_*.bin -j data/val.bin -o run -b 2 -t 8 -n 2 -e run/model_00000004.bin -y 1 -s 0 -x 6".split()
TOKENS = np.random.default_rng(0).integers(0, 60, 4000, dtype=np.uint16)


@pytest.fixture(autouse=True)
def in_folder_with_shards(in_folder):
    os.mkdir("data")
    for number in range(3):
        write_tokens(f"data/part_{number}.bin", TOKENS[1000 * number : 1000 * number + 1000])
    write_tokens("data/val.bin", TOKENS[3000:])


def run(*arguments: str) -> int:
    return cli.run_main(train.main, [*TRAIN, *arguments])


def resume(*arguments: str) -> int:
    """From step 2, where the run was before its last checkpoint."""
    checkpoint.Checkpoint(Path("run"), 4).remove()
    return cli.run_main(train.main, ["--out", "run", "--resume", *arguments])


@pytest.fixture
def whole():
    """The final model of a run, which is in the folder."""
    assert run() == 0
    return Path("run/model_00000004.bin").read_bytes()


def saved(step: int = 4) -> dict:
    return json.loads(Path(f"run/DONE_{step:08d}").read_text())["extra"]


def test_a_checkpoint_says_what_its_run_was_made_of(whole):
    extra = saved()
    assert [file["name"] for file in extra["data"]["train"]] == ["part_0.bin", "part_1.bin", "part_2.bin"]
    assert [file["name"] for file in extra["data"]["val"]] == ["val.bin"]
    assert all((file["bytes"], file["tokens"]) == (3024, 1000) for part in extra["data"].values() for file in part)
    assert len({file["header"] for part in extra["data"].values() for file in part}) == 1
    assert len({file["sample"] for part in extra["data"].values() for file in part}) == 4
    assert set(extra["versions"]) == {"pyllmc", "numpy", "python"}
    assert extra["algorithms"]["isa"] == backend("cpu").NAME and len(extra["algorithms"]["build"]) == 64


def test_a_run_of_a_text_says_so_of_its_own_token_files(in_folder_with_text):
    arguments = TRAIN[4:]
    assert cli.run_main(train.main, ["--text", "notes.txt", *arguments]) == 0
    data = saved()["data"]
    assert [file["name"] for part in ("train", "val") for file in data[part]] == ["train.bin", "val.bin"]


# ---- what is the same run -------------------------------------------------------------------------------------------


MOVED = ("--train-data", "elsewhere/part_*.bin", "--val-data", "elsewhere/val.bin")


def test_the_data_may_move(whole, capsys):
    """Names count without their folders, and the recipe follows."""
    os.rename("data", "elsewhere")
    assert resume() == 1
    assert re.search(r"no such token file any more; .* with --train-data where it is now\n", capsys.readouterr().err)
    assert resume(*MOVED[:2]) == 1
    assert "with --val-data where it is now" in capsys.readouterr().err
    assert resume(*MOVED) == 0
    assert capsys.readouterr().err == ""
    assert Path("run/model_00000004.bin").read_bytes() == whole
    assert resume() == 0


def test_other_data_elsewhere_is_refused(whole, capsys):
    os.rename("data", "elsewhere")
    write_tokens("elsewhere/part_1.bin", TOKENS[:1000])
    assert resume(*MOVED) == 1
    assert "this run was trained on other data: part_1.bin: has other tokens" in capsys.readouterr().err


@pytest.mark.parametrize("knows", ["nothing", "no checkpoint"])
def test_data_that_nothing_tells_from_others_does_not_move(knows, whole, capsys):
    os.rename("data", "elsewhere")
    if knows == "no checkpoint":
        checkpoint.Checkpoint(Path("run"), 2).remove()
    else:
        manifest = json.loads(Path("run/DONE_00000002").read_text()) | {"extra": {}}
        Path("run/DONE_00000002").write_text(json.dumps(manifest))
    assert resume(*MOVED) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: run: this run began with another path than --train-data elsewhere/part_*.bin, and")
    assert err.count("\n") == 1


def test_the_model_that_a_run_started_from_may_move_once_there_is_a_checkpoint(whole, capsys):
    def go_on(init: str) -> int:
        return cli.run_main(train.main, ["--out", "on", "--resume", "--init", init])

    at = TRAIN.index("--layers")
    options = [*TRAIN[:at], *TRAIN[at + 8 :], "--out", "on"]
    assert cli.run_main(train.main, [*options, "--init", "run/model_00000002.bin"]) == 0
    expected = Path("on/model_00000004.bin").read_bytes()
    os.rename("run/model_00000002.bin", "start.bin")
    checkpoint.Checkpoint(Path("on"), 4).remove()
    assert go_on("start.bin") == 0
    assert Path("on/model_00000004.bin").read_bytes() == expected
    assert 'start.bin"' in Path("on/recipe.toml").read_text()
    os.rename("start.bin", "again.bin")
    for step in (2, 4):
        checkpoint.Checkpoint(Path("on"), step).remove()
    assert go_on("again.bin") == 1
    assert "began with another path than --init again.bin" in capsys.readouterr().err


def test_more_steps_by_llm_cs_flags(whole, capsys):
    assert cli.run_main(llmc.main, LLMC) == 0
    assert checkpoint.list_steps("run")[-1] == 6 and capsys.readouterr().err == ""


def test_other_validation_data_is_a_note(whole, capsys):
    write_tokens("data/val.bin", TOKENS[2000:3000])
    assert resume() == 0
    err = capsys.readouterr().err
    assert err == (
        "validation losses before and after run/DONE_00000002 are of different data: val.bin: has other tokens\n"
    )
    assert Path("run/model_00000004.bin").read_bytes() == whole


@pytest.mark.parametrize("content", ["", '{"version": 1}'])
def test_a_checkpoint_that_says_nothing_goes_on_with_a_note(content, whole, capsys):
    """llm.c's DONE is empty; those of pyllmc had an empty extra."""
    manifest = json.loads(Path("run/DONE_00000002").read_text()) | {"extra": {}}
    Path("run/DONE_00000002").write_text(json.dumps(manifest) if content else "")
    write_tokens("data/part_1.bin", TOKENS[:1000])
    assert resume() == 0
    err = capsys.readouterr().err
    assert err.startswith("run/DONE_00000002: does not say what the run was trained on") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "name", "told"),
    [
        ("versions", "pyllmc", "pyllmc 0.0.1, now "),
        ("algorithms", "isa", "isa 0.0.1, now "),
        ("algorithms", "build", "another build of the ops"),
    ],
)
def test_other_arithmetic_is_a_note(part, name, told, whole, capsys):
    manifest = json.loads(Path("run/DONE_00000002").read_text())
    manifest["extra"][part][name] = "0.0.1"
    manifest["extra"]["versions"]["numpy"] = "0"  # decides no bit
    Path("run/DONE_00000002").write_text(json.dumps(manifest))
    assert resume() == 0
    err = capsys.readouterr().err
    assert told in err and "may differ from it in rounding" in err and err.count("\n") == 1


# ---- what is not ----------------------------------------------------------------------------------------------------


def move(old: str, new: str) -> None:
    os.rename(f"data/{old}", f"data/{new}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: write_tokens("data/part_1.bin", TOKENS[:1000]), "part_1.bin: has other tokens"),
        (lambda: write_tokens("data/part_1.bin", TOKENS[:999]), "part_1.bin: its size in bytes was 3,024, now it is 3"),
        (lambda: write_tokens("data/part_3.bin", TOKENS[:1000]), "part_3.bin was added"),
        (lambda: write_tokens("data/part_00.bin", TOKENS[:1000]), "part_00.bin was added"),
        (lambda: os.unlink("data/part_2.bin"), "part_2.bin is missing"),
        (lambda: os.unlink("data/part_0.bin"), "part_0.bin is missing"),
        (lambda: move("part_1.bin", "part_9.bin"), "part_1.bin is missing"),
    ],
)
@pytest.mark.parametrize("flags", [True, False])
def test_other_data_is_refused(change, told, flags, whole, capsys):
    """By both programs, and nothing is written: llm.c would go on with a position that means other tokens."""
    change()
    before = {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert cli.run_main(*((llmc.main, LLMC) if flags else (train.main, ["--out", "run", "--resume"]))) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: run/DONE_00000004: this run was trained on other data: {told}")
    assert err.count("\n") == 1 and ("-e " if flags else "--init ") in err
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir() if path.name != ".lock"}


def test_folders_that_sort_otherwise_are_told():
    def described(*names):
        return [{"name": name, "bytes": 1, "tokens": 1, "header": "", "sample": ""} for name in names]

    now = {"data": {"train": described("b", "a"), "val": []}, "versions": {}, "algorithms": {}}
    with pytest.raises(ValueError, match="file 1 was a, now it is b: their folders sort otherwise"):
        provenance.compare({"data": {"train": described("a", "b"), "val": []}}, now, "DONE")


@pytest.mark.parametrize("data", [7, {}, {"train": []}, {"train": [7], "val": []}, {"train": [{"name": 7}], "val": []}])
def test_what_is_damaged_is_refused(data, whole, capsys):
    manifest = json.loads(Path("run/DONE_00000002").read_text())
    manifest["extra"]["data"] = data
    manifest["extra"]["versions"] = manifest["extra"]["algorithms"] = 7
    Path("run/DONE_00000002").write_text(json.dumps(manifest))
    assert resume() == 1
    assert re.fullmatch(r"error: run/DONE_00000002: what it says of the data is damaged.*\n", capsys.readouterr().err)


# ---- the sample -----------------------------------------------------------------------------------------------------


def test_a_large_file_is_sampled_and_a_small_one_read_as_a_whole(monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 64)
    path = Path("data/part_0.bin")

    def sample() -> str:
        return provenance._describe_file(read_shard(path))["sample"]

    def hidden(size: int) -> list[int]:
        """The bytes, of a file of so many, whose change is not seen."""
        write_tokens(path, TOKENS[: (size - 1024) // 2])
        content, before, unseen = path.read_bytes(), sample(), []
        for place in range(1024, size, 2):
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            if sample() == before:
                unseen.append(place)
        return unseen

    monkeypatch.setattr(files, "PIECES", 32)
    assert hidden(32 * 64) == []
    unseen = hidden(4096)
    assert unseen and min(unseen) >= 1024 and max(unseen) < 4096 - 64
    assert len(unseen) * 2 <= 4096 - 32 * 64
