"""Images as they come: modes, orientation, archives, damage; and the tiles cut from them."""

import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.config import ModelConfig, ScalerConfig, VisionConfig
from avg_llava_jax.data import images
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.images import ImageStore, image_ref, resized, to_rgb
from avg_llava_jax.data.tiles import best_resolution, make_tiles, placement

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG = ModelConfig()


def picture(width=6, height=4):
    """Every pixel of another colour."""
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 3
    return Image.fromarray(values)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(ref):
    return np.asarray(ref.load())


@pytest.mark.parametrize("kind", ["short", "long"])
@pytest.mark.parametrize("size", ["500x375", "672x336", "300x1000", "1000x1"])
def test_tiles_match_the_measured_pixels(size, kind):
    arrays = np.load(GOLDEN / f"infer_{size}_{kind}.npz")
    ref = ImageStore(GOLDEN / "images").ref(f"im_{size}.png")
    assert ref.size == tuple(arrays["image_sizes"][0])
    assert best_resolution(ref.size, CONFIG.pinpoints) == tuple(arrays["best_resolution"].ravel())
    tiles = make_tiles(ref.load(), CONFIG).astype(np.float64) / 255
    normal = ((tiles - CONFIG.vision.mean) / CONFIG.vision.std).transpose(0, 3, 1, 2)
    measured = arrays["pixel_values.0[:,:,::16,::16]"]
    first = 1 if size == "300x1000" else 0  # its overview was measured under Pillow 13: the next tests
    np.testing.assert_allclose(normal[first:, :, ::16, ::16], measured[first:], atol=1e-5, rtol=0)


def tall_noise():
    """6 x 20 pixels, black or white in each channel."""
    bits = np.arange(6 * 20 * 3, dtype=np.uint64) * 2654435761 >> 16 & 1
    return Image.fromarray((255 * bits).astype(np.uint8).reshape(20, 6, 3))


TALL_OVERVIEW = (  # tall_noise().resize((8, 8), BICUBIC) and resize((5, 16), BICUBIC), of Pillow 12.3
    "4559603f859f5d7fa2a04a5fba9e457cb3835296ad4559ba91a67669949972988da6ad595364ac8464789e7f6097a76e8857709b7a62"
    "91966e689b975e53a1968eab8e8c9b4e5077b1b3a2847d9a7e6281a46f5b91a36e6a939963738b77504e69a2b3966c748f6f7054a9ab"
    "835e7c9d7c6293986e70a696a6705793936b749d8b588ba7a9b0566f7b906c6292a269595276a6796383986c67a2925d6da19260699f"
    "7d70a7b4aead3a6059418c964c85b361479eb2584dad9b5281b181429ec5"
)
TALL_MOSAIC = (
    "00cd5d0682f99f1261e2c81d14d8eb6500a1a45d5bd9bd2621c2de5004affeb0016aff9522bcde650e9aff810021e3de3b2dc4c91c36"
    "ed950d49fdb54a02b5f66a096ce39326caff351adeff7e0065f19a2543dade3793b66d0148fbb0203cdfda43259af15b008aa2cc2edd"
    "e5431a97ee69096cf6b50255d5f6368ac9751263eec01a3fdee3210081ff610c9ec45e3bc3df3c04b0fbb0044fe4c31b65ff9a0c9af3"
    "81007ee3de1c1ac0e5632f9dc91236f6b60402b5fd6c0993ee931243d9bc2ecaff8a0081f19a0e43dabd3c21c3fb49906fb6043ddec2"
    "4326bdf0650f7eff74003bd8371dc8ee611274f98b0052ff"
)


def test_a_tall_picture_has_the_recorded_bytes_under_every_pillow():
    config = ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=2), pinpoints=((8, 16),), scaler=ScalerConfig(halvings=0)
    )
    tiles = make_tiles(tall_noise(), config)
    assert tiles[0].tobytes().hex() == TALL_OVERVIEW
    assert placement((6, 20), (8, 16)) == (1, 0, 5, 16)
    mosaic = tiles[1:].reshape(16, 8, 3)
    assert mosaic[:, 1:6].tobytes().hex() == TALL_MOSAIC
    assert not mosaic[:, [0, 6, 7]].any()


def test_the_other_order_of_the_axes_shows():
    """What Pillow 13 makes of a tall picture in one call, with either release: up to 20 levels away."""
    for size, recorded in (((8, 8), TALL_OVERVIEW), ((5, 16), TALL_MOSAIC)):
        picture, width, height = tall_noise(), *size
        ours = np.asarray(resized(picture, size)).astype(int)
        other = picture.resize((picture.width, height), Image.Resampling.BICUBIC)
        other = np.asarray(other.resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert ours.astype(np.uint8).tobytes().hex() == recorded
        assert 10 < np.abs(ours - other).max() <= 20, (width, height)


def test_tiles_are_the_mosaic_row_major():
    config = ModelConfig(vision=VisionConfig(image_size=14), pinpoints=((28, 28),), scaler=ScalerConfig(halvings=0))
    image = picture(28, 28)
    tiles = make_tiles(image, config)
    assert tiles.dtype == np.uint8 and tiles.shape == (5, 14, 14, 3)
    whole = np.asarray(image)
    for tile, (y, x) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14)], start=1):
        np.testing.assert_array_equal(tiles[tile], whole[y : y + 14, x : x + 14])


def test_placement_centres_and_rounds_up():
    assert placement((640, 480), (672, 672)) == (0, 84, 672, 504)
    assert placement((500, 375), (672, 672)) == (0, 83, 672, 505)  # rounding of the released code
    assert placement((1000, 1), (1008, 336)) == (0, 167, 1008, 2)
    assert placement((1, 1000), (336, 1008)) == (167, 0, 2, 1008)


@pytest.mark.parametrize("pinpoint", [(336, 672), (672, 336)])
def test_ties_go_to_the_first_pinpoint(pinpoint):
    others = tuple(p for p in CONFIG.pinpoints if p != pinpoint)
    assert best_resolution((336, 336), (pinpoint, *others)) == pinpoint
    assert best_resolution((1, 1), (pinpoint, *others)) == pinpoint


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(format, orientation, tmp_path):
    image = picture(32, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[format]
    path = tmp_path / "image"
    path.write_bytes(encoded(image, format, exif=exif, **options))
    raw = np.asarray(image)
    upright = {
        1: raw,
        2: raw[:, ::-1],
        3: raw[::-1, ::-1],
        4: raw[::-1],
        5: raw.swapaxes(0, 1),
        6: raw.swapaxes(0, 1)[:, ::-1],
        7: raw.swapaxes(0, 1)[::-1, ::-1],
        8: raw.swapaxes(0, 1)[::-1],
    }[orientation]
    ref = image_ref(path)
    assert ref.size == upright.shape[1::-1]
    if format == "JPEG":
        assert pixels(ref).shape == upright.shape
        corners = np.ix_([0, -1], [0, -1])
        assert np.abs(pixels(ref)[corners].astype(int) - upright[corners]).max() < 60
    else:
        np.testing.assert_array_equal(pixels(ref), upright)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)
    expected = np.array([0, 0, 1, 1, 128, 255], np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], np.stack([expected] * 3, axis=-1))
    ref = image_ref(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels(ref)[0, :, 0], expected)
    pgm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(image_ref(pgm))[0, :, 0], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "F", "RGBa", "La"])
def test_every_mode_becomes_rgb(mode):
    image = picture().convert("RGBA") if mode in ("RGBa",) else picture()
    image = image.convert("LA") if mode == "La" else image
    rgb = to_rgb(image.convert(mode))
    assert rgb.mode == "RGB" and rgb.size == (6, 4)


def test_alpha_is_dropped_as_in_the_released_code():
    values = np.zeros((2, 2, 4), np.uint8)
    values[..., 0], values[..., 3] = 200, [[0, 255], [128, 1]]
    np.testing.assert_array_equal(pixels(image_ref(encoded(Image.fromarray(values)))), values[..., :3])


def test_a_palette_with_transparency_keeps_its_colours(recwarn):
    image = picture().quantize(16)
    expected = np.asarray(image.convert("RGB"))
    for transparency in (3, bytes(range(16))):
        np.testing.assert_array_equal(pixels(image_ref(encoded(image, transparency=transparency))), expected)
    assert not recwarn


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(image_ref(encoded(image, "JPEG", quality=100)))[4, 4]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    ref = image_ref(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels(ref)[0, 0].tolist() == [255, 0, 0]


def test_an_image_in_memory_is_left_alone():
    image = picture()
    ref = image_ref(image)
    ref.load().putpixel((0, 0), (9, 9, 9))
    assert ref.size == (6, 4) and image.getpixel((0, 0)) == (0, 3, 6)


def test_size_reads_the_header_only(tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(encoded(Image.effect_noise((300, 200), 90))[:2000])
    assert image_ref(path).size == (300, 200)
    with pytest.raises(BadSample, match="half.png") as error:
        image_ref(path).load()
    assert error.value.reason == "corrupt_image"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_anywhere_is_one_clear_error(format, tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), format)
    path = tmp_path / f"damaged.{format.lower()}"
    for length in (0, 1, 7, 20, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BadSample, match="damaged") as error:
            image_ref(path).load()
        assert error.value.reason == "corrupt_image"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_never_escapes(tmp_path):
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(picture(20, 20), format), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            at = rng.integers(0, len(whole), 4)
            broken[at] = rng.integers(0, 256, 4)
            ref = image_ref(broken.tobytes(), max_pixels=10_000)
            try:
                assert ref.load().size == ref.size
            except BadSample as error:
                assert error.reason in ("corrupt_image", "too_large_image")


def test_missing_and_not_an_image(tmp_path):
    with pytest.raises(BadSample, match="nowhere.png") as error:
        _ = image_ref(tmp_path / "nowhere.png").size
    assert error.value.reason == "missing_image"
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(BadSample, match="text.png.*not an image") as error:
        _ = image_ref(tmp_path / "text.png").size
    assert error.value.reason == "corrupt_image"


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_corrupt(size):
    ref = image_ref(Image.new("RGB", size))
    for use in (lambda: ref.size, ref.load):
        with pytest.raises(BadSample, match=f"image in memory: {size[0]} x {size[1]} is no pixel") as error:
            use()
        assert error.value.reason == "corrupt_image"


def test_the_pixel_bound_holds_before_decoding():
    content = encoded(Image.new("L", (300, 200)))
    assert image_ref(content, max_pixels=60_000).load().size == (300, 200)
    ref = image_ref(content[:100], max_pixels=59_999)  # the pixels are not even there
    for use in (lambda: ref.size, ref.load):
        with pytest.raises(BadSample, match="300 x 200 is over 59999 pixels") as error:
            use()
        assert error.value.reason == "too_large_image"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_too_large():
    bomb = b"P5 40000 40000 255\n"
    with pytest.raises(BadSample) as error:
        image_ref(bomb, max_pixels=10**12).load()
    assert error.value.reason == "too_large_image"
    with pytest.raises(BadSample):
        _ = image_ref(b"P5 12000 12000 255\n").size


@pytest.fixture
def stores(tmp_path):
    """The same images as a folder, a zip and a tar."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(8):
        picture(6 + number, 4).save(folder / "sub" / f"{number}.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, ".")
    return {
        kind: ImageStore(tmp_path / name)
        for kind, name in {"folder": "images", "zip": "images.zip", "tar": "images.tar"}.items()
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_stores(stores, kind):
    store = stores[kind]
    assert store.kind == kind
    for number in range(8):
        for ref in (store.ref(f"sub/{number}.png"), pickle.loads(pickle.dumps(store)).ref(f"./sub/{number}.png")):
            assert ref.size == (6 + number, 4)
            np.testing.assert_array_equal(pixels(ref), np.asarray(picture(6 + number, 4)))
    with pytest.raises(BadSample) as error:
        _ = store.ref("sub/9.png").size
    assert error.value.reason == "missing_image"


@pytest.fixture(params=["tar", "zip"])
def linked(request, tmp_path):
    """An archive of a folder with links: hard, symbolic, to a folder, in a circle, to what is not there."""
    folder = tmp_path / "linked"
    (folder / "sub").mkdir(parents=True)
    picture(7, 4).save(folder / "sub" / "a.png")
    os.link(folder / "sub" / "a.png", folder / "sub" / "hard.png")
    for link, target in {
        "soft.png": "sub/a.png",
        "sub/up.png": "../soft.png",
        "sub/hard_soft.png": "hard.png",
        "other": "sub",
        "circle.png": "circle2.png",
        "circle2.png": "circle.png",
        "gone.png": "nowhere.png",
        "out.png": "../linked/sub/a.png",
    }.items():
        (folder / link).symlink_to(target)
    archive = tmp_path / f"linked.{request.param}"
    if request.param == "tar":
        with tarfile.open(archive, "w") as file:
            file.add(folder, ".")
    else:
        with zipfile.ZipFile(archive, "w") as file:  # as `zip --symlinks` writes it
            for path in sorted(folder.rglob("*")):
                name = f"./{path.relative_to(folder)}"
                if path.is_symlink():
                    info = zipfile.ZipInfo(name)
                    info.create_system, info.external_attr = 3, 0o120777 << 16
                    file.writestr(info, os.readlink(path))
                else:
                    file.write(path, name)
    return folder, ImageStore(archive)


def test_links_in_an_archive_are_followed_as_in_a_folder(linked):
    folder, store = linked
    links = ("sub/hard.png", "soft.png", "sub/up.png", "sub/hard_soft.png", "other/a.png", "other/up.png")
    for name in ("sub/a.png", "./sub//a.png", "sub/../sub/a.png", *links):
        np.testing.assert_array_equal(pixels(store.ref(name)), pixels(ImageStore(folder).ref(name)))
    for name, message in {
        "circle.png": "has no member circle.png: it is a link to circle2.png",
        "gone.png": "it is a link to nowhere.png",
        "out.png": "it is a link to ../linked/sub/a.png",
        "other/b.png": "has no member other/b.png",
        "other": "has no member other",
        "sub": "has no member sub",
    }.items():
        with pytest.raises(BadSample, match=message) as error:
            store.ref(name)
        assert error.value.reason == "missing_image"


def test_a_tar_that_was_appended_to_has_the_last_file_of_a_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for width in (5, 7):
            (tmp_path / "a.png").write_bytes(encoded(picture(width, 4)))
            file.add(tmp_path / "a.png", "a.png")
    assert ImageStore(tmp_path / "a.tar").ref("a.png").size == (7, 4)


@pytest.mark.parametrize("damage", ["unknown method", "encrypted", "wrong checksum", "broken lzma"])
def test_a_member_that_cannot_be_unpacked_is_named(tmp_path, damage):
    path = tmp_path / "im.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA if "lzma" in damage else zipfile.ZIP_STORED) as file:
        for number in range(3):
            file.writestr(f"{number}.png", encoded(picture()))
        info = file.infolist()[1]
        if damage == "unknown method":
            info.compress_type = 9  # Deflate64, as Windows' Explorer writes it
        if damage == "encrypted":
            info.flag_bits |= 1
        if damage == "wrong checksum":
            info.CRC ^= 1
    if damage == "encrypted":  # the header in front of the member says so too
        content = bytearray(path.read_bytes())
        content[info.header_offset + 6] |= 1
        path.write_bytes(content)
    if damage == "broken lzma":
        content = bytearray(path.read_bytes())
        at = info.header_offset + 30 + len(info.filename) + 20
        content[at : at + 20] = bytes(20)
        path.write_bytes(content)
    store = ImageStore(path)
    for use in (lambda: store.ref("1.png").size, store.ref("1.png").load):
        with pytest.raises(BadSample, match=r"im\.zip:1\.png") as error:
            use()
        assert error.value.reason == "corrupt_image" and "\n" not in str(error.value)
    assert store.ref("0.png").size == store.ref("2.png").size == (6, 4)


def test_a_dds_of_an_unknown_kind_is_named(tmp_path):
    content = bytearray(encoded(picture(8, 8), "DDS"))
    content[80:88] = b"\4\0\0\0ABCD"
    (tmp_path / "a.dds").write_bytes(content)
    with pytest.raises(BadSample, match=r"a\.dds: .*") as error:
        image_ref(tmp_path / "a.dds").load()
    assert error.value.reason == "corrupt_image"


def chunk(name, data, sound=True):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ (not sound))


def segment(kind, data):
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


TURNED = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)  # EXIF: orientation 6
METADATA = {  # what Pillow refuses, or asks of EXIF and cannot read: PNG chunks, and JPEG segments
    "PNG": {
        "exif": chunk(b"eXIf", b"junkjunk"),
        "exif in text": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  5\nzzzz"),
        "long text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
        "profile": chunk(b"iCCP", b"x"),
        "checksum": chunk(b"tEXt", b"a\0b", sound=False),
        "gamma": chunk(b"gAMA", b"\0"),
        "resolution": chunk(b"pHYs", b"\0"),
        "animation": chunk(b"fcTL", b"\0\0\0"),
        "transparency": chunk(b"tRNS", b"\0"),
    },
    "JPEG": {
        "exif": segment(0xE1, b"Exif\0\0junk"),
        "profile": segment(0xE2, b"ICC_PROFILE\0"),
        "adobe": segment(0xEE, b"Adobe"),
        "jfif": segment(0xE0, b"JFIF"),
        "pictures": segment(0xE2, b"MPF\0junkjunk"),
    },
}
CASES = [(format, name) for format, blocks in METADATA.items() for name in blocks]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("format", "name"), CASES)
def test_metadata_do_not_decide_whether_pixels_are_read(format, name, turned):
    """A block of nonsense in front of the pixels and, in a PNG, behind them; EXIF that is sound still counts."""
    sound, block = encoded(picture(32, 16), format), METADATA[format][name]
    expected, front = pixels(image_ref(sound)), 33 if format == "PNG" else 2
    exif = b""
    if turned and "exif" not in name:
        expected = np.rot90(expected, -1)
        exif = chunk(b"eXIf", TURNED) if format == "PNG" else segment(0xE1, b"Exif\0\0" + TURNED)
    places = [front] if format == "JPEG" else [front, len(sound) - 12]
    for place in places:
        content = sound[:front] + exif + sound[front:place] + block + sound[place:]
        ref = image_ref(content)
        np.testing.assert_array_equal(pixels(ref), expected)
        assert ref.size == expected.shape[1::-1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_exif_block_of_nonsense(format):
    for exif in (
        b"junkjunk",
        b"Exif\0\0junk",
        b"II*\0\xff\xff\xff\xff",
        TURNED.replace(b"\x12\x01\3", b"\x12\x01\x63"),
    ):
        content = encoded(picture(32, 16), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
        assert image_ref(content).size == image_ref(content).load().size == (32, 16)


def sums(refs):
    return [int(pixels(ref).astype(int).sum()) for ref in refs]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_references_work_in_other_processes(stores, kind, method):
    refs = [stores[kind].ref(f"sub/{number}.png") for number in range(8)]
    expected = sums(refs)  # opened here first: a fork inherits the handle
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(sums, [refs] * 4) == [expected] * 4


def archives_opened(ref):
    before = images._zip.cache_info().misses
    ref.load()
    return images._zip.cache_info().misses - before


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_opens_the_archive_itself(stores):
    ref = stores["zip"].ref("sub/0.png")
    ref.load()
    assert archives_opened(ref) == 0
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(archives_opened, [ref]) == 1  # the parent's handle shares its file position


def test_stores_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageStore(tmp_path / "nowhere")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="images.tar.gz.*compressed tar"):
        ImageStore(tmp_path / "images.tar.gz")


def test_an_archive_whose_directory_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture(5, 4)))
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"PK\x01\x02", b"PK??"))
    with pytest.raises(ValueError, match=r"a\.zip: its directory is damaged .*: copy or pack it again"):
        ImageStore(tmp_path / "a.zip")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_is_cut_is_said_to_be(tmp_path, kind):
    """As a copy that was interrupted leaves it: not some other kind of file."""
    path, content = tmp_path / f"a.{kind}", encoded(picture(200, 200))
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("a.png", "b.png"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", content)
    header = 512 if kind == "tar" else 0
    path.write_bytes(path.read_bytes()[: header + len(content) // 2])
    with pytest.raises(ValueError, match=rf"a\.{kind}: .* damaged .*: copy or pack it again"):
        ImageStore(path)


def test_a_zip_of_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sub\\a.png", encoded(picture(5, 4)))
    store = ImageStore(tmp_path / "a.zip")
    assert store.ref("sub/a.png").size == store.ref("sub\\a.png").size == (5, 4)


def test_a_member_with_holes_is_refused(tmp_path):
    """`tar --sparse` leaves out runs of zeros: the bytes that follow belong to other members."""
    content = encoded(picture(5, 4))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in (("holes.png", tarfile.GNUTYPE_SPARSE), ("whole.png", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            archive.addfile(info, io.BytesIO(content))
    assert ImageStore(tmp_path / "a.tar").ref("whole.png").load().size == (5, 4)
    with pytest.raises(BadSample, match=r"holes\.png is stored with holes: pack it without --sparse"):
        ImageStore(tmp_path / "a.tar").ref("holes.png")
