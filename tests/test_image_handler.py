import base64
import hashlib
import io
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import PIL.Image
import PIL.ImageCms
import pytest

import errors
import file_utils
import image_handler
from image_handler import MAX_BYTES, MAX_TOTAL, Image, ImageStore

SESSION = "a3877250-ed5a-4708-b965-9ca240ad7f61"
OTHER = "43411eba-ac14-455e-9941-ed116e8e7034"
DAY = 86_400
NOW = 1_790_000_000.5
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp"}

# As in the service, where image_handler sees to it; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> PIL.Image.Image:
    """Red above on the left, blue elsewhere: it tells which way it is turned."""
    image = PIL.Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height // 2))
    return image.convert(mode)


def made(kind: str, image: PIL.Image.Image | None = None, **options: Any) -> bytes:
    output = io.BytesIO()
    (image or picture()).save(output, kind, **options)
    return output.getvalue()


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.frombytes("RGB", (width, height), os.urandom(width * height * 3))


def padded_png(size: int, filling: int = 0) -> bytes:
    """A PNG of exactly so many bytes."""
    data = made("PNG")
    body = b"paDd" + bytes([filling]) * (size - len(data) - 12)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and has hardly a pixel."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(data: bytes) -> Image:
    [image] = image_handler.decode([encoded(data)])
    return image


def refusal(kind: type[errors.AppError], code: str, *sources: str | bytes) -> str:
    """The sentence with which these sources are refused, after a look at its class and code."""
    with pytest.raises(kind) as caught:
        image_handler.decode([source if isinstance(source, str) else encoded(source) for source in sources])
    assert caught.value.code == code
    return caught.value.message


def corners(data: bytes) -> list[str]:
    """Which corners are red: top left, top right, bottom left, bottom right."""
    image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    right, bottom = image.width - 3, image.height - 3
    places = {"top left": (2, 2), "top right": (right, 2), "bottom left": (2, bottom), "bottom right": (right, bottom)}
    found = []
    for name, place in places.items():
        pixel = image.getpixel(place)
        assert isinstance(pixel, tuple)
        if pixel[0] > 128:
            found.append(name)
    return found


class TestRecognition:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_exact_bytes(self, kind: str) -> None:
        """What browsers show keeps each of its bytes."""
        data = made(kind)
        image = decode(data)
        assert image.data == data
        assert image.media_type == FORMATS[kind]
        assert image.digest == hashlib.sha256(data).hexdigest()
        assert image.extension == {"JPEG": "jpg"}.get(kind, kind.lower())

    @pytest.mark.parametrize(
        ("kind", "modes"),
        [
            ("JPEG", ["1", "L", "RGB", "CMYK", "YCbCr"]),
            ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
            ("GIF", ["1", "L", "P", "RGB", "RGBA"]),
            ("WEBP", ["L", "P", "RGB", "RGBA"]),
        ],
    )
    def test_modes(self, kind: str, modes: list[str]) -> None:
        """Black and white, grey, indexed, transparent or printer's colours: a picture is one."""
        for mode in modes:
            data = made(kind, picture(mode=mode))
            assert decode(data).data == data

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
    def test_animation(self, kind: str) -> None:
        """A moving picture keeps its bytes too."""
        data = made(kind, save_all=True, append_images=[PIL.Image.new("RGB", (40, 30), "green")] * 3)
        assert decode(data).data == data

    @pytest.mark.parametrize("label", ["image/jpeg", "image/svg+xml", "text/html", "application/octet-stream", ""])
    def test_label_that_lies(self, label: str) -> None:
        """The bytes say what it is, whatever the label says; browsers label HEIC as octet-stream."""
        [image] = image_handler.decode([f"data:{label};base64,{encoded(made('PNG'))}"])
        assert image.media_type == "image/png"

    @pytest.mark.parametrize(
        "data",
        [
            b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
            b"%PDF-1.7\n",
            b"hello",
            b"\xff\xd8",
            b"\0" * 1000,
            b"\0\0\0\x1cftypavif" + b"\0" * 100,
            b"\0\0\0\x1cftypisom" + b"\0" * 100,
            b"RIFF\0\0\0\0WAVEfmt ",
            b" " + made("PNG"),
            *(made(kind) for kind in ("BMP", "TIFF", "ICO", "PPM", "PDF", "AVIF")),
        ],
    )
    def test_other_types(self, data: bytes) -> None:
        """What is none of the types is not taken, and what is taken is named, whatever the label says."""
        message = refusal(errors.Unsupported, "unsupported_image", f"data:image/png;base64,{encoded(data)}")
        assert "JPEG, PNG, GIF, WebP or HEIC" in message

    @pytest.mark.parametrize(
        "data",
        [
            b"GIF89a/*<script>",
            b"GIF89a=1;alert(1)//" + b"a" * 1000,
            b"GIF89a\0\0\0\0\0\0\0;",
            b"\xff\xd8\xff" + b"\0" * 100,
            b"\xff\xd8\xff\xe0",
            b"\x89PNG\r\n\x1a\n",
            b"RIFF\x10\0\0\0WEBPVP8 ",
            b"\0\0\0\x18ftypheic" + b"\0" * 100,
            png_header(0, 10),
            png_header(100, 100),
        ],
    )
    def test_first_bytes_alone(self, data: bytes) -> None:
        """What begins like a picture and is none is refused as damaged."""
        refusal(errors.Invalid, "invalid_image", data)

    @pytest.mark.parametrize("kind", [*FORMATS, "HEIF"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_truncated(self, kind: str, share: float) -> None:
        """A picture that breaks off is refused, though its header is whole."""
        data = made(kind, noise(100, 100))
        refusal(errors.Invalid, "invalid_image", data[: int(len(data) * share)])

    def test_damaged_png(self) -> None:
        """A PNG that was changed on the way, or lost no more than its end mark, is refused."""
        data = made("PNG", noise(50, 50))
        end = data.rindex(b"\0\0\0\0IEND")
        middle = len(data) // 2
        flipped = bytes([data[middle] ^ 1])
        for damaged in (
            data[:middle] + flipped + data[middle + 1 :],
            data[: end - 2] + b"\0\0" + data[end:],
            data[:end],
        ):
            refusal(errors.Invalid, "invalid_image", damaged)

    def test_page_behind_a_picture(self) -> None:
        """A true picture with something behind it stays a picture, with a picture's media type."""
        data = made("GIF") + b"<script>alert(1)</script>"
        image = decode(data)
        assert (image.data, image.media_type) == (data, "image/gif")


class TestBase64:
    def test_ways_to_write_it(self) -> None:
        """With and without prefix, parameters, line breaks and padding, in both alphabets."""
        data = next(
            data
            for filling in range(256)
            if "+" in encoded(data := padded_png(400 + filling, filling))
            and "/" in encoded(data)
            and encoded(data).endswith("=")
        )
        plain = encoded(data)
        lines = "\r\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
        for source in (
            plain,
            f"data:image/png;base64,{plain}",
            f"DATA:IMAGE/PNG;BASE64,{plain}",
            f" data:image/png;charset=utf-8;name=a.png; base64, {plain}\n",
            lines,
            f"\n{lines}\n",
            plain.rstrip("="),
            base64.urlsafe_b64encode(data).decode(),
            base64.urlsafe_b64encode(data).decode().rstrip("="),
        ):
            [image] = image_handler.decode([source])
            assert image.data == data

    @pytest.mark.parametrize(
        "source",
        [
            *("", " \n", "=", "====", "A", "AAAAA", "QUJD=", "QQ=", "QQ===", "QQ==QQ==", "Q=UJ", "testimage123!"),
            *(
                "QUJ\0D",
                "QUJDé",
                "\ud800",
                "\uff11\uff12\uff13\uff14",
                "data:",
                "data:image/png;base64,",
                "data:image/png;base64",
            ),
            *("data:image/svg+xml,<svg/>", "data:image/svg+xml,PHN2Zz4=", "file:///etc/passwd", "blob:abc"),
            *("data:image/png;base64,data:image/png;base64,QUJD", "iVBORw0K%2BGgo"),
        ],
    )
    def test_what_is_no_base64(self, source: str) -> None:
        """Anything else is refused with what to send."""
        assert "base64" in refusal(errors.Invalid, "invalid_image", source)

    @pytest.mark.parametrize("source", ["http://a.example/x.png", "HTTPS://a.example/x.png", "  https://a.example"])
    def test_link(self, source: str) -> None:
        """A link is not followed, and the sentence says so."""
        assert "link" in refusal(errors.Invalid, "invalid_image", source)


class TestLimits:
    def test_count(self) -> None:
        """Eight images are taken, in their order, nine are not."""
        pictures = [padded_png(200 + number) for number in range(9)]
        images = image_handler.decode([encoded(data) for data in pictures[:8]])
        assert [image.data for image in images] == pictures[:8]
        assert "8" in refusal(errors.TooLarge, "image_too_large", *pictures)
        assert image_handler.decode([]) == []

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_bytes_of_one(self, kind: str) -> None:
        """10 MB are taken to the byte, however they are written, and one byte more is not."""
        for size in (MAX_BYTES - 1, MAX_BYTES, MAX_BYTES + 1):
            data = padded_png(size) if kind == "PNG" else made("JPEG").ljust(size, b"\0")
            assert len(data) == size
            if size > MAX_BYTES:
                assert "10 MB" in refusal(errors.TooLarge, "image_too_large", data)
                refusal(errors.TooLarge, "image_too_large", encoded(data).rstrip("="))
            else:
                assert decode(data).data == data
                lines = base64.encodebytes(data).decode().replace("\n", "\r\n")
                assert image_handler.decode([f"data:image/png;base64,{lines}"])[0].data == data

    def test_bytes_together(self) -> None:
        """20 MB are taken to the byte, and one byte more is not."""
        whole = padded_png(MAX_TOTAL // 2), padded_png(MAX_TOTAL // 2 - 1000), padded_png(1000)
        assert len(image_handler.decode([encoded(data) for data in whole])) == 3
        assert "20 MB" in refusal(errors.TooLarge, "image_too_large", *whole[:2], padded_png(1001))

    def test_huge_string(self) -> None:
        """A string far over the limit is refused before anything is made of it."""
        source = "A" * (100 * 1024 * 1024)
        tracemalloc.start()
        try:
            refusal(errors.TooLarge, "image_too_large", source)
            assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
        finally:
            tracemalloc.stop()

    def test_largest_size(self) -> None:
        """64 megapixels are taken."""
        data = made("PNG", PIL.Image.new("1", (8192, 8192)))
        assert decode(data).data == data

    @pytest.mark.parametrize("size", [(8192, 8193), (9000, 9000), (12000, 12000), (60_000, 60_000), (2**31 - 1, 2)])
    @pytest.mark.parametrize("warning", ["error", "ignore"])
    def test_pixels(self, size: tuple[int, int], warning: Any) -> None:
        """More is refused by the header, before a pixel is made, whether or not Pillow's warning is an error."""
        with warnings.catch_warnings():
            warnings.simplefilter(warning, PIL.Image.DecompressionBombWarning)
            assert "megapixels" in refusal(errors.TooLarge, "image_too_large", png_header(*size))

    def test_bomb(self) -> None:
        """A few kilobytes that would become 81 megapixels are refused, in each type that can hold them."""
        bomb = PIL.Image.new("1", (9000, 9000))
        for kind in FORMATS:
            options = {"quality": 0, "method": 0} if kind == "WEBP" else {}
            refusal(errors.TooLarge, "image_too_large", made(kind, bomb.convert("L"), **options))
        heic = made("HEIF", picture(64, 64)).replace(struct.pack(">II", 64, 64), struct.pack(">II", 9000, 9000))
        assert "megapixels" in refusal(errors.TooLarge, "image_too_large", heic)

    def test_frames(self) -> None:
        """An animation of a thousand large frames in a few kilobytes is refused, an ordinary one is not."""
        frame = PIL.Image.new("P", (1200, 1000))
        data = made("GIF", frame, save_all=True, append_images=[PIL.Image.new("P", (1200, 1000), 1)])
        second = data.index(b"\x21\xf9", data.index(b"\x2c"))
        data, last = data[:-1], data[second:-1]
        assert decode(data + last * 800 + b";").media_type == "image/gif"
        assert "frames" in refusal(errors.TooLarge, "image_too_large", data + last * 1000 + b";")

    def test_scans(self) -> None:
        """A JPEG that goes over its pixels again and again is refused, a progressive one is not."""
        data = made("JPEG", PIL.Image.new("L", (8000, 8000)), progressive=True)
        assert decode(data).data == data
        scan = data[data.rindex(b"\xff\xda") : -2]
        refusal(errors.TooLarge, "image_too_large", data[:-2] + scan * 20 + data[-2:])

    def test_segments(self) -> None:
        """A JPEG of millions of empty parts is refused; one with a large profile and a film behind it is not."""
        data = made("JPEG")
        refusal(errors.Invalid, "invalid_image", data[:2] + b"\xff\xe9\0\2" * 1_000_000 + data[2:])
        parts = (b"\xff\xe9\xff\xff" + b"\xff\xda" * 32_766 + b"\0") * 100
        film = b"\xff\xda\0\2" * 100_000
        photo = data[:2] + parts + data[2:] + film
        assert decode(photo).data == photo

    def test_which_one(self) -> None:
        """Of several images the sentence names the one that is meant; of one it does not count."""
        good = made("PNG")
        assert "Image 2 of 3" in refusal(errors.Unsupported, "unsupported_image", good, b"text", good)
        assert "Image 3 of 3" in refusal(errors.Invalid, "invalid_image", good, good, "!")
        assert "Image 1 of 2" in refusal(errors.TooLarge, "image_too_large", png_header(9000, 9000), good)
        assert refusal(errors.Unsupported, "unsupported_image", b"text").startswith("The image is")


class TestHeic:
    def test_becomes_jpeg(self) -> None:
        """HEIC comes out as the JPEG that every browser shows, under its own digest."""
        image = decode(made("HEIF"))
        assert (image.media_type, image.extension) == ("image/jpeg", "jpg")
        assert image.digest == hashlib.sha256(image.data).hexdigest()
        shown = PIL.Image.open(io.BytesIO(image.data))
        assert (shown.format, shown.size) == ("JPEG", (40, 30))
        assert corners(image.data) == ["top left"]

    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
    def test_modes(self, mode: str) -> None:
        """Grey, transparent or with 16 bits, it becomes a JPEG."""
        source = PIL.Image.new("I;16", (40, 30), 40_000) if mode == "I;16" else picture(mode=mode)
        shown = PIL.Image.open(io.BytesIO(decode(made("HEIF", source)).data))
        assert shown.format == "JPEG"
        shown.load()

    @pytest.mark.parametrize(
        ("orientation", "corner", "size"),
        [
            (1, "top left", (40, 30)),
            (3, "bottom right", (40, 30)),
            (6, "top right", (30, 40)),
            (8, "bottom left", (30, 40)),
        ],
    )
    def test_orientation(self, orientation: int, corner: str, size: tuple[int, int]) -> None:
        """A photo taken with the phone on its side stands upright, once, and its place on earth stays behind."""
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        exif[0x010F] = "Secret Phones Ltd"
        data = made("HEIF", exif=exif.tobytes())
        assert b"Secret" in data
        image = decode(data)
        assert corners(image.data) == [corner]
        shown = PIL.Image.open(io.BytesIO(image.data))
        assert shown.size == size
        assert not shown.getexif()
        assert b"Secret" not in image.data

    def test_colour_profile(self) -> None:
        """The colour profile stays, without which phones' colours look pale; a monstrous one does not."""
        profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
        shown = PIL.Image.open(io.BytesIO(decode(made("HEIF", icc_profile=profile)).data))
        assert shown.info["icc_profile"] == profile
        monstrous = profile + b"\0" * image_handler.MAX_PROFILE
        shown = PIL.Image.open(io.BytesIO(decode(made("HEIF", icc_profile=monstrous)).data))
        assert "icc_profile" not in shown.info

    @pytest.mark.parametrize("brand", [b"heic", b"mif1"])
    def test_brands(self, brand: bytes) -> None:
        """HEIC and HEIF are two names of it."""
        data = made("HEIF")
        assert data[8:12] == b"heic"
        assert decode(data[:8] + brand + data[12:]).media_type == "image/jpeg"

    def test_size_of_the_jpeg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """HEIC that keeps within the limits does not become JPEG that OpenClaw would refuse."""
        data = made("HEIF", noise(400, 300), quality=30)
        assert len(data) < 60_000
        assert len(decode(data).data) > 90_000
        monkeypatch.setattr(image_handler, "MAX_BYTES", 80_000)
        alone = decode(data)
        assert len(alone.data) <= 80_000
        assert PIL.Image.open(io.BytesIO(alone.data)).size == (400, 300)
        monkeypatch.setattr(image_handler, "MAX_BYTES", MAX_BYTES)
        monkeypatch.setattr(image_handler, "MAX_TOTAL", 160_000)
        assert sum(len(image.data) for image in image_handler.decode([encoded(data)] * 2)) <= 160_000

    def test_smaller_jpeg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where less quality is not enough the picture shrinks, yet not below 1,024 pixels."""
        for image, least, most in (
            (noise(4096, 64), 1024, 2048),
            (PIL.Image.new("RGB", (4096, 64)), 1024, 1024),
        ):
            data = made("HEIF", image, quality=10)
            monkeypatch.setattr(image_handler, "MAX_BYTES", len(data))
            assert least <= PIL.Image.open(io.BytesIO(decode(data).data)).width <= most


class TestContentPart:
    def test_shape(self) -> None:
        """The gateway gets a data URL of the bytes as they are stored."""
        image = decode(made("WEBP"))
        assert image_handler.content_part(image) == {
            "type": "image_url",
            "image_url": {"url": f"data:image/webp;base64,{encoded(image.data)}"},
        }


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", b"secret")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestStore:
    def test_life_of_a_picture(self, store: ImageStore, tmp_path: Path) -> None:
        """Staged, published, read, and gone with its session; another session's copy stays."""
        images = [decode(made(kind)) for kind in (*FORMATS, "HEIF")]
        staged = store.stage(images)
        assert len(files(tmp_path / "images/incoming")) == 5
        names = store.publish(SESSION, staged)
        assert names == [f"{SESSION}/{image.digest}.{image.extension}" for image in images]
        assert files(tmp_path / "images") == set(names)
        assert [store.load(name) for name in names] == images
        assert {(tmp_path / "images" / name).stat().st_mode & 0o777 for name in names} == {0o600}
        [copy] = store.publish(OTHER, store.stage(images[:1]))
        store.remove_session(SESSION)
        store.remove_session(SESSION)
        assert files(tmp_path / "images") == {copy}

    def test_same_picture_again(self, store: ImageStore, tmp_path: Path) -> None:
        """The same picture, twice in a message and once more later, is one file of its session."""
        image = decode(made("PNG"))
        names = store.publish(SESSION, store.stage([image, image]))
        names += store.publish(SESSION, store.stage([image]))
        assert len(names) == 3
        assert files(tmp_path / "images") == set(names)

    def test_discard(self, store: ImageStore, tmp_path: Path) -> None:
        """What was not published goes; what was published stays; once more does nothing."""
        kept, dropped = store.stage([decode(made("PNG")), decode(made("GIF"))])
        [name] = store.publish(SESSION, [kept])
        for staged in (kept, dropped, dropped):
            staged.discard()
        assert files(tmp_path / "images") == {name}

    def test_disk_that_fails(self, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the second of three cannot be written, none is left behind."""
        write, count = file_utils.write_atomic, 0

        def fail(target: Path, data: bytes, mode: int = 0o644) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise errors.Unavailable("full", code="disk_unavailable")
            write(target, data, mode)

        monkeypatch.setattr(file_utils, "write_atomic", fail)
        with pytest.raises(errors.Unavailable):
            store.stage([decode(made("PNG"))] * 3)
        assert files(tmp_path) == set()

    @pytest.mark.parametrize(
        "file",
        [
            *("", "/etc/passwd", "../secret.jpg", f"{SESSION}/../x.jpg", f"{SESSION}", "incoming/" + "0" * 32),
            *(f"{SESSION}/{'0' * 64}.jpg", f"{SESSION}/{'0' * 64}.svg", f"{SESSION}/{'0' * 64}.jpg\n"),
            *(f"{SESSION.upper()}/{'0' * 64}.jpg", f"{SESSION}/{'0' * 63}.jpg", f"{SESSION}/{'0' * 64}.jpg\0"),
        ],
    )
    def test_names(self, store: ImageStore, file: str) -> None:
        """A name that is not of our making, or of no file, is not found."""
        store.publish(SESSION, store.stage([decode(made("PNG"))]))
        with pytest.raises(errors.NotFound) as caught:
            store.load(file)
        assert caught.value.code == "image_not_found"

    @pytest.mark.parametrize("key", ["", ".", "..", "incoming", "../other", f"{SESSION}/..", "x"])
    def test_session_keys(self, store: ImageStore, tmp_path: Path, key: str) -> None:
        """A key that is no UUID, as old sessions may have, has a folder of its own like any other, and touches
        nothing else."""
        (tmp_path / "other").mkdir()
        (tmp_path / "other/file").write_bytes(b"")
        [one] = store.publish(SESSION, store.stage([decode(made("PNG"))]))
        before = files(tmp_path)
        [name] = store.publish(key, store.stage([decode(made("PNG"))]))
        assert name != one
        assert store.load(name) == store.load(one)
        store.remove_session(key)
        assert files(tmp_path) == before

    def test_sweep(self, store: ImageStore, tmp_path: Path) -> None:
        """What a crash left goes, what is just being stored and what was published stays."""
        store.sweep(older_than=3600)
        image = decode(made("PNG"))
        [name] = store.publish(SESSION, store.stage([image]))
        old, young = store.stage([image, image])
        half = tmp_path / f"images/incoming/.clawd-{'0' * 32}.tmp"
        half.write_bytes(b"half")
        for path in (old.path, half, tmp_path / "images" / name):
            os.utime(path, (time.time() - 4000, time.time() - 4000))
        store.sweep(older_than=3600)
        assert files(tmp_path / "images") == {name, f"incoming/{young.path.name}"}

    def test_sweep_beside_another_worker(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image that another worker publishes while we look at it is no error."""
        store.stage([decode(made("PNG"))])
        monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "published-meanwhile"]))
        store.sweep(older_than=0)

    def test_linked_root(self, tmp_path: Path) -> None:
        """The operator may put the pictures on another disk with a link."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "images").symlink_to(tmp_path / "disk")
        store = ImageStore(tmp_path / "images", b"secret")
        image = decode(made("PNG"))
        [name] = store.publish(SESSION, store.stage([image]))
        assert store.load(name) == image
        assert files(tmp_path / "disk") == {name}


FILE = f"{SESSION}/{'0' * 64}.png"


def parts(url: str) -> tuple[int, str, str, str]:
    """Image id, extension, expiry and signature of a URL."""
    split = urlsplit(url)
    name, _, extension = split.path.removeprefix("/images/").partition(".")
    query = parse_qs(split.query, strict_parsing=True)
    return int(name), extension, query["expires"][0], query["signature"][0]


class TestUrl:
    def test_verifies(self, store: ImageStore) -> None:
        """A signed URL is accepted, with its expiry as text or number."""
        image_id, extension, expires, signature = parts(store.sign(7, FILE, NOW))
        assert (image_id, extension) == (7, "png")
        store.verify(7, "png", expires, signature, NOW)
        store.verify(7, "png", int(expires), signature, NOW)

    @pytest.mark.parametrize("moment", [0, 1, DAY // 2, DAY - 1, DAY - 0.001, DAY])
    def test_life(self, store: ImageStore, moment: float) -> None:
        """It holds for at least 24 hours and at most 48."""
        now = NOW // DAY * DAY + moment
        image_id, extension, expires, signature = parts(store.sign(7, FILE, now))
        assert DAY <= int(expires) - now <= 2 * DAY
        store.verify(image_id, extension, expires, signature, now + DAY - 0.001)
        with pytest.raises(errors.NotFound) as caught:
            store.verify(image_id, extension, expires, signature, int(expires))
        assert caught.value.code == "image_not_found"

    def test_stays_the_same(self, store: ImageStore) -> None:
        """The URL is the same all day, so that browsers keep the picture, and another one the day after."""
        midnight = NOW // DAY * DAY
        urls = {store.sign(7, FILE, midnight + hour * 3600) for hour in range(24)}
        assert len(urls) == 1
        assert store.sign(7, FILE, midnight + DAY) not in urls

    @pytest.mark.parametrize(
        "change",
        [
            *({"image_id": 8}, {"image_id": -7}, {"extension": "jpg"}, {"extension": ""}, {"extension": "png?"}),
            *({"signature": ""}, {"signature": "0" * 32}, {"signature": "é"}, {"signature": "\ud800"}),
            *({"expires": ""}, {"expires": "x"}, {"expires": "9" * 5000}, {"expires": 2**63}, {"expires": "\ud800"}),
            *({"expires": "1_0"}, {"expires": "-1"}, {"expires": "\uff11"}),
        ],
    )
    def test_tampered(self, store: ImageStore, change: dict[str, Any]) -> None:
        """Whatever part is changed, to whatever nonsense, there is no such image."""
        image_id, extension, expires, signature = parts(store.sign(7, FILE, NOW))
        given = {"image_id": image_id, "extension": extension, "expires": expires, "signature": signature}
        with pytest.raises(errors.NotFound) as caught:
            store.verify(**{**given, **change}, now=NOW)
        assert caught.value.code == "image_not_found"

    def test_every_character_counts(self, store: ImageStore) -> None:
        """A signature or expiry with one character changed, added or taken away is refused."""
        image_id, extension, expires, signature = parts(store.sign(7, FILE, NOW))
        for at in range(len(signature)):
            wrong = signature[:at] + ("1" if signature[at] == "0" else "0") + signature[at + 1 :]
            with pytest.raises(errors.NotFound):
                store.verify(image_id, extension, expires, wrong, NOW)
        for wrong in (f"0{expires}", f" {expires}", f"{expires} ", f"+{expires}", str(int(expires) + DAY)):
            with pytest.raises(errors.NotFound):
                store.verify(image_id, extension, wrong, signature, NOW)
        for wrong in (signature.upper(), signature + "0", signature[:-1]):
            with pytest.raises(errors.NotFound):
                store.verify(image_id, extension, expires, wrong, NOW)

    def test_key(self, store: ImageStore, tmp_path: Path) -> None:
        """Another secret signs otherwise, the same one after a restart alike."""
        again = ImageStore(tmp_path / "images", b"secret")
        other = ImageStore(tmp_path / "images", b"another secret")
        assert again.sign(7, FILE, NOW) == store.sign(7, FILE, NOW)
        with pytest.raises(errors.NotFound):
            other.verify(*parts(store.sign(7, FILE, NOW)), now=NOW)
        assert b"secret".hex() not in store.sign(7, FILE, NOW)
