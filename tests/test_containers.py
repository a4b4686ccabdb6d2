"""What is opened as a video, and by what it is known to be cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deblur_deploy.errors import InputError
from tests.test_video import make

av = pytest.importorskip("av")
containers = pytest.importorskip("deblur_deploy.media.containers")
extent = pytest.importorskip("deblur_deploy.media.extent")
video = pytest.importorskip("deblur_deploy.media.video")

SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile secret.ts\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>secret.ts</BaseURL></MPD>',
}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".m3u8"])
def test_what_names_other_files_is_no_video(tmp_path: Path, kind: str, suffix: str) -> None:
    make(tmp_path / "secret.ts", "libx264", "yuv420p")
    script = tmp_path / f"a{suffix}"
    script.write_text(SCRIPTS[kind])
    if kind == "ffconcat":
        av.open(str(script)).close()  # which is what must not happen
    for call in (video.frame_count, lambda path: video.restore_video(path, tmp_path / "b.mp4", lambda image: image)):
        with pytest.raises(InputError, match=r"a\.\w+ cannot be read as a video"):
            call(script)
    assert not (tmp_path / "b.mp4").exists()


def test_a_colon_in_a_relative_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("10:20:30.mp4"), "libx264", "yuv420p")
    assert video.frame_count(Path("10:20:30.mp4")) == 17
    assert video.restore_video(Path("10:20:30.mp4"), Path("http:out.mp4"), lambda image: image) == ()
    assert video.frame_count(Path("http:out.mp4")) == 17


def test_two_videos_in_one_file_are_refused(tmp_path: Path) -> None:
    def another(output: Any, stream: Any) -> None:
        second = output.add_stream("mpeg4", rate=25)
        second.codec_context.width, second.codec_context.height = 64, 48

    source = make(tmp_path / "a.mkv", "libx264", "yuv420p", prepare=another)
    with pytest.raises(InputError, match="2 video tracks"):
        video.restore_video(source, tmp_path / "b.mkv", lambda image: image)


@pytest.mark.parametrize(
    ("name", "codec", "muxing"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mov", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_bytes_that_are_missing_are_counted(tmp_path: Path, name: str, codec: str, muxing: dict[str, str]) -> None:
    path = make(tmp_path / name, codec, "yuv420p", muxing=muxing)
    content = path.read_bytes()
    assert extent.missing_bytes(path) == 0
    path.write_bytes(content + b"somebody's own appendix")
    assert extent.missing_bytes(path) == 0
    path.write_bytes(content[:-20])
    assert 12 <= extent.missing_bytes(path) <= 20


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF", b"\0" * 100, b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\0" * 9, b"\x1a\x45\xdf\xa3\1" + b"\xfe" * 9],
)
def test_what_says_nothing_of_its_length_is_not_called_cut(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert extent.missing_bytes(tmp_path / "a") == 0


def test_a_live_recording_of_unknown_length_is_not_called_cut(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", "libx264", "yuv420p", muxing={"live": "1"})
    assert extent.missing_bytes(path) == 0
    assert video.restore_video(path, tmp_path / "b.mkv", lambda image: image) == ()
