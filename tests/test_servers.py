"""What servers do to a download, by sockets that send any bytes: the file comes whole, or one error says why not."""

import contextlib
import dataclasses
import hashlib
import os
import socket
import struct
import threading
import time

import pytest

from paddle_clip import DownloadError, hub, presets

CONTENT = os.urandom(30_000)
HALF = 15_000
ROW = dataclasses.replace(presets.PRESETS[0], sha256=hashlib.sha256(CONTENT).hexdigest(), parameters=10_000)
LARGEST = 4 * ROW.parameters + 1000


def head(status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join([*lines, "Connection: close", "", ""])).encode()


def whole(**headers):
    return head(Content_Length=len(CONTENT), **headers) + CONTENT


def rest(start=HALF, status="206 Partial Content", **headers):
    headers.setdefault("Content_Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    return head(status, Content_Length=len(CONTENT) - start, **headers) + CONTENT[start:]


def chunked(content=CONTENT, end=b"0\r\n\r\n"):
    parts = (content[start : start + 7000] for start in range(0, len(content), 7000))
    return head(Transfer_Encoding="chunked") + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def drip(content, seconds, size=1):
    for start in range(0, len(content), size):
        yield content[start : start + size]
        time.sleep(seconds)


def endless():
    yield head()
    while True:
        yield bytes(5000)


# {behaviour: (bytes of the file that are there before, what the server sends, words of the error or None)}
# A number is a time to wait in seconds, None closes the connection with a reset.
SERVERS = {
    "whole": (0, [whole()], None),
    "without a length": (0, [head() + CONTENT], None),
    "in chunks": (0, [chunked()], None),
    "in small pieces": (0, lambda: drip(whole(), 0.0001, 3000), None),
    "the rest": (HALF, [rest()], None),
    "the rest, of no stated place": (HALF, [rest(Content_Range="bytes 15000-29999/*")], None),
    "from the start, for the rest": (HALF, [whole()], None),
    "from the start, in chunks, for the rest": (HALF, [chunked()], None),
    "416 where all is there": (len(CONTENT), [head("416 Range Not Satisfiable", Content_Length=0)], None),
    "416 for the whole": (0, [head("416 Range Not Satisfiable", Content_Length=0)], "HTTP Error 416"),
    "416 where half is there": (HALF, [head("416 Range Not Satisfiable", Content_Length=0)], "SHA-256"),
    "another part": (HALF, [rest(Content_Range="bytes 10000-24999/30000")], "was asked for what follows byte 15000"),
    "a part for the whole": (0, [rest()], "was asked for what follows byte 0"),
    "the same part again": (HALF, [rest(0, Content_Range="bytes 15000-44999/45000")], "is said to have 45,000 bytes"),
    "204": (0, [head("204 No Content")], "answered 204 No Content, and sent no file"),
    "202": (0, [head("202 Accepted", Content_Length=0)], "answered 202 Accepted"),
    "304": (0, [head("304 Not Modified")], "HTTP Error 304"),
    "403": (0, [head("403 Forbidden", Content_Length=0)], "HTTP Error 403"),
    "404": (0, [head("404 Not Found", Content_Length=0)], "HTTP Error 404"),
    "500": (0, [head("500 Internal Server Error", Content_Length=0)], "HTTP Error 500"),
    "503": (HALF, [head("503 Service Unavailable", Content_Length=0)], "HTTP Error 503"),
    "a redirection to itself": (0, [head("302 Found", Location="/", Content_Length=0)], "redirect"),
    "a redirection to a file": (0, [head("302 Found", Location="file:///etc/passwd")], "not allowed"),
    "nothing": (0, [b""], "without response"),
    "a reset": (0, [None], "reset"),
    "a reset in the middle": (0, [whole()[:HALF], 0.1, None], "reset|closed after"),
    "an end in the middle": (0, [whole()[:HALF]], r"closed after 14,\d{3} of 30,000 bytes"),
    "an end in the middle of a chunk": (0, [chunked(CONTENT[:100], b"1000\r\n" + CONTENT[100:103])], "IncompleteRead"),
    "chunks of no length": (0, [head(Transfer_Encoding="chunked") + b"xyz\r\nabc"], "IncompleteRead"),
    "no HTTP": (0, [b"SSH-2.0-OpenSSH_9.6\r\n" * 3], "SSH"),
    "a long line": (0, [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000], "more than"),
    "many headers": (0, [b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 1000 + b"\r\n"], "headers"),
    "a length that is none": (0, [head(Content_Length="many") + CONTENT], "says that it sends 'many' bytes"),
    "a length below zero": (0, [head(Content_Length=-5) + CONTENT], "says that it sends '-5' bytes"),
    "a page of a login": (0, [head(Content_Length=6) + b"log in"], "gave a file with SHA-256"),
    "another file": (0, [head(Content_Length=30_000) + bytes(30_000)], "gave a file with SHA-256"),
    "compressed": (0, [head(Content_Encoding="gzip") + CONTENT[:500]], "gave a file with SHA-256"),
    "a length beyond all files": (0, [head(Content_Length=10**15)], "is said to have 1,000,000,000,000,000 bytes"),
    "no end": (0, endless, "goes on after 41,000 bytes"),
    "no end of chunks": (0, [chunked(bytes(60_000))], "goes on after 41,000 bytes"),
    "silence": (0, [2], "timed out"),
    "silence in the middle": (0, [whole()[:HALF], 2], "timed out"),
    "a byte now and then": (0, lambda: drip(whole(), 0.05), "bytes came in .* too slow to wait for"),
}


@contextlib.contextmanager
def serving(answer):
    """A server that sends the same to everyone; yields its URL."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer_one, args=(connection,), daemon=True).start()

    def answer_one(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            for part in answer() if callable(answer) else answer:
                if part is None:  # a reset in place of an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("behaviour", SERVERS)
def test_what_servers_do(tmp_path, monkeypatch, behaviour):
    before, answer, words = SERVERS[behaviour]
    monkeypatch.setattr(hub, "_TIMEOUT", 0.5)
    monkeypatch.setattr(hub, "_SLOW_SECONDS", 0.5)
    monkeypatch.setattr(hub, "_BYTES_BESIDE", 1000)
    path = tmp_path / "x.pt"
    if before:
        (tmp_path / "x.pt.partial").write_bytes(CONTENT[:before])
    start = time.monotonic()
    with serving(answer) as url:
        monkeypatch.setenv("PADDLE_CLIP_MIRROR", url)
        if words is None:
            hub._fetch(ROW, str(path))
            assert path.read_bytes() == CONTENT
            assert os.listdir(tmp_path) == ["x.pt"]
            return
        with pytest.raises(DownloadError, match=words):
            hub._fetch(ROW, str(path))
    assert time.monotonic() - start < 10
    assert not path.exists()
    left = tmp_path / "x.pt.partial"
    assert not left.exists() or CONTENT.startswith(left.read_bytes()), "what is kept is no start of the file"
    with serving([rest(left.stat().st_size)] if left.exists() and left.stat().st_size else [whole()]) as url:
        monkeypatch.setenv("PADDLE_CLIP_MIRROR", url)
        hub._fetch(ROW, str(path))
    assert path.read_bytes() == CONTENT
