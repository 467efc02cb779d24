"""Decoding in a process of its own: the same pixels and errors; what kills, starves or hangs it is told from its neighbours."""

import signal
from collections.abc import Iterator
from typing import IO, Any

import pytest
import torch

from dragonclf.data import images, isolated
from tests import codec
from tests.conftest import encoded

MIB = 2**20


@pytest.fixture(scope="module")
def shared() -> Iterator[isolated.Decoder]:
    """Started for all tests, and again by those that kill it: a start takes seconds."""
    made = isolated.Decoder(max_pixels=10_000, max_bytes=512 * MIB, max_s=4.0)
    yield made
    made.close()


@pytest.fixture
def decoder(shared: isolated.Decoder, monkeypatch: pytest.MonkeyPatch) -> isolated.Decoder:
    for name, value in codec.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return shared


def test_pixels_and_errors_are_those_of_decode(decoder: isolated.Decoder):
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(kind)
        assert torch.equal(decoder.read(data).pixels, images.decode(data))
    reduced, expected = (of(encoded(size=(90, 70)), min_side=8) for of in (decoder.read, images.read))
    assert reduced[1:] == expected[1:] == (90, 70)
    assert reduced.pixels.shape == (3, 9, 12)
    assert torch.equal(reduced.pixels, expected.pixels)
    for data in (b"", b"text", encoded()[:300], encoded(size=(200, 51))):
        with pytest.raises(images.ImageError) as ours:
            decoder.read(data)
        with pytest.raises(images.ImageError) as theirs:
            images.decode(data, max_pixels=10_000)
        assert (ours.value.status, ours.value.reason) == (theirs.value.status, theirs.value.reason)


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (codec.picture("die"), "decoder_crash", "ends the process that decodes it (SIGSEGV)"),
        (codec.picture("eat", mib=512), "decoder_crash", "needs more than 256 MiB of memory to be decoded"),
        (codec.picture("hang"), "timeout", "could not be decoded in 4 s"),
        (codec.picture("hold"), "timeout", "could not be decoded in 4 s"),
    ],
    ids=["die", "eat", "hang", "hold"],
)
def test_a_killer_is_named_and_its_neighbours_are_decoded(
    data: bytes, status: str, reason: str, decoder: isolated.Decoder
):
    good = encoded("PNG")
    assert torch.equal(decoder.read(good).pixels, images.decode(good))
    with pytest.raises(images.ImageError) as caught:
        decoder.read(data)
    assert (caught.value.status, caught.value.reason) == (status, reason)
    assert torch.equal(decoder.read(good).pixels, images.decode(good))


def test_one_death_from_outside_blames_no_image(decoder: isolated.Decoder):
    good = encoded("PNG")
    decoder.read(good)
    assert decoder._child is not None
    decoder._child.kill()
    assert torch.equal(decoder.read(good).pixels, images.decode(good))


def test_kills_from_outside_that_go_on_stop_the_run_and_blame_no_image(
    decoder: isolated.Decoder, monkeypatch: pytest.MonkeyPatch
):
    send = isolated._send

    def send_and_kill(pipe: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
        assert decoder._child is not None
        decoder._child.kill()
        send(pipe, header, payload)

    monkeypatch.setattr(isolated, "_send", send_and_kill)
    with pytest.raises(OSError, match=r"killed from outside, twice: .* lower --max-actor-bytes"):
        decoder.read(encoded("PNG"))


def test_what_fits_the_memory_is_decoded(decoder: isolated.Decoder):
    assert decoder.read(codec.picture("eat", mib=64)).pixels.shape == (3, 30, 40)


def test_what_does_not_fit_a_share_is_decoded_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", codec.ENVIRONMENT["PYTHONPATH"])
    one_of_eight = isolated.Decoder(max_bytes=1024 * MIB, max_s=20.0, share=8)
    with pytest.raises(isolated._CrashError, match="needs more than 64 MiB"):
        one_of_eight._read(codec.picture("eat", mib=128), None, one_of_eight._first_bytes)
    assert one_of_eight.read(codec.picture("eat", mib=128)).pixels.shape == (3, 30, 40)
    one_of_eight.close()


def test_a_large_picture_leaves_the_next_one_all_the_memory():
    roomy = isolated.Decoder(max_pixels=40_000_000, max_bytes=640 * MIB, max_s=60.0)
    data = encoded(size=(6000, 6000))  # 103 MiB of pixels
    assert [roomy.read(data).pixels.shape for _ in range(3)] == [(3, 6000, 6000)] * 3
    roomy.close()


def test_a_child_that_hangs_ends_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", codec.ENVIRONMENT["PYTHONPATH"])
    hung, quick = codec.picture("hang"), isolated.Decoder(max_bytes=512 * MIB, max_s=1.0)
    with pytest.raises(images.ImageError, match="timeout"):
        quick.read(hung)
    child = quick._started(64 * MIB)
    assert child.stdin is not None
    isolated._send(child.stdin, {"min_side": None}, hung)  # and nobody waits for the answer
    assert child.wait(timeout=20) == -signal.SIGALRM
    quick.close()


def test_a_decoder_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(OSError, match="does not start: it ended with exit code 1"):
        isolated.Decoder(max_bytes=MIB, max_s=2.0).read(encoded())
