"""Local and remote paths, journals and mirrors; against a real client and a server on loopback, and
on the disk.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evlm_jax import cli, journal, paths
from evlm_jax.checkpoint.atomic_dir import check, new_folder
from evlm_jax.cli.parser import reported


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    """A place of either kind."""
    return paths.place(
        tmp_path
        if request.param == "local"
        else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    )


def test_remote_paths_stay_as_they_are(monkeypatch, tmp_path, bucket):
    monkeypatch.chdir(tmp_path)
    run = paths.place(f"{bucket}/run")
    assert str(run / "steps") == f"{bucket}/run/steps" and paths.remote(run)
    assert str(paths.place("a/../run")) == f"{tmp_path}/run" and not paths.remote(tmp_path)
    with pytest.raises(ValueError, match="memory://x/run: .* gs:// and s3://"):
        paths.place("memory://x/run")
    with pytest.raises(ValueError, match="gs://b/out: --out of a build is local only"):
        paths.local("gs://b/out", "--out of a build")


def test_files_appear_when_they_are_whole(folder):
    paths.write(folder / "a/b.txt", "one")
    assert (
        paths.write(folder / "a/b.txt", "two").read_text() == "two"
        and paths.size(folder / "a/b.txt") == 3
    )
    with pytest.raises(RuntimeError), paths.writing(folder / "a/c.txt") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in paths.children(folder / "a")] == ["b.txt"] and paths.children(
        folder / "none"
    ) == []


def test_versions_tell_a_change(folder):
    file = paths.write(folder / "a.txt", "one")
    before = paths.version(file)
    assert paths.version(file) == before
    paths.write(file, "another")
    assert paths.version(file) != before


def test_copies_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    file = paths.write(folder / "a.gguf", "one")
    assert paths.here(file).read_text() == "one" and paths.here(file) == paths.here(file)
    paths.write(file, "another")
    assert paths.here(file).read_text() == "another" and paths.here(file).name == "a.gguf"
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        paths.write(folder / "llm" / name, name)
    found = paths.with_neighbours(folder / "llm")
    assert (found / "tokenizer_config.json").read_text() == "tokenizer_config.json"
    assert (
        paths.with_neighbours(folder / "llm/tokenizer.json")
        .with_name("tokenizer_config.json")
        .is_file()
    )
    assert (found / "model.safetensors").exists() != paths.remote(folder)


def test_a_journal_goes_on(folder, monkeypatch):
    monkeypatch.setattr(journal, "PART", 3)
    path, lines = folder / "m.jsonl", [json.dumps({"step": i}) for i in range(11)]
    assert journal.read_lines(path) == []
    writer = journal.Journal(path)
    writer.append(lines[:5])
    writer.append(lines[5:8])
    writer.flush()
    assert journal.read_lines(path) == lines[:8]
    writer = journal.Journal(path, lambda line: json.loads(line)["step"] < 4)
    assert journal.read_lines(path) == lines[:4]
    writer.append(lines[4:])
    writer.flush()
    writer.append(["{}"])
    writer.flush()
    assert journal.read_lines(path) == [*lines, "{}"]
    parts = [
        len(part.read_text().splitlines()) for part in paths.children(folder / "m.jsonl.parts")
    ]
    assert parts == (
        [3, 1, 3, 3, 2] if paths.remote(folder) else []
    ) and path.exists() != paths.remote(folder)


def test_a_run_that_was_copied_from_a_bucket_goes_on(tmp_path):
    paths.write(tmp_path / "m.jsonl.parts/000001.jsonl", "a\nb\n")
    paths.write(tmp_path / "m.jsonl.parts/000002.jsonl", "c\nd")
    assert journal.read_lines(tmp_path / "m.jsonl") == ["a", "b", "c"]
    journal.Journal(tmp_path / "m.jsonl").append(["e"])
    assert (tmp_path / "m.jsonl").read_text() == "a\nb\nc\ne\n" and not (
        tmp_path / "m.jsonl.parts"
    ).exists()


def test_a_mirror_copies_what_changed(folder):
    mirror = paths.Mirror(folder / "board")
    (mirror.here / "deep").mkdir(parents=True)
    (mirror.here / "deep/events").write_text("one")
    mirror.copy()
    assert (folder / "board/deep/events").read_text() == "one"
    (mirror.here / "deep/events").write_text("one and two")
    mirror.copy(seconds=60)
    mirror.close()
    assert (
        folder / "board/deep/events"
    ).read_text() == "one and two" and mirror.here.exists() != paths.remote(folder)


def test_a_folder_is_whole_or_goes_on(folder):
    out = folder / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(out, {"a": 1}) as made:
        paths.write(made / "one", "1")
        raise KeyboardInterrupt
    if paths.remote(folder):
        with pytest.raises(ValueError, match="out is unfinished"):
            check(out)
    with new_folder(out, {"a": 1}) as made:
        assert (made / "one").read_text() == "1"
        paths.write(made / "two", "2")
    check(out)
    assert [path.name for path in paths.children(out)] == ["one", "two"]
    with pytest.raises(FileExistsError, match="give a new directory"), new_folder(out, {"a": 1}):
        pass
    with pytest.raises(RuntimeError), new_folder(folder / "failed", {"a": 1}) as made:
        paths.write(made / "one", "1")
        raise RuntimeError
    assert paths.children(folder / "failed") == [] and not (folder / "failed.incomplete").exists()


def test_a_place_that_cannot_be_written_is_said_at_once(folder, bucket, capsys, monkeypatch):
    paths.probe(folder / "run")
    assert paths.children(folder / "run") == []
    for place, why in (
        (f"{bucket}-none/run", "no such bucket"),
        ("/proc/run", "cannot write there: No such file"),
        (__file__ + "/run", "cannot write there: Not a directory"),
    ):
        assert cli.main(["train", "--config", "experiments/demo.py:fast", "--workdir", place]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"evlm: {place}: {why}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "evlm-jax\[cloud\]"'):
        paths.probe(f"{bucket}/run")


@pytest.mark.parametrize(
    "options, why", [("size=4k", "No space left"), ("ro", "Read-only file system")]
)
def test_full_and_read_only_disks(tmp_path, options, why):
    """A file system of its own, which takes the rights of root in a name space."""
    program = f"from evlm_jax import paths; paths.probe('{tmp_path}/run')"
    mounted = f'mount -t tmpfs -o {options} none {tmp_path} && exec {sys.executable} -c "{program}"'
    root = Path(cli.__file__).parents[2]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted], cwd=root, capture_output=True, text=True
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert f"cannot write there: {why}" in done.stderr


def test_a_bucket_s_refusal_is_one_line(bucket):
    from gcsfs.retry import HttpError

    line = reported(
        HttpError(
            {"code": 401, "message": "Anonymous caller does not have storage.objects.get access"}
        )
    )
    assert "Anonymous caller" in line and "credentials" in line and "bug" not in line


def test_the_cache_is_local(monkeypatch, capsys):
    monkeypatch.setenv("EVLM_CACHE", "gs://b/cache")
    assert cli.main(["fetch"]) == 1
    assert capsys.readouterr().err.startswith(
        "evlm: EVLM_CACHE=gs://b/cache: the cache is a local folder"
    )
