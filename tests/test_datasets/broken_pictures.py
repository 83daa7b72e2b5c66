"""Thirty and more kinds of broken or odd pictures and label pictures, each with the kind that must be found."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
#: 12,000 x 12,000 pixels in 19 kB: above the limit of 100 million.
BOMB_SIDE = 12_000


def picture(seed=0, width=WIDTH, height=HEIGHT):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def labels(highest=10):
    return np.arange(WIDTH * HEIGHT, dtype=np.int64).reshape(HEIGHT, WIDTH) % (highest + 1)


def _bytes(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _jpeg(**options):
    return _bytes(picture(), "JPEG", quality=95, **options)


def _png(image=None):
    return _bytes(image or picture(), "PNG")


def _exif(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_by_hand(width, height, depth, colours, content):
    """A PNG file of its parts; ``content`` is what is compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(content, 9)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bomb():
    return png_by_hand(BOMB_SIDE, BOMB_SIDE, 1, 0, (b"\0" + bytes(BOMB_SIDE // 8)) * BOMB_SIDE)


def _flipped(content):
    place = content.index(b"IDAT") + 40
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def _frames(kind):
    return _bytes(picture(), kind, save_all=True, append_images=[picture(1), picture(2)])


def _sixteen_bit_colours():
    row = b"\0" + bytes(range(256))[: WIDTH * 2] * 3
    return png_by_hand(WIDTH, HEIGHT, 16, 2, row * HEIGHT)


def _numbers(array, mode=None):
    return _png(Image.fromarray(array.astype(np.uint8), mode) if mode else Image.fromarray(array))


def _tiff(array):
    return _bytes(Image.fromarray(array), "TIFF")


def _palette():
    image = Image.fromarray(labels().astype(np.uint8), "P")
    image.putpalette(list(range(256)) * 3)
    return _png(image)


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
#: What stands in the place of a picture: bytes, None for nothing, "folder" and "link" for these.
PICTURES = [
    ("cut jpeg", lambda: _jpeg()[:-1500], "image-cut"),
    ("jpeg of a header", lambda: _jpeg()[:100], "image-cut"),
    ("cut progressive jpeg", lambda: _jpeg(progressive=True)[:2500], "image-cut"),
    ("cut png", lambda: _png()[:-3000], "image-cut"),
    ("png with a wrong byte", lambda: _flipped(_png()), "image-cut"),
    ("0 bytes", lambda: b"", "image-empty"),
    ("text", lambda: b"this is no picture", "image-unreadable"),
    ("web page", lambda: b"<!DOCTYPE html><html><body>404</body></html>", "image-unreadable"),
    ("pointer of git-lfs", lambda: _LFS, "image-unreadable"),
    ("zip", lambda: b"PK\x03\x04" + bytes(500), "image-unreadable"),
    ("noise", lambda: np.random.default_rng(0).bytes(3000), "image-unreadable"),
    ("zeros", lambda: bytes(5000), "image-unreadable"),
    ("nothing", lambda: None, "image-missing"),
    ("folder", lambda: "folder", "image-missing"),
    ("dangling link", lambda: "link", "image-missing"),
    ("cmyk", lambda: _bytes(picture().convert("CMYK"), "JPEG"), "image-cmyk"),
    ("16 bit grey", lambda: _numbers(labels().astype(np.uint16) * 50), "image-16-bit"),
    ("16 bit colours", _sixteen_bit_colours, "image-16-bit"),
    ("animated gif", lambda: _frames("GIF"), "image-animated"),
    ("animated png", lambda: _frames("PNG"), "image-animated"),
    ("animated webp", lambda: _frames("WEBP"), "image-animated"),
    ("turned by EXIF", lambda: _jpeg(exif=_exif(6)), "image-turned"),
    ("mirrored by EXIF", lambda: _jpeg(exif=_exif(2)), "image-turned"),
    ("bomb", _bomb, "image-too-large"),
    ("bomb with nothing in it", lambda: png_by_hand(60_000, 60_000, 8, 2, b"\0"), "image-too-large"),
    ("format of an editor", lambda: _bytes(picture(), "PCX"), "image-unreadable"),
]
LABELS = [
    ("no labels", lambda: None, "label-missing"),
    ("labels of 0 bytes", lambda: b"", "label-unreadable"),
    ("labels a text", lambda: b"1 2 3", "label-unreadable"),
    ("labels cut", lambda: _numbers(np.random.default_rng(0).integers(0, 9, (HEIGHT, WIDTH), np.uint8))[:-300],
     "label-unreadable"),
    ("labels with a wrong byte", lambda: _flipped(_numbers(labels().astype(np.uint8))), "label-unreadable"),
    ("labels in colours", lambda: _png(), "label-colours"),
    ("labels with transparency", lambda: _png(picture().convert("RGBA")), "label-colours"),
    ("labels grey with transparency", lambda: _png(picture().convert("LA")), "label-colours"),
    ("labels with a palette", _palette, "label-palette"),
    ("labels too high", lambda: _numbers(labels(11).astype(np.uint8)), "label-range"),
    ("labels of 16 bits too high", lambda: _numbers((labels() + 256).astype(np.uint16)), "label-range"),
    ("labels of 32 bits negative", lambda: _tiff((labels() - 1).astype(np.int32)), "label-range"),
    ("labels of fractions", lambda: _tiff(labels().astype(np.float32) / 2), "label-range"),
    ("labels as jpeg", lambda: _bytes(Image.fromarray(labels().astype(np.uint8) * 20), "JPEG"), "label-range"),
    ("labels of another size", lambda: _numbers(labels()[:-1].astype(np.uint8)), "label-size"),
    ("labels turned", lambda: _numbers(labels().T.astype(np.uint8)), "label-size"),
    ("labels a bomb", _bomb, "image-too-large"),
]  # fmt: skip


def place(path, content):
    """Put a broken file, or what is to stand there, at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to("gone")
    elif content is not None:
        path.write_bytes(content)


def good_pair(root, name):
    """Write a sound picture and its label picture."""
    for folder in ("images", "labels"):
        Path(root, folder).mkdir(parents=True, exist_ok=True)
    picture().save(Path(root, "images", f"{name}.jpg"))
    Image.fromarray(labels().astype(np.uint8)).save(Path(root, "labels", f"{name}.png"))


def main():
    """Look at all of them in the folder of the first argument, and print the number of findings and the memory."""
    from peak_memory import peak_kibibytes  # beside this file, which is run as a program

    from mmvmamba.datasets.checks import LabelRule, look_at_labels, look_at_picture
    from mmvmamba.datasets.checks.pictures import own_pixel_limit

    found = 0
    with own_pixel_limit():
        for index, (_, make, _) in enumerate([*PICTURES, *LABELS]):
            path = Path(sys.argv[1], str(index), "x.jpg")
            place(path, make())
            seen = look_at_picture(path) if index < len(PICTURES) else look_at_labels(path, LabelRule(10), None)
            found += len(seen.problems)
    print(found, peak_kibibytes())


if __name__ == "__main__":
    main()
