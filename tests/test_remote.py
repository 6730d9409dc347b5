"""Shards on a server: equal to local ones, cached by block, within the limit, and refused when they are others."""

import http.server
import multiprocessing
import os
import shutil
import threading
import time

import fsspec
import numpy as np
import pytest
import torch

from letit_dist.data import remote
from letit_dist.data.foreign import is_foreign
from letit_dist.data.index import INDEX_NAME
from letit_dist.data.reader import ImageStream, ShardDataset
from letit_dist.data.remote import BlockCache
from letit_dist.data.transforms import encode
from letit_dist.data.writer import ShardWriter
from letit_dist.errors import UserError
from letit_dist.schemas import ImagesConfig
from letit_dist.training.feeds import ImageFeed

BLOCK = 4096


def write(folder, seed=0, count=40, shard_samples=15):
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(folder, meta={"resolution": 16}, shard_samples=shard_samples) as writer:
        for number in range(count):
            pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
            writer.write(f"{number:03d}", {"png": encode(pixels), "json": b'{"n": %d}' % number})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Forty images in three shards, 41 KB and less: read only."""
    return write(tmp_path_factory.mktemp("shards") / "s")


@pytest.fixture
def memory(shards):
    """memory://set holds them; (filesystem, url)."""
    filesystem = fsspec.filesystem("memory")
    for path in shards.iterdir():
        filesystem.pipe(f"/set/{path.name}", path.read_bytes())
    yield filesystem, "memory://set"
    filesystem.rm("/set", recursive=True)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))


@pytest.fixture
def cache(tmp_path):
    return BlockCache(tmp_path / "cache", limit=100 * BLOCK, block=BLOCK)


def equal(found, expected):
    """Every sample of both data sets."""
    for sample in range(len(expected)):
        assert found.key(sample) == expected.key(sample) and found.json(sample) == expected.json(sample)
        assert torch.equal(found.pixels(sample), expected.pixels(sample))


def blocks_of(cache):
    return {path: path.stat().st_size for path in cache.folder.glob("*/*") if path.name.isdecimal()}


class Fetches:
    """Counts what is asked of the memory filesystem."""

    def __init__(self, monkeypatch, filesystem):
        self.ranges, whole = [], type(filesystem).cat_file

        def cat_file(this, path, start=None, end=None, **options):
            self.ranges.append((path, start, end))
            return whole(this, path, start=start, end=end, **options)

        monkeypatch.setattr(type(filesystem), "cat_file", cat_file)


def test_remote_shards_are_the_local_ones_and_each_block_comes_once(memory, shards, cache, monkeypatch):
    filesystem, url = memory
    fetches = Fetches(monkeypatch, filesystem)
    dataset = ShardDataset([url], cache=cache)
    assert not is_foreign(url) and fetches.ranges == [(f"/set/{INDEX_NAME}", None, None)]
    equal(dataset, ShardDataset([shards]))
    sizes = [shard.bytes for shard in dataset.indexes[0].shards]
    wanted = {
        (f"/set/shard-{number:05d}.tar", first, min(first + BLOCK, size))
        for number, size in enumerate(sizes)
        for first in range(0, size, BLOCK)
    }
    asked = fetches.ranges[1:]
    assert len(set(asked)) == len(asked) and set(asked) <= wanted and len(asked) > 15
    # Another process of another run: the index is not fetched again, nor is a block.
    del fetches.ranges[:]
    equal(ShardDataset([url], cache=BlockCache(cache.folder, cache.limit, BLOCK)), ShardDataset([shards]))
    assert fetches.ranges == []
    assert dataset.place(39) == "memory://set/shard-00002.tar: 039"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_batches(memory, shards, cache, workers):
    _, url = memory
    local, far = (
        iter(ImageStream(ShardDataset([path], cache=cache), seed=3, batch=8, workers=workers, flip=True))
        for path in (shards, url)
    )
    for _ in range(12):
        a, b = next(local), next(far)
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.positions, b.positions)


def test_a_feed_takes_a_url_and_its_cache_from_the_configuration(memory, shards, tmp_path):
    _, url = memory
    config = ImagesConfig(train=(url,), workers=0, cache=str(tmp_path / "blocks"), cache_gib=0.1)
    local = ImagesConfig(train=(str(shards),), workers=0)
    far, near = (next(ImageFeed(c, seed=1).batches(0, 8, 0, 1)) for c in (config, local))
    assert torch.equal(far.data["images"], near.data["images"])
    assert list((tmp_path / "blocks").glob("*/000000"))
    with pytest.raises(UserError, match=r"data.cache has no effect"):
        ImageFeed(ImagesConfig(train=(str(shards),), cache=str(tmp_path)), seed=1)
    with pytest.raises(ValueError, match="cache_gib"):
        ImagesConfig(train=(url,), cache_gib=0.01)
    with pytest.raises(UserError, match=r"cache of 1000 bytes is too small"):
        BlockCache(tmp_path, 1000)


def test_the_limit_holds_and_the_least_recently_used_go(memory, shards, tmp_path, monkeypatch):
    filesystem, url = memory
    fetches = Fetches(monkeypatch, filesystem)
    cache = BlockCache(tmp_path / "cache", limit=16 * BLOCK, block=BLOCK)
    dataset = ShardDataset([url], cache=cache)
    shard = dataset.indexes[0].paths[0]
    for _ in range(3):
        for sample in range(len(dataset)):
            dataset.read(sample)
            shard.read(0, 10)  # always the last used
            total = sum(blocks_of(cache).values())
            assert total <= cache.limit and total == int((cache.folder / ".used").read_text())
    assert sum(blocks_of(cache).values()) > cache.limit // 2
    starts = [start for path, start, _ in fetches.ranges if path == "/set/shard-00000.tar"]
    assert starts.count(0) == 1 and starts.count(BLOCK) > 1
    equal(dataset, ShardDataset([shards]))


def test_what_a_kill_leaves_is_no_harm(memory, shards, cache):
    _, url = memory
    dataset = ShardDataset([url], cache=cache)
    name = dataset.indexes[0].paths[0].name
    dataset.read(0)
    (cache.folder / name / "000001.part-12345").write_bytes(b"half")
    (cache.folder / name / "000001").write_bytes(b"cut by a power failure")
    (cache.folder / ".used").write_text("nonsense")
    equal(dataset, ShardDataset([shards]))
    cache.limit = 5 * BLOCK
    cache.store(name, 999, bytes(BLOCK))
    assert not list(cache.folder.glob("*/*.part-*")) and sum(blocks_of(cache).values()) <= 5 * BLOCK


def test_processes_share_the_cache_and_its_limit(memory, shards, tmp_path):
    _, url = memory
    cache = BlockCache(tmp_path / "cache", limit=16 * BLOCK, block=BLOCK)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(rank):
        dataset = ShardDataset([url], cache=cache)
        equal(dataset, ShardDataset([shards]))
        for sample in np.random.default_rng(rank).permutation(40).tolist():
            dataset.read(sample)
            results.put(sum(size for _, size in snapshot(cache)))
        results.put("done")

    workers = [context.Process(target=work, args=(rank,)) for rank in range(3)]
    for worker in workers:
        worker.start()
    totals, done = [], 0
    while done < 3:
        item = results.get()
        done += item == "done"
        totals += [] if item == "done" else [item]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(totals) == 120 and max(totals) <= cache.limit


def snapshot(cache):
    with cache._used():
        return list(blocks_of(cache).items())


# Other bytes than the index says


def test_a_shard_that_changed_is_refused(memory, cache, tmp_path):
    filesystem, url = memory
    dataset = ShardDataset([url], cache=cache)
    dataset.read(0)
    other = write(tmp_path / "other", seed=1)
    filesystem.pipe("/set/shard-00000.tar", (other / "shard-00000.tar").read_bytes() + bytes(512))
    dataset.read(0)  # its block is here
    with pytest.raises(UserError, match=r"memory://set/shard-00000.tar: \d+ bytes, its index.json says \d+"):
        dataset.read(14)
    # As many bytes, but another version: told by what the server says of it.
    old = (tmp_path / "other" / "shard-00001.tar").read_bytes()
    dataset.read(15)
    size = dataset.indexes[0].shards[1].bytes
    time.sleep(0.01)
    filesystem.rm("/set/shard-00001.tar")
    filesystem.pipe("/set/shard-00001.tar", old[:size].ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"shard-00001.tar: changed on the server since its first blocks were read \("):
        dataset.read(29)


def test_other_bytes_from_the_beginning_are_found_by_their_hash(memory, shards, cache):
    filesystem, url = memory
    data = bytearray((shards / "shard-00001.tar").read_bytes())
    data[700] ^= 1
    filesystem.pipe("/set/shard-00001.tar", bytes(data))
    dataset = ShardDataset([url], cache=cache)
    for sample in range(15):
        dataset.read(sample)
    shard = dataset.indexes[0].paths[1]
    with pytest.raises(UserError, match=r"shard-00001.tar: sha256 [0-9a-f]{12}, its index.json says [0-9a-f]{12}"):
        shard.read(0, shard.shard.bytes)
    assert shard.cache.blocks(shard.name) == []  # nothing of it is believed


def test_a_whole_shard_is_hashed_once(memory, cache, monkeypatch):
    _, url = memory
    dataset = ShardDataset([url], cache=cache)
    shard = dataset.indexes[0].paths[0]
    shard.read(0, shard.shard.bytes)
    assert cache.about(shard.name)["hashed"] is True
    assert cache.about(shard.name)["url"] == "memory://set/shard-00000.tar"


def test_a_new_index_is_another_data_set(memory, shards, cache, tmp_path):
    filesystem, url = memory
    equal(ShardDataset([url], cache=cache), ShardDataset([shards]))
    other = write(tmp_path / "other", seed=1)
    time.sleep(0.01)
    filesystem.rm("/set", recursive=True)
    for path in other.iterdir():
        filesystem.pipe(f"/set/{path.name}", path.read_bytes())
    equal(ShardDataset([url], cache=cache), ShardDataset([other]))


def test_what_is_not_there_or_not_known(memory, cache, tmp_path, quick):
    filesystem, url = memory
    with pytest.raises(UserError, match=r"memory://nowhere/index.json: the server has no such file"):
        ShardDataset(["memory://nowhere"], cache=cache)
    with pytest.raises(UserError, match=r"nonsense://x/index.json: cannot be opened: .*nonsense.*letit_dist"):
        ShardDataset(["nonsense://x"], cache=cache)
    filesystem.pipe(f"/bad/{INDEX_NAME}", b"[1, 2")
    with pytest.raises(UserError, match=r"memory://bad/index.json: not readable"):
        ShardDataset(["memory://bad"], cache=cache)
    dataset = ShardDataset([url], cache=cache)
    filesystem.rm("/set/shard-00002.tar")
    with pytest.raises(UserError, match=r"set/shard-00002.tar: the server has no such file"):
        dataset.read(39)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the cache of remote shards cannot be used: .*data.cache"):
        ShardDataset([url], cache=BlockCache(tmp_path / "file"))


# A web server


class Server(http.server.ThreadingHTTPServer):
    """Files with ranges and ETags; `drop` answers are cut in the middle, `ranges` False sends all of a file."""

    def __init__(self, folder):
        self.files, self.drop, self.ranges, self.requests = folder, 0, True, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.server.files / self.path.lstrip("/")
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if not path.is_file():
            self.send_error(404)
            return
        data, state = path.read_bytes(), path.stat()
        asked = self.headers.get("Range") if self.server.ranges else None
        self.send_response(206 if asked else 200)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            last = min(int(last or len(data)), len(data) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[int(first) : last + 1]
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.send_header("ETag", f'"{state.st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and asked and self.server.drop:
            self.server.drop -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(shards, tmp_path):
    pytest.importorskip("aiohttp")
    shutil.copytree(shards, tmp_path / "www" / "set")
    server = Server(tmp_path / "www")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_address[1]}/set"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_web_server(server, shards, cache):
    web, url = server
    dataset = ShardDataset([url + "/"], cache=cache)
    equal(dataset, ShardDataset([shards]))
    asked = [request for request in web.requests if request[0] == "GET"]
    assert len(asked) == len(set(asked)) > 15
    assert [request[2] for request in asked].count(None) == 1  # the index
    count = len(web.requests)
    equal(dataset, ShardDataset([shards]))
    assert len(web.requests) == count


def test_workers_read_from_a_web_server(server, shards, cache):
    """Forked after this process has opened its own connections: a connection must not be shared."""
    _, url = server
    dataset = ShardDataset([url], cache=cache)
    dataset.read(0)
    local, far = (
        iter(ImageStream(d, seed=3, batch=8, workers=w)) for d, w in ((ShardDataset([shards]), 0), (dataset, 2))
    )
    for _ in range(6):
        assert torch.equal(next(local).pixels, next(far).pixels)


def test_dropped_connections_are_tried_again(server, shards, cache, quick):
    web, url = server
    dataset = ShardDataset([url], cache=cache)
    web.drop = 3
    equal(dataset, ShardDataset([shards]))
    assert web.drop == 0
    web.drop = 100
    with pytest.raises(UserError, match=r"http://.*/set/shard-0000\d.tar: cannot be read, in 4 attempts: "):
        equal(ShardDataset([url], cache=BlockCache(cache.folder.parent / "new", block=BLOCK)), dataset)


def test_a_server_without_ranges_is_refused(server, cache, quick):
    web, url = server
    web.ranges = False
    with pytest.raises(UserError, match=r"the server sends whole files only \(no ranges\)"):
        ShardDataset([url], cache=cache).read(0)


def test_a_file_that_changes_on_a_web_server(server, cache):
    web, url = server
    dataset = ShardDataset([url], cache=cache)
    dataset.read(0)
    path = web.files / "set" / "shard-00000.tar"
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r'shard-00000.tar: changed on the server .*\(etag "\d+", now etag "1"\)'):
        dataset.read(14)
    shutil.rmtree(cache.folder / dataset.indexes[0].paths[0].name)  # as the message says
    assert dataset.json(14) == {"n": 14}


@pytest.fixture(scope="module")
def bucket(shards):
    """s3://bucket/set holds them, on a server of the S3 protocol in this process."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    known = {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    known |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, value)
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("bucket")
        filesystem.put(f"{shards}/", "bucket/set/", recursive=True)
        yield filesystem, "s3://bucket/set"
    server.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket(bucket, shards, cache, workers):
    _, url = bucket
    equal(ShardDataset([url], cache=cache), ShardDataset([shards]))
    shutil.rmtree(cache.folder)
    local, far = (
        iter(ImageStream(ShardDataset([path], cache=cache), seed=3, batch=8, workers=workers)) for path in (shards, url)
    )
    for _ in range(6):
        assert torch.equal(next(local).pixels, next(far).pixels)


def test_an_object_that_changed_is_refused(bucket, cache, tmp_path):
    filesystem, _ = bucket
    filesystem.put(f"{write(tmp_path / 'one')}/", "bucket/changing/", recursive=True)
    dataset = ShardDataset(["s3://bucket/changing"], cache=cache)
    dataset.read(0)
    other = write(tmp_path / "two", seed=1)
    filesystem.put(str(other / "shard-00000.tar"), "bucket/changing/shard-00000.tar")
    with pytest.raises(UserError, match=r"s3://bucket/changing/shard-00000\.tar"):
        for sample in range(15):
            dataset.read(sample)
    with pytest.raises(UserError, match=r"s3://bucket/none/index\.json: the server has no such file"):
        ShardDataset(["s3://bucket/none"], cache=cache)
