"""Image handling: recognition by bytes, base64, limits, HEIC conversion, storage on disk, signed URLs."""

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

# image_handler turns this warning into an error, but pytest replaces the filters of the process with its own.
pytestmark = pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> PIL.Image.Image:
    """Returns an image whose top left quarter is red and the rest blue, so that tests can see its rotation."""
    image = PIL.Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height // 2))
    return image.convert(mode)


def made(kind: str, image: PIL.Image.Image | None = None, **options: Any) -> bytes:
    """Returns the bytes of an image in a format of Pillow."""
    output = io.BytesIO()
    (image or picture()).save(output, kind, **options)
    return output.getvalue()


def noise(width: int, height: int) -> PIL.Image.Image:
    """Returns an image of random pixels, which does not compress."""
    return PIL.Image.frombytes("RGB", (width, height), os.urandom(width * height * 3))


def padded_png(size: int, filling: int = 0) -> bytes:
    """Returns a PNG of exactly `size` bytes."""
    data = made("PNG")
    body = b"paDd" + bytes([filling]) * (size - len(data) - 12)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG whose header states a size and that has no pixels."""

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
    """Returns the message of the error that these sources raise. Checks its class and code."""
    with pytest.raises(kind) as caught:
        image_handler.decode([source if isinstance(source, str) else encoded(source) for source in sources])
    assert caught.value.code == code
    return caught.value.message


def corners(data: bytes) -> list[str]:
    """Returns the names of the corners that are red: top left, top right, bottom left, bottom right."""
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
        """An image of a type that browsers show keeps its exact bytes."""
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
        """Images in every color mode are accepted: black and white, gray, palette, transparent, CMYK."""
        for mode in modes:
            data = made(kind, picture(mode=mode))
            assert decode(data).data == data

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
    def test_animation(self, kind: str) -> None:
        """An animation keeps its exact bytes."""
        data = made(kind, save_all=True, append_images=[PIL.Image.new("RGB", (40, 30), "green")] * 3)
        assert decode(data).data == data

    @pytest.mark.parametrize("label", ["image/jpeg", "image/svg+xml", "text/html", "application/octet-stream", ""])
    def test_label_that_lies(self, label: str) -> None:
        """The bytes decide the type, not the media type in the data URL: browsers send HEIC as octet-stream."""
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
        """Bytes of another type are refused, whatever their media type says; the error names the accepted types."""
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
        """Data that begins like an image but is not an image is refused as damaged."""
        refusal(errors.Invalid, "invalid_image", data)

    @pytest.mark.parametrize("kind", [*FORMATS, "HEIF"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_truncated(self, kind: str, share: float) -> None:
        """A truncated image is refused, even if its header is complete."""
        data = made(kind, noise(100, 100))
        refusal(errors.Invalid, "invalid_image", data[: int(len(data) * share)])

    def test_damaged_png(self) -> None:
        """A PNG with one flipped bit, or without its end marker, is refused."""
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

    def test_html_after_an_image(self) -> None:
        """A valid image that is followed by HTML is accepted as an image and gets an image's media type."""
        data = made("GIF") + b"<script>alert(1)</script>"
        image = decode(data)
        assert (image.data, image.media_type) == (data, "image/gif")


class TestBase64:
    def test_ways_to_write_it(self) -> None:
        """Base64 is accepted with and without prefix, parameters, line breaks and padding, in both alphabets."""
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
    def test_invalid_base64(self, source: str) -> None:
        """A source that is not valid base64 is refused, and the error says to send base64."""
        assert "base64" in refusal(errors.Invalid, "invalid_image", source)

    @pytest.mark.parametrize("source", ["http://a.example/x.png", "HTTPS://a.example/x.png", "  https://a.example"])
    def test_link(self, source: str) -> None:
        """A URL is not downloaded, and the error says so."""
        assert "downloads no images" in refusal(errors.Invalid, "invalid_image", source)


class TestLimits:
    def test_count(self) -> None:
        """Eight images are accepted, in their order; nine are refused."""
        pictures = [padded_png(200 + number) for number in range(9)]
        images = image_handler.decode([encoded(data) for data in pictures[:8]])
        assert [image.data for image in images] == pictures[:8]
        assert "8" in refusal(errors.TooLarge, "image_too_large", *pictures)
        assert image_handler.decode([]) == []

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_bytes_of_one(self, kind: str) -> None:
        """An image of exactly 10 MB is accepted in every form of base64; one with a byte more is refused."""
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
        """Images of exactly 20 MB together are accepted; with one byte more they are refused."""
        whole = padded_png(MAX_TOTAL // 2), padded_png(MAX_TOTAL // 2 - 1000), padded_png(1000)
        assert len(image_handler.decode([encoded(data) for data in whole])) == 3
        assert "20 MB" in refusal(errors.TooLarge, "image_too_large", *whole[:2], padded_png(1001))

    def test_huge_string(self) -> None:
        """A string far over the limit is refused before it is decoded, without using memory."""
        source = "A" * (100 * 1024 * 1024)
        tracemalloc.start()
        try:
            refusal(errors.TooLarge, "image_too_large", source)
            assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
        finally:
            tracemalloc.stop()

    def test_largest_size(self) -> None:
        """An image of 64 megapixels is accepted."""
        data = made("PNG", PIL.Image.new("1", (8192, 8192)))
        assert decode(data).data == data

    @pytest.mark.parametrize("size", [(8192, 8193), (9000, 9000), (12000, 12000), (60_000, 60_000), (2**31 - 1, 2)])
    @pytest.mark.parametrize("warning", ["error", "ignore"])
    def test_pixels(self, size: tuple[int, int], warning: Any) -> None:
        """More than 64 megapixels in the header are refused before decoding, whether Pillow's warning raises or not."""
        with warnings.catch_warnings():
            warnings.simplefilter(warning, PIL.Image.DecompressionBombWarning)
            assert "megapixels" in refusal(errors.TooLarge, "image_too_large", png_header(*size))

    def test_bomb(self) -> None:
        """A few kilobytes that would decode to 81 megapixels are refused, in every type."""
        bomb = PIL.Image.new("1", (9000, 9000))
        for kind in FORMATS:
            options = {"quality": 0, "method": 0} if kind == "WEBP" else {}
            refusal(errors.TooLarge, "image_too_large", made(kind, bomb.convert("L"), **options))
        heic = made("HEIF", picture(64, 64)).replace(struct.pack(">II", 64, 64), struct.pack(">II", 9000, 9000))
        assert "megapixels" in refusal(errors.TooLarge, "image_too_large", heic)

    def test_frames(self) -> None:
        """An animation with 1,000 large frames in a few kilobytes is refused; one with 800 is accepted."""
        frame = PIL.Image.new("P", (1200, 1000))
        data = made("GIF", frame, save_all=True, append_images=[PIL.Image.new("P", (1200, 1000), 1)])
        second = data.index(b"\x21\xf9", data.index(b"\x2c"))
        data, last = data[:-1], data[second:-1]
        assert decode(data + last * 800 + b";").media_type == "image/gif"
        assert "frames" in refusal(errors.TooLarge, "image_too_large", data + last * 1000 + b";")

    def test_scans(self) -> None:
        """A JPEG with far too many scans is refused; a progressive one is accepted."""
        data = made("JPEG", PIL.Image.new("L", (8000, 8000)), progressive=True)
        assert decode(data).data == data
        scan = data[data.rindex(b"\xff\xda") : -2]
        refusal(errors.TooLarge, "image_too_large", data[:-2] + scan * 20 + data[-2:])

    def test_segments(self) -> None:
        """A JPEG with a million empty segments is refused; large segments and an appended video are accepted."""
        data = made("JPEG")
        refusal(errors.Invalid, "invalid_image", data[:2] + b"\xff\xe9\0\2" * 1_000_000 + data[2:])
        parts = (b"\xff\xe9\xff\xff" + b"\xff\xda" * 32_766 + b"\0") * 100
        film = b"\xff\xda\0\2" * 100_000
        photo = data[:2] + parts + data[2:] + film
        assert decode(photo).data == photo

    def test_which_one(self) -> None:
        """The error names which of several images is refused; for a single image it says "The image"."""
        good = made("PNG")
        assert "Image 2 of 3" in refusal(errors.Unsupported, "unsupported_image", good, b"text", good)
        assert "Image 3 of 3" in refusal(errors.Invalid, "invalid_image", good, good, "!")
        assert "Image 1 of 2" in refusal(errors.TooLarge, "image_too_large", png_header(9000, 9000), good)
        assert refusal(errors.Unsupported, "unsupported_image", b"text").startswith("The image has")


class TestHeic:
    def test_becomes_jpeg(self) -> None:
        """HEIC is converted to a JPEG, with the digest of the JPEG."""
        image = decode(made("HEIF"))
        assert (image.media_type, image.extension) == ("image/jpeg", "jpg")
        assert image.digest == hashlib.sha256(image.data).hexdigest()
        shown = PIL.Image.open(io.BytesIO(image.data))
        assert (shown.format, shown.size) == ("JPEG", (40, 30))
        assert corners(image.data) == ["top left"]

    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
    def test_modes(self, mode: str) -> None:
        """A HEIC that is gray, transparent or has 16 bits is converted to a JPEG."""
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
        """A rotated photo is turned upright exactly once, and its EXIF data is removed."""
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

    def test_color_profile(self) -> None:
        """The color profile is kept, since photos of phones look pale without it; one that is too large is removed."""
        profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
        shown = PIL.Image.open(io.BytesIO(decode(made("HEIF", icc_profile=profile)).data))
        assert shown.info["icc_profile"] == profile
        monstrous = profile + b"\0" * image_handler.MAX_PROFILE
        shown = PIL.Image.open(io.BytesIO(decode(made("HEIF", icc_profile=monstrous)).data))
        assert "icc_profile" not in shown.info

    @pytest.mark.parametrize("brand", [b"heic", b"mif1"])
    def test_brands(self, brand: bytes) -> None:
        """Both brands, of HEIC and of HEIF, are recognized."""
        data = made("HEIF")
        assert data[8:12] == b"heic"
        assert decode(data[:8] + brand + data[12:]).media_type == "image/jpeg"

    def test_size_of_the_jpeg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A HEIC within the limits is not converted to a JPEG over the limits, which OpenClaw would refuse."""
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
        """If a lower quality is not enough, the image is reduced, but not below 1,024 pixels."""
        for image, least, most in (
            (noise(4096, 64), 1024, 2048),
            (PIL.Image.new("RGB", (4096, 64)), 1024, 1024),
        ):
            data = made("HEIF", image, quality=10)
            monkeypatch.setattr(image_handler, "MAX_BYTES", len(data))
            assert least <= PIL.Image.open(io.BytesIO(decode(data).data)).width <= most


class TestContentPart:
    def test_shape(self) -> None:
        """The content part contains a data URL of the stored bytes."""
        image = decode(made("WEBP"))
        assert image_handler.content_part(image) == {
            "type": "image_url",
            "image_url": {"url": f"data:image/webp;base64,{encoded(image.data)}"},
        }


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """An empty store."""
    return ImageStore(tmp_path / "images", b"secret")


def files(folder: Path) -> set[str]:
    """Returns the relative paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestStore:
    def test_life_of_an_image(self, store: ImageStore, tmp_path: Path) -> None:
        """An image is staged, published, read, and removed with its session; another session's copy stays."""
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

    def test_same_image_again(self, store: ImageStore, tmp_path: Path) -> None:
        """The same image, twice in a message and again in a later one, is one file of its session."""
        image = decode(made("PNG"))
        names = store.publish(SESSION, store.stage([image, image]))
        names += store.publish(SESSION, store.stage([image]))
        assert len(names) == 3
        assert files(tmp_path / "images") == set(names)

    def test_discard(self, store: ImageStore, tmp_path: Path) -> None:
        """Discarding removes an image unless it was published; discarding it again does nothing."""
        kept, dropped = store.stage([decode(made("PNG")), decode(made("GIF"))])
        [name] = store.publish(SESSION, [kept])
        for staged in (kept, dropped, dropped):
            staged.discard()
        assert files(tmp_path / "images") == {name}

    def test_disk_that_fails(self, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the second of three images cannot be written, none remains."""
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
        """A name that `publish` never returns, or whose file does not exist, is not found."""
        store.publish(SESSION, store.stage([decode(made("PNG"))]))
        with pytest.raises(errors.NotFound) as caught:
            store.load(file)
        assert caught.value.code == "image_not_found"

    @pytest.mark.parametrize("key", ["", ".", "..", "incoming", "../other", f"{SESSION}/..", "x"])
    def test_session_keys(self, store: ImageStore, tmp_path: Path, key: str) -> None:
        """A session key that is not a UUID, as legacy sessions may have, gets its own folder and affects no other."""
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
        """A sweep removes old staged and temporary files; it keeps new staged files and published ones."""
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

    def test_sweep_next_to_another_worker(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sweep succeeds if another worker publishes an image during it."""
        store.stage([decode(made("PNG"))])
        monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "published-meanwhile"]))
        store.sweep(older_than=0)

    def test_linked_root(self, tmp_path: Path) -> None:
        """The root may be a symbolic link to a directory on another disk."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "images").symlink_to(tmp_path / "disk")
        store = ImageStore(tmp_path / "images", b"secret")
        image = decode(made("PNG"))
        [name] = store.publish(SESSION, store.stage([image]))
        assert store.load(name) == image
        assert files(tmp_path / "disk") == {name}


FILE = f"{SESSION}/{'0' * 64}.png"


def parts(url: str) -> tuple[int, str, str, str]:
    """Returns the image id, extension, expiry and signature of a URL."""
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
        """A URL is valid for at least 24 hours and at most 48."""
        now = NOW // DAY * DAY + moment
        image_id, extension, expires, signature = parts(store.sign(7, FILE, now))
        assert DAY <= int(expires) - now <= 2 * DAY
        store.verify(image_id, extension, expires, signature, now + DAY - 0.001)
        with pytest.raises(errors.NotFound) as caught:
            store.verify(image_id, extension, expires, signature, int(expires))
        assert caught.value.code == "image_not_found"

    def test_stays_the_same(self, store: ImageStore) -> None:
        """The URL is the same all day, so that browsers can cache the image, and differs on the next day."""
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
        """A URL in which any part was changed is not found."""
        image_id, extension, expires, signature = parts(store.sign(7, FILE, NOW))
        given = {"image_id": image_id, "extension": extension, "expires": expires, "signature": signature}
        with pytest.raises(errors.NotFound) as caught:
            store.verify(**{**given, **change}, now=NOW)
        assert caught.value.code == "image_not_found"

    def test_every_character_counts(self, store: ImageStore) -> None:
        """A signature or expiry with one character changed, added or removed is refused."""
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
        """The same secret makes the same URL after a restart; another secret makes a different one."""
        again = ImageStore(tmp_path / "images", b"secret")
        other = ImageStore(tmp_path / "images", b"another secret")
        assert again.sign(7, FILE, NOW) == store.sign(7, FILE, NOW)
        with pytest.raises(errors.NotFound):
            other.verify(*parts(store.sign(7, FILE, NOW)), now=NOW)
        assert b"secret".hex() not in store.sign(7, FILE, NOW)
