"""Fetching files, from a server on this machine that behaves badly."""

import hashlib
import http.server
import io
import threading
import time
import zipfile

import pytest

from kmebench.data.sources import Patience, Source, fetch
from kmebench.errors import DataError
from kmebench.io import origins

BODY = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(timeout=0.5, retries=2, backoff=0.01)


def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        zipped.writestr("data/inner.json", BODY)
        zipped.writestr("../outside.json", b"never written")
    return stream.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """The path says how often to fail, and how."""

    def do_GET(self):
        server, kind = self.server, self.path.strip("/")
        server.asked.append(kind)
        tries = server.asked.count(kind)
        body = archive() if kind == "zip" else BODY
        if kind == "404":
            self.send_error(404)
        elif kind == "503" or (kind == "503-once" and tries == 1):
            self.send_error(503)
        elif kind == "broken" or (kind == "broken-once" and tries == 1):
            self.answer(body[: len(body) // 2], len(body))
        elif kind == "stalled":
            self.answer(body[:1000], len(body))
            self.wfile.flush()
            server.released.wait(5)
        else:
            self.answer(body, len(body))

    def answer(self, body, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.released = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, kind, folder, **source):
    url = f"http://127.0.0.1:{server.server_port}/{kind}"
    fetch(Source(["set.json"], url=url, **source), folder / "raw.json", patience=QUICK)
    return folder / "raw.json"


@pytest.mark.parametrize("kind", ["good", "503-once", "broken-once"])
def test_a_file_arrives_whole_also_on_the_second_try(kind, server, tmp_path):
    assert get(server, kind, tmp_path, sha256=SHA256).read_bytes() == BODY
    assert len(server.asked) == (1 if kind == "good" else 2)
    assert [p.name for p in tmp_path.iterdir()] == ["raw.json"]


FAILURES = {
    "404": ({}, "answered 404", 1),
    "503": ({}, "in 3 tries .the server answered 503", 3),
    "broken": ({}, "in 3 tries .the connection (ended|broke) after", 3),
    "stalled": ({}, "in 3 tries .the connection stalled", 3),
    "good": ({"sha256": "0" * 64}, f"has the sha256 {SHA256}, expected 0000", 1),
    "zip": ({"member": "nowhere.json"}, "holds no member 'nowhere.json'", 1),
    "plain": ({"member": "inner.json"}, "is no intact zip archive", 1),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing(kind, server, tmp_path):
    source, complaint, tries = FAILURES[kind]
    start = time.monotonic()
    with pytest.raises(DataError, match=complaint):
        get(server, kind, tmp_path, **source)
    assert time.monotonic() - start < 10
    assert len(server.asked) == tries
    assert list(tmp_path.iterdir()) == []


def test_a_member_is_taken_out_of_its_archive(server, tmp_path):
    assert get(server, "zip", tmp_path, member="data/inner.json").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["raw.json"]


def test_the_mirror_is_searched_before_any_url(server, tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "other-name.json").write_bytes(BODY)
    source = Source(
        ["set.json", "other-name.json"],
        url=f"http://127.0.0.1:{server.server_port}/good",
        sha256=SHA256,
    )
    fetch(source, tmp_path / "raw.json", str(tmp_path / "mirror"))
    assert (tmp_path / "raw.json").read_bytes() == BODY
    assert server.asked == []


def test_a_damaged_file_in_the_mirror_is_refused(tmp_path):
    (tmp_path / "set.json").write_bytes(b"[]")
    with pytest.raises(DataError, match=r"set\.json has the sha256 .*, expected"):
        fetch(Source(["set.json"], sha256=SHA256), tmp_path / "raw.json", str(tmp_path))
    assert not (tmp_path / "raw.json").exists()


def test_the_digest_is_that_of_the_file_as_it_came(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/zip"
    downloaded = fetch(Source(["a.zip"], url=url, member="data/inner.json"), tmp_path / "raw.json")
    (tmp_path / "a.zip").write_bytes(archive())
    source = Source(["a.zip"], member="data/inner.json")
    assert fetch(source, tmp_path / "raw.json", str(tmp_path)) == downloaded
    assert origins.digest(tmp_path / "a.zip") == downloaded


def test_a_file_in_the_mirror_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "set.json").write_bytes(b"[]")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(origins, "sha256_of", refuse)
    with pytest.raises(DataError, match=r"set\.json cannot be read .Permission denied."):
        fetch(Source(["set.json"]), tmp_path / "raw.json", str(tmp_path))
    assert not (tmp_path / "raw.json").exists()


def test_a_missing_mirror_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"mirror folder .*nowhere does not exist"):
        fetch(Source(["set.json"]), tmp_path / "raw.json", str(tmp_path / "nowhere"))


def test_without_url_and_mirror_the_mend_is_said(tmp_path):
    with pytest.raises(DataError, match=r"set\.json has no URL .*KMEBENCH_DATA_MIRROR"):
        fetch(Source(["set.json"]), tmp_path / "raw.json")


def test_plain_http_to_another_machine_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"http://example\.org/set\.json is not https"):
        fetch(Source(["set.json"], url="http://example.org/set.json"), tmp_path / "raw.json")
