"""Shards from servers that fail, through a cache that is bounded: whole, once, and not a byte more than needed."""

import base64
import bz2
import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dltrain.data import download, lru, remote
from dltrain.data.remote import beside, local, size_and_identity
from dltrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 64 << 10
BIG = 40 * BLOCK + 1234


class Server(ThreadingHTTPServer):
    """Files in memory; notes each request, counts what it sends, and fails as it is told."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}  # added to each answer
        self.ranges = self.lengths = self.etags = True
        self.asked: list[tuple[str, int]] = []  # method, first byte
        self.sent = 0
        self.faults = 0
        self.fault: Callable[[], str] = lambda: ""
        self.before_get: Callable[[], None] = lambda: None

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def gets(self) -> list[int]:
        return [first for method, first in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)  # or "sent" counts what lies in it
        super().setup()

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.server.before_get()
        self.answer()

    def answer(self) -> None:
        server = self.server
        span = self.headers["Range"] if server.ranges else None
        content = server.files.get(self.path.partition("?")[0][1:])
        first, last = map(int, span.removeprefix("bytes=").split("-")) if span else (0, len(content or b"") - 1)
        server.asked.append((self.command, first))
        fault = server.fault()
        server.faults += bool(fault)
        if content is None or fault == "503":
            self.send_response(404 if content is None else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[first : last + 1]
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(206 if span else 200)
        if server.lengths:
            self.send_header("Content-Length", str(len(content[first : last + 1]) if fault == "reset" else len(body)))
        else:
            self.close_connection = True
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if server.etags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(body) // 2 if fault == "reset" else len(body), 8192):
            try:
                self.wfile.write(body[at : at + 8192])
            except OSError:
                break  # the client has gone
            server.sent += len(body[at : at + 8192])
        if fault == "reset":
            self.wfile.flush()
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client has gone, or was thrown out
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BLOCK", BLOCK)
    monkeypatch.setattr(download, "PAUSE_S", 0.001)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def child(url: str) -> subprocess.Popen:
    """Another process that asks for a shard and prints its digest."""
    code = (
        "import hashlib, sys; from dltrain.data import download; from dltrain.data.remote import local;"
        f"download.BLOCK = {BLOCK}; print(hashlib.sha256(local(sys.argv[1]).read_bytes()).hexdigest())"
    )
    return subprocess.Popen([sys.executable, "-c", code, url], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def left() -> list[str]:
    """Kinds of files in the cache, but for locks."""
    return sorted(path.suffix for path in lru.folder().iterdir() if path.suffix not in (".lock", ".journal"))


def test_local_paths_are_themselves(tmp_path):
    path = tmp_path / "a b.tar"
    assert local(str(path)) == path
    assert local(f"file:{path}") == path
    assert local(f"file://{path}") == path
    path.write_bytes(b"x")
    assert size_and_identity(str(path))[0] == 1


def test_failing_server(server):
    """5 % each of resets, short bodies and 503: the same bytes, and at most a block sent in vain per fault."""
    dice = random.Random(1)
    server.fault = lambda: dice.choices(["", "reset", "short", "503"], [85, 5, 5, 5])[0]
    for i in range(4):
        server.files[f"{i}.tar"] = noise(BIG, i)
        assert local(server.url(f"{i}.tar")).read_bytes() == server.files[f"{i}.tar"]
    assert server.faults > 10
    assert server.sent <= 1.01 * 4 * BIG + server.faults * BLOCK
    assert left() == [".tar"] * 4


def test_asked_once_for_a_version(server):
    server.files["a.tar"] = b"one"
    url = server.url("a.tar")
    known = size_and_identity(url)
    assert known[0] == 3
    first = local(url, known=known)
    server.asked.clear()
    assert local(url, known=known) == first
    assert server.asked == []  # nobody was asked
    assert local(f"{url}?signature=2") == first
    server.files["a.tar"] = b"two"
    assert local(url).read_bytes() == b"two"
    assert local(url, known=known).read_bytes() == b"one"  # the cache has it still
    first.unlink()
    with pytest.raises(UserError, match="replaced since the run began"):
        local(url, known=known)


def test_killed_download_resumes(server):
    content = server.files["a.tar"] = noise(BIG)
    reached, killed = threading.Event(), threading.Event()

    def hold() -> None:
        if len(server.gets()) == 17 and not killed.is_set():
            reached.set()
            killed.wait()

    server.before_get = hold
    process = child(server.url("a.tar"))
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    assert left() == [".part"]
    server.asked.clear()
    assert local(server.url("a.tar")).read_bytes() == content
    assert sorted(server.gets())[-24:] == list(range(17 * BLOCK, BIG, BLOCK))
    assert len(server.gets()) <= 25  # the one that was held may answer late


@pytest.mark.parametrize("journal", ["honest", "forged"])
def test_damaged_partial_is_never_published(server, journal):
    content = server.files["a.tar"] = noise(BIG)
    server.headers["Content-MD5"] = base64.b64encode(hashlib.md5(content).digest()).decode()
    url = server.url("a.tar")
    server.fault = lambda: "503" if len(server.gets()) > 20 else ""
    with pytest.raises(UserError, match=rf"byte {20 * BLOCK:,}: failed 10 times, last with ClientResponseError: 503"):
        local(url)
    (part,) = lru.folder().glob("*.part")
    with open(part, "r+b") as file:
        file.seek(5 * BLOCK + 7)
        file.write(b"damage")
    if journal == "forged":
        with open(part.with_suffix(".journal"), "r+b") as file:
            file.seek(4 * 5)
            file.write(zlib.crc32(part.read_bytes()[5 * BLOCK : 6 * BLOCK]).to_bytes(4, "little"))
    server.fault = lambda: ""
    server.asked.clear()
    assert local(url).read_bytes() == content
    expected = [*range(5 * BLOCK, BIG, BLOCK)]
    if journal == "forged":  # only the checksum shows it, at the end
        expected = [*range(20 * BLOCK, BIG, BLOCK), *range(0, BIG, BLOCK)]
    assert server.gets() == expected


def test_wrong_checksum(server):
    server.files["a.tar"] = noise(1000)
    server.headers["Content-MD5"] = base64.b64encode(bytes(16)).decode()
    with pytest.raises(UserError, match="checksum that the server tells, 4 times"):
        local(server.url("a.tar"))
    assert left() == []


def test_four_processes_download_once(server):
    content = server.files["a.tar"] = noise(BIG)
    processes = [child(server.url("a.tar")) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=120)[0].strip() == hashlib.sha256(content).hexdigest()
    assert server.gets() == [*range(0, BIG, BLOCK)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [BIG, BIG // 2])
def test_replaced_between_blocks(server, size, known):
    server.files["a.tar"] = noise(BIG)
    new = noise(size, 1)
    url = server.url("a.tar")
    at_first = size_and_identity(url)

    def replace() -> None:
        if len(server.gets()) == 30:
            server.files["a.tar"] = new

    server.before_get = replace
    if known:
        with pytest.raises(UserError, match="replaced since the run began"):
            local(url, known=at_first)
        assert left() == []
    else:
        assert local(url).read_bytes() == new
        assert left() == [".tar"]


@pytest.mark.parametrize("lacks", ["ranges", "lengths"])
def test_servers_that_only_stream(server, lacks):
    setattr(server, lacks, False)
    content = server.files["a.tar"] = noise(BIG)
    if lacks == "ranges":
        faults = iter(["", "", "", "reset", "503"])  # two HEADs, one block, and then the whole file
        server.fault = lambda: next(faults, "")
    assert local(server.url("a.tar")).read_bytes() == content
    assert left() == [".tar"]


def test_lru_bound(server, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE_GB", "0.0000035")
    urls = []
    for i in range(4):
        server.files[f"{i}.tar"] = noise(1000, i)
        urls.append(server.url(f"{i}.tar"))
    first, second, third = map(local, urls[:3])
    held = open(second, "rb")  # noqa: SIM115
    local(urls[0])  # used again: now the second is the oldest
    local(urls[3])
    assert first.exists() and third.exists() and not second.exists()
    assert sum(path.stat().st_size for path in lru.folder().glob("*.tar")) <= 3500
    with held:
        assert held.read() == server.files["1.tar"]  # who has it open reads on
    server.files["big.tar"] = noise(4000)
    with pytest.raises(UserError, match=r"no room for a shard of 0.000 GB .*DLTRAIN_CACHE_GB"):
        local(server.url("big.tar"))
    assert len(list(lru.folder().glob("*.tar"))) == 3  # none was sacrificed for nothing
    monkeypatch.setenv("DLTRAIN_CACHE_GB", "much")
    with pytest.raises(UserError, match="'much'; give a positive number"):
        local(server.url("big.tar"))


def test_lru_spares_what_is_in_making(server, monkeypatch):
    folder = lru.folder()
    monkeypatch.setenv("DLTRAIN_CACHE_GB", "0.000001")
    for name in ("dead", "live"):
        lru.reserve(folder / f"{name}.part", 400)
    with lru.making(folder / "live.tar"):
        lru.reserve(folder / "new.part", 600)
        assert sorted(path.name for path in folder.glob("*.part")) == ["live.part", "new.part"]
        with pytest.raises(UserError, match="no room"):
            lru.reserve(folder / "new.part", 700)
    lru.reserve(folder / "new.part", 700)
    assert not (folder / "live.part").exists()


def test_full_disk(server, monkeypatch):
    content = server.files["a.tar"] = noise(BIG)
    url = server.url("a.tar")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=BIG // 2))
    with pytest.raises(UserError, match=r"has no room.*free the disk"):
        local(url)
    assert server.gets() == []
    monkeypatch.undo()
    monkeypatch.setenv("DLTRAIN_CACHE", str(lru.folder().parent))
    crc32 = zlib.crc32
    calls = iter(range(100))

    def full(block: bytes) -> int:  # the write beside it fails
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return crc32(block)

    monkeypatch.setattr(download, "BLOCK", BLOCK)
    monkeypatch.setattr(zlib, "crc32", full)
    with pytest.raises(UserError, match="No space left on device; free the disk"):
        local(url)
    monkeypatch.setattr(zlib, "crc32", crc32)
    assert left() == [".part"]
    server.asked.clear()
    assert local(url).read_bytes() == content
    assert server.gets()[0] == 7 * BLOCK


def test_what_is_not_there(server):
    with pytest.raises(UserError, match=r"404.*correct the URL"):
        local(server.url("none.tar"))
    assert len(server.asked) == 2  # HEAD and GET, not again
    server.server_close()
    with pytest.raises(UserError, match="failed 6 times"):
        size_and_identity("http://127.0.0.1:1/a.tar")
    with pytest.raises(UserError, match="Protocol not known"):
        local("nope://a/b.tar")
    with pytest.raises(UserError, match="No such file"):
        local("/nowhere/a.tar.gz")


def test_beside(server, tmp_path):
    server.files["a.tar.idx"] = b"index"
    faults = iter(["503", "reset"])
    server.fault = lambda: next(faults, "")
    assert beside(server.url("a.tar?signature=1"), ".idx") == b"index"
    assert beside(server.url("b.tar"), ".idx") is None
    assert len(server.asked) == 4
    (tmp_path / "a.tgz.idx").write_bytes(b"local")
    assert beside(f"{tmp_path}/a.tgz", ".idx") == b"local"
    assert beside(f"{tmp_path}/b.tgz", ".idx") is beside("pipe:cat", ".idx") is None


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        local("gs://bucket/a.tar")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"pip install 'fsspec\[http\]'"):
        local("http://127.0.0.1:1/a.tar")


def test_pipe():
    with pytest.raises(UserError, match="pipe=True"):
        local("pipe:echo a")
    assert size_and_identity("pipe:echo a", pipe=True)[0] is None
    runs = "pipe:echo run >> $DLTRAIN_CACHE/runs; printf abc"
    assert local(runs, pipe=True).read_bytes() == b"abc"
    assert local(runs, pipe=True).read_bytes() == b"abc"
    assert (lru.folder().parent / "runs").read_text() == "run\n"
    with pytest.raises(UserError, match="failed with status 3: no such thing"):
        local("pipe:printf ab; echo no such thing >&2; exit 3", pipe=True)
    assert left() == [".part", ".tar"]  # the failed one's, which the next try writes anew


def zstd(content: bytes) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True)  # as the command does
    return compressor.compress(content)


COMPRESS = {"tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress, "tar.zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed(server, tmp_path, suffix):
    content, compress = noise(100_000) + bytes(100_000), COMPRESS[suffix]
    streams = compress(content[:30_000]) + compress(content[30_000:])  # as pigz, pbzip2 and pzstd write
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(streams + bytes(512))
    assert local(str(path)).read_bytes() == content
    server.files[path.name] = streams
    assert local(server.url(path.name)).read_bytes() == content
    assert local(f"pipe:cat {path}", pipe=True).read_bytes() == content
    assert left() == [".tar"] * 3
    path.write_bytes(streams[:-20])
    with pytest.raises(UserError, match=rf"{path}: the \w+ data ends at byte {len(streams) - 20:,}, too early"):
        local(str(path))
    damaged = bytearray(compress(content))
    damaged[20_000:20_020] = bytes(20)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{path}: damaged \w+ data near byte [\d,]+ \("):
        local(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="ends at byte 0"):
        local(str(path))
    assert left().count(".tar") == 3


def test_plain_tar_under_a_compressed_name(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(bytes(257) + b"ustar" + bytes(250))
    assert local(str(path)) == path


def test_s3(monkeypatch):
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for seed in range(2):
            client.put_object(Bucket="bucket", Key="a/b.tar", Body=noise(BIG, seed))
            assert size_and_identity("s3://bucket/a/b.tar")[0] == BIG
            assert local("s3://bucket/a/b.tar").read_bytes() == noise(BIG, seed)
        client.put_object(Bucket="bucket", Key="c.tgz", Body=gzip.compress(b"plain"))
        assert local("s3://bucket/c.tgz").read_bytes() == b"plain"
        with pytest.raises(UserError, match="FileNotFoundError"):
            local("s3://bucket/none.tar")
    finally:
        moto.stop()


def test_many_versions(server):
    """A file that is never the same twice ends in an error, not in a loop."""
    server.files["a.tar"] = noise(1000)
    server.before_get = lambda: server.files.update({"a.tar": noise(1000, len(server.asked))})
    with pytest.raises(UserError, match=rf"changed while it was read.*{remote.RESTARTS} times"):
        local(server.url("a.tar"))
    assert left() == []
