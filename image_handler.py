"""Images: recognized by their bytes, limited in size, stored under their SHA-256, served under signed URLs."""

import base64
import hashlib
import hmac
import io
import re
import secrets
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pillow_heif

import errors
import file_utils

# The first three limits are also OpenClaw's (docs/gateway/openai-http-api.md in its repository).
MAX_IMAGES = 8  # images of a message
MAX_BYTES = 10 * 1024 * 1024  # bytes of an image
MAX_TOTAL = 20 * 1024 * 1024  # bytes of all images of a message
MAX_PIXELS = 64 * 1024 * 1024  # of one frame; decoding that many takes 260 MB of memory, in a WebP 1 GB
MAX_WORK = 16 * MAX_PIXELS  # pixels of all frames, or of all scans of a JPEG: about 10, each over all its pixels
MAX_SEGMENTS = 1000  # of a JPEG; 2.6 million empty segments fit in 10 MB and cost Pillow 16 s and 700 MB
MAX_PROFILE = 64 * 1024  # bytes of a color profile; that of a display has less than 4 KB

_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "HEIF": "jpg"}
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "HEIF": re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL),
}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # without those that occur inside a scan's data
_DATA_URL = re.compile(r"\s*data:[^,]{0,255};\s*base64\s*,", re.IGNORECASE)
_WEB_URL = re.compile(r"\s*https?:", re.IGNORECASE)
_SESSION_KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE = re.compile(rf"{_SESSION_KEY.pattern}/[0-9a-f]{{64}}\.(jpg|png|gif|webp)")
_DAY = 86_400  # seconds

pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a type that every browser shows: its bytes, their media type, their SHA-256 in hexadecimal."""

    data: bytes
    media_type: str
    digest: str

    @property
    def extension(self) -> str:
        """`jpg`, `png`, `gif` or `webp`."""
        return next(ext for ext, media_type in _MEDIA_TYPES.items() if media_type == self.media_type)


@dataclass(frozen=True, slots=True)
class Staged:
    """An image that is synced to disk and does not belong to a message yet."""

    image: Image
    path: Path

    def discard(self) -> None:
        """Removes the file. Does nothing if it was published."""
        file_utils.remove_tree(self.path)


def decode(sources: Sequence[str]) -> list[Image]:
    """Decodes the images of a message from base64, with or without a `data:` prefix, whose media type is ignored.

    JPEG, PNG, GIF and WebP keep their bytes; HEIC is converted to JPEG. Raises errors.TooLarge (`image_too_large`),
    errors.Unsupported (`unsupported_image`: another type), errors.Invalid (`invalid_image`: cannot be decoded).
    """
    count = len(sources)
    if count > MAX_IMAGES:
        raise _too_large(f"A message may have at most {MAX_IMAGES} images, not {count}. Send the rest in another one")
    labels = [f"Image {number} of {count}" if count > 1 else "The image" for number in range(1, count + 1)]
    pictures = [_bytes(source, label) for source, label in zip(sources, labels, strict=True)]
    total = sum(map(len, pictures))
    if total > MAX_TOTAL:
        raise _too_large("The images of a message may have at most 20 MB together. Send some of them in another one")
    return [
        _image(data, label, budget=min(MAX_BYTES, len(data) * MAX_TOTAL // total))
        for data, label in zip(pictures, labels, strict=True)
    ]


def content_part(image: Image) -> dict[str, object]:
    """Returns the image as an OpenAI content part, in the form that OpenClaw accepts."""
    url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class ImageStore:
    """The images on disk, as `<session_key>/<sha256>.<extension>` below a root, and their signed URLs."""

    def __init__(self, root: Path, secret: bytes) -> None:
        """`secret` is the key from which the key for URLs is derived."""
        self._root = root.resolve()  # may be a link to another disk, which `file_utils.read_file` would refuse
        self._incoming = self._root / "incoming"
        self._key = hmac.digest(secret, b"image-url", "sha256")

    def stage(self, images: Sequence[Image]) -> list[Staged]:
        """Writes images to disk, all or none, before their message exists. Raises errors.Unavailable."""
        staged: list[Staged] = []
        try:
            for image in images:
                staged.append(Staged(image, self._incoming / secrets.token_hex(16)))
                file_utils.write_atomic(staged[-1].path, image.data, 0o600)
        except errors.AppError:
            for one in staged:
                one.discard()
            raise
        return staged

    def publish(self, session_key: str, staged: Sequence[Staged]) -> list[str]:
        """Renames staged images into a session's folder.

        Returns their names, as `load` takes them, in the same order. Raises errors.Unavailable.
        """
        files = [f"{_folder(session_key)}/{one.image.digest}.{one.image.extension}" for one in staged]
        for one, file in zip(staged, files, strict=True):
            file_utils.move(one.path, self._root / file)
        return files

    def save(self, session_key: str, images: Sequence[Image]) -> list[str]:
        """Stages and publishes images; returns their names. Raises errors.Unavailable."""
        staged = self.stage(images)
        try:
            return self.publish(session_key, staged)
        finally:
            for one in staged:
                one.discard()

    def exist(self, files: Sequence[str]) -> bool:
        """Returns True if all of these published images are on disk."""
        return all((self._root / file).exists() for file in files)

    def remove(self, files: Sequence[str]) -> None:
        """Removes published images, and their session's folder if nothing else is in it."""
        for file in files:
            path = self._root / file
            file_utils.remove_tree(path)
            with suppress(OSError):  # other images are in it, or it is gone
                path.parent.rmdir()

    def adopt(self, session_key: str, source: str) -> tuple[str, bool] | None:
        """Stores an image of a legacy database, which is in base64.

        Returns its name, as `load` takes it, and whether the file has exactly the image's bytes; a HEIC is converted.
        Returns None if the source is not an image that `decode` accepts. Raises errors.Unavailable.
        """
        try:
            data = _bytes(source, "The image")
            image = _image(data, "The image", MAX_BYTES)
        except (errors.Invalid, errors.TooLarge, errors.Unsupported):
            return None
        return self.publish(session_key, self.stage([image]))[0], image.data == data

    def load(self, file: str) -> Image:
        """Reads a published image. Raises errors.NotFound (`image_not_found`), errors.Unavailable."""
        if not _FILE.fullmatch(file):
            raise _not_found()
        try:
            data = file_utils.read_file(self._root, file, MAX_BYTES)
        except errors.NotFound as error:
            raise _not_found() from error
        _, _, name = file.rpartition("/")
        digest, _, extension = name.partition(".")
        return Image(data, _MEDIA_TYPES[extension], digest)

    def remove_session(self, session_key: str) -> None:
        """Removes all images of a session, if it has any. Raises errors.Unavailable if something remains."""
        file_utils.remove_tree(self._root / _folder(session_key))

    def sweep(self, older_than: float) -> None:
        """Removes staged images that are older than `older_than` seconds, which a crash has left.

        A time that is as far ahead counts as old: the image was staged before the clock was set back.
        """
        if self._incoming.exists():
            for path in self._incoming.iterdir():
                with suppress(FileNotFoundError):  # another worker has published or removed it
                    if abs(time.time() - path.stat().st_mtime) > older_than:
                        file_utils.remove_tree(path)

    def sign(self, image_id: int, file: str, now: float) -> str:
        """Returns the path and query of an image's URL, which is valid for 24 to 48 hours.

        `now` is in Unix seconds. The URL stays the same until midnight UTC, so that browsers can cache the image.
        """
        extension = file.rpartition(".")[2]
        expires = str((int(now) // _DAY + 2) * _DAY)
        signature = self._signature(image_id, extension, expires)
        return f"/images/{image_id}.{extension}?expires={expires}&signature={signature}"

    def verify(self, image_id: int, extension: str, expires: str | int, signature: str, now: float) -> None:
        """Raises errors.NotFound (`image_not_found`) unless `sign` made this URL and it has not expired."""
        expected = self._signature(image_id, extension, str(expires))
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise _not_found()
        if int(expires) <= now:
            raise _not_found()

    def _signature(self, image_id: int, extension: str, expires: str) -> str:
        message = f"{image_id}.{extension}?expires={expires}".encode(errors="replace")
        return hmac.digest(self._key, message, "sha256").hex()[:32]  # 128 bits


def _folder(session_key: str) -> str:
    """Returns the name of a session's folder: the session key, or a UUID made of a legacy key that is not a UUID."""
    return session_key if _SESSION_KEY.fullmatch(session_key) else str(uuid.uuid5(uuid.NAMESPACE_OID, session_key))


def _too_large(message: str) -> errors.TooLarge:
    return errors.TooLarge(f"{message}.", code="image_too_large")


def _invalid(message: str) -> errors.Invalid:
    return errors.Invalid(f"{message}.", code="invalid_image")


def _not_found() -> errors.NotFound:
    message = "There is no such image, or its URL has expired. List the messages again for a new URL."
    return errors.NotFound(message, code="image_not_found")


def _bytes(source: str, label: str) -> bytes:
    """Decodes base64 in either alphabet, with or without line breaks and padding."""
    if _WEB_URL.match(source):
        raise _invalid(f"{label} is a URL, and the service downloads no images. Send the image's bytes in base64")
    if len(source) > MAX_BYTES * 3 // 2:  # base64 turns 3 bytes into 4 characters, with line breaks into up to 4.2
        raise _too_large(f"{label} is larger than 10 MB. Send a smaller one")
    prefix = _DATA_URL.match(source)
    text = "".join(source[prefix.end() if prefix else 0 :].split()).translate({ord("-"): "+", ord("_"): "/"})
    bare = text.rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    if len(bare) * 3 // 4 > MAX_BYTES:
        raise _too_large(f"{label} is larger than 10 MB. Send a smaller one")
    if not bare or text not in (bare, padded):
        raise _invalid(f"{label} is not valid base64. Send the image's bytes in base64")
    try:
        return base64.b64decode(padded, validate=True)
    except ValueError as error:
        raise _invalid(f"{label} is not valid base64. Send the image's bytes in base64") from error


def _image(data: bytes, label: str, budget: int) -> Image:
    kind = next((kind for kind, signature in _SIGNATURES.items() if signature.match(data)), None)
    if kind is None:
        message = f"{label} has a type that is not supported. Send JPEG, PNG, GIF, WebP or HEIC."
        raise errors.Unsupported(message, code="unsupported_image")
    with _decoding_errors(label):
        scans = _scans(data) if kind == "JPEG" else 1
        with PIL.Image.open(io.BytesIO(data), formats=[kind]) as picture:
            # Further images in a JPEG or HEIC do not count, because they are not decoded.
            frames = int(getattr(picture, "n_frames", 1)) if kind in ("PNG", "GIF", "WEBP") else 1
            pixels = picture.width * picture.height
            if pixels > MAX_PIXELS or pixels * scans * frames > MAX_WORK:
                raise _too_many_pixels(label)
            picture.verify()
        with PIL.Image.open(io.BytesIO(data), formats=[kind]) as picture:  # again, since `verify` consumes it
            picture.load()
            data = _jpeg(picture, budget) if kind == "HEIF" else data
    return Image(data, _MEDIA_TYPES[_EXTENSIONS[kind]], hashlib.sha256(data).hexdigest())


@contextmanager
def _decoding_errors(label: str) -> Iterator[None]:
    try:
        yield
    except (errors.AppError, MemoryError):
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(label) from error
    except Exception as error:  # decoders raise exceptions of any class on malicious bytes
        raise _invalid(f"{label} is damaged and cannot be decoded. Save it again and send the new file") from error


def _too_many_pixels(label: str) -> errors.TooLarge:
    return _too_large(f"{label} has more than 64 megapixels, or too many frames. Send a smaller one")


def _scans(data: bytes) -> int:
    """Returns the number of scans in a JPEG: how often its decoder goes over all pixels.

    Data after the JPEG's end, such as a video that a phone appends, does not count. Raises ValueError for a JPEG with
    more than MAX_SEGMENTS segments, which no program writes.
    """
    position = scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[0] == b"\xff\xd9":
            return scans
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise ValueError("too many segments")


def _jpeg(picture: PIL.Image.Image, budget: int) -> bytes:
    """Converts an image to a JPEG of at most `budget` bytes. pillow_heif has rotated it already, by HEIF's `irot`.

    A JPEG takes twice the bytes of a HEIC, but OpenClaw must accept every image that this service accepts. Reduces the
    image only as long as its longer side keeps 1,024 pixels; after that, the JPEG may exceed the budget.
    """
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    for quality in (90, 75, 60):
        data = _saved(picture, quality)
        if len(data) <= budget:
            return data
    while len(data) > budget and max(picture.size) >= 2048:
        picture = picture.reduce(2)
        data = _saved(picture, 60)
    return data


def _saved(picture: PIL.Image.Image, quality: int) -> bytes:
    """Encodes an image as JPEG with its color profile, but without EXIF data, which can reveal where it was taken."""
    profile = picture.info.get("icc_profile") or b""
    output = io.BytesIO()
    picture.save(output, "JPEG", quality=quality, icc_profile=profile if len(profile) <= MAX_PROFILE else None)
    return output.getvalue()
