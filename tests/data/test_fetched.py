"""Tars of others behind a URL: indexed and verified as if they were here, and the folder trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fsspec
import pytest

from data.foreign import index_shards
from data.reader import ShardReader
from data.remote import Origin
from toolkit import data

from .helpers import shard_folder
from .serving import served
from .test_foreign import img2dataset, tar


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path):
    """No real waiting, no cache of the user's, parts of a few hundred bytes."""
    asked = []
    monkeypatch.setattr("data.remote.sleep", asked.append)
    monkeypatch.setattr("data.fetched._PART", 3000)
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.fixture
def tars(tmp_path):
    """Two tars of three samples."""
    for s in range(2):
        tar(tmp_path / "web" / f"{s:05d}.tar", [m for i in range(3) for m in img2dataset(3 * s + i)])
    return tmp_path / "web"


@pytest.fixture
def server(tars):
    with served(tars) as state:
        yield state


@pytest.fixture
def bucket(tars):
    memory = fsspec.filesystem("memory")
    memory.put(f"{tars}/", "/bucket/web/", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".index", ".json")}


def everything(folder: Path) -> list:
    reader = ShardReader(folder)
    return [(reader.key(i), reader.record(i), reader.images(i)) for i in range(len(reader))]


def test_tars_behind_http_give_the_index_that_they_give_here(tars, server, tmp_path, capsys):
    urls = f"{server.url}/{{00000..00001}}.tar"
    assert data.main(["index", urls, "--out", str(tmp_path / "far"), "--ask", "What?"]) == 0
    assert "6 samples, 6 pictures in 2 shards" in capsys.readouterr().out
    spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for _, wanted in server.reads]
    assert all(spans) and len(spans) > 2, "in parts"
    fetched = sum(int(s[2]) - int(s[1]) + 1 for s in spans)
    assert fetched == sum(f.stat().st_size for f in tars.iterdir()), "every byte once"
    index_shards(sorted(tars.iterdir()), tars, ask="What?")
    far, here = files(tmp_path / "far"), files(tars)
    assert json.loads(far.pop("origin.json"))["url"] == server.url
    assert far == here
    assert everything(tmp_path / "far") == everything(tars)


@pytest.mark.parametrize("words", ["memory://bucket/web", "memory://bucket/web/*.tar"])
def test_an_object_store_lists_its_tars(tars, bucket, words, tmp_path):
    bucket.pipe("/bucket/web/notes.txt", b"x")
    assert data.main(["index", words, "--out", str(tmp_path / "far")]) == 0
    index_shards(sorted(tars.iterdir()), tars)
    assert everything(tmp_path / "far") == everything(tars)


def test_a_failing_server_is_asked_again_and_a_missing_tar_ends_it(server, tmp_path, waits, capsys):
    server.failures = [503, 500]
    assert data.main(["index", f"{server.url}/00000.tar", "--out", str(tmp_path / "far")]) == 0
    assert len(waits) == 2
    words = ["index", f"{server.url}/{{00000..00002}}.tar", "--out", str(tmp_path / "more")]
    assert data.main(words) == 2
    assert "/00002.tar is gone" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_tar_that_changes_meanwhile_is_not_indexed(server, tars, tmp_path, monkeypatch, capsys):
    from data.remote import Remote

    part, content = Remote.part, (tars / "00000.tar").read_bytes()

    def replaced(self, name, start, end):
        found = part(self, name, start, end)
        # At one stroke, as uploads are: parts are fetched side by side, and none may see half a file.
        copy = tmp_path / f"{name}-{start}"
        copy.write_bytes(content)
        copy.replace(tars / name)
        return found

    monkeypatch.setattr(Remote, "part", replaced)
    assert data.main(["index", f"{server.url}/00000.tar", "--out", str(tmp_path / "far")]) == 2
    assert "00000.tar was replaced while it was read" in capsys.readouterr().err


def test_faults_behind_a_url_are_told_as_here(server, tars, tmp_path, capsys):
    bad = [m for i in range(2) for m in img2dataset(i)]
    bad[4] = (bad[4][0], b"")
    tar(tars / "00001.tar", bad)
    words = ["index", f"{server.url}/{{00000..00001}}.tar", "--out", str(tmp_path / "far")]
    assert data.main(words) == 3
    assert "00001.tar: key 000000001: field txt: byte" in capsys.readouterr().out
    assert not (tmp_path / "far").exists()
    assert data.main([*words, "--allow-rejects", "1"]) == 0
    assert "4 samples" in capsys.readouterr().out


def test_verify_reads_remote_shards_to_the_end(server, tars, tmp_path, capsys):
    out = str(tmp_path / "far")
    assert data.main(["index", f"{server.url}/{{00000..00001}}.tar", "--out", out]) == 0
    server.reads.clear()
    assert data.main(["verify", out, "--decode"]) == 0
    assert {name for name, _ in server.reads} == {"00000.tar", "00001.tar"}
    assert f"{out}: 6 samples" in capsys.readouterr().out
    content = bytearray((tars / "00000.tar").read_bytes())
    content[520] ^= 1
    (tars / "00000.tar").write_bytes(content)
    (tars / "00001.tar").unlink()
    assert data.main(["verify", out]) == 3
    told = capsys.readouterr().out.splitlines()
    assert "00000.tar: key 000000000: field jpg: byte 512: damaged data: CRC-32 is" in told[0]
    assert re.match(r"00001\.tar: byte 0: cannot be read: http://.*/00001\.tar is gone", told[1])


def test_verify_of_a_url_of_converted_shards(tmp_path, capsys):
    folder = shard_folder(tmp_path / "s", 5)
    with served(folder) as server:
        assert data.main(["verify", server.url]) == 0
        assert f"{server.url}: 5 samples" in capsys.readouterr().out
        shard = sorted(folder.glob("*.tar"))[0]
        shard.write_bytes(shard.read_bytes()[:-5000])
        assert data.main(["verify", server.url]) == 3
        assert f"{shard.name}: byte" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists(), "nothing stays"


def test_indexing_here_after_there_forgets_the_url(server, tars):
    origin = Origin(server.url, str(tars / "blocks"))
    index_shards([Path("00000.tar")], tars, origin=origin)
    (tars / "manifest.json").unlink()
    index_shards([tars / "00000.tar"], tars)
    server.reads.clear()
    assert len(everything(tars)) == 3 and not server.reads


def test_folders_of_one_name_do_not_share_cached_blocks(tars, tmp_path):
    folders = []
    for which in range(2):
        with served(tars) as server:
            name = tars / "00000.tar"
            name.write_bytes((tars / f"0000{which}.tar").read_bytes())
            folders.append(tmp_path / str(which) / "train")
            words = ["index", f"{server.url}/00000.tar", "--out", str(folders[-1])]
            assert data.main(words) == 0
            everything(folders[-1])
    assert len(list((tmp_path / "cache" / "blocks").glob("*/00000.tar"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://host/x.tar"], "is behind a URL; say with --out FOLDER"),
        (["https://host/x.tar", "here.tar"], "some tars are behind URLs and some are here"),
        (
            ["https://host/web", "--out", "o"],
            "lists no files; name them, such as https://host/{00000..00099}",
        ),
        (["https://host/web/", "--out", "o"], "such as https://host/web/{00000..00099}.tar"),
        (["https://host/*.tar", "--out", "o"], "an HTTP server lists no files"),
        (["memory://b/*/0.tar", "--out", "o"], "`*` may stand in the name of the tars alone"),
        (["memory://b/none", "--out", "o"], "memory://b/none holds no file called *.tar"),
        (["https://a/0.tar", "https://b/0.tar", "--out", "o"], "lie in 2 folders (https://a, https://b)"),
        (["ftp://host/0.tar", "--out", "o"], "a URL here begins with http://, https://, s3://"),
        ([".", "--retries", "0"], "--retries is for URLs, and . is none; leave it out"),
        (["--verify", "here", "--anonymous"], "--anonymous is for URLs, and here is none; leave it out"),
    ],
)
def test_urls_that_cannot_be_indexed(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    action = ["verify", *words[1:]] if words[0] == "--verify" else ["index", *words]
    assert data.main(action) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
