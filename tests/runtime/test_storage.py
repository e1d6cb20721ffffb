# SPDX-License-Identifier: Apache-2.0
"""Finding images and reading and writing where they lie: a folder, and the same folder as an object store's prefix."""

import sys

import numpy as np
import pytest
from PIL import Image

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.pipelines.find import find_images
from internimage_deploy.runtime.pipelines.storage import Location


@pytest.fixture(params=["folder", "object store"])
def location(request):
    """A function from a folder to its location, as a path or as an address."""
    if request.param == "folder":
        return lambda folder: Location(str(folder))
    pytest.importorskip("pyarrow", reason="pip install 'internimage-deploy[ray]'")
    return lambda folder: Location(folder.as_uri())


def test_files_are_listed_written_read_and_deleted(location, tmp_path):
    storage = location(tmp_path / "new").open()
    assert storage.list(recursive=True) == []
    storage.write("b", b"1")
    storage.write("deep/a", b"2")
    assert storage.list(recursive=False) == ["b"]
    assert storage.list(recursive=True) == ["b", "deep/a"]
    assert storage.read("deep/a") == b"2"
    assert (tmp_path / "new" / "deep" / "a").read_bytes() == b"2"
    storage.delete("b")
    assert storage.list(recursive=True) == ["deep/a"]


def test_what_is_not_there_is_named(location, tmp_path):
    storage = location(tmp_path).open()
    with pytest.raises(UserError, match="none"):
        storage.read("none")
    with pytest.raises(UserError, match="none"):
        storage.delete("none")


def test_a_place_that_cannot_be_written_to(location, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        location(tmp_path / "file").open().write("a", b"")


def test_images_are_found_and_results_are_left_out(location, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "a.labels.png", "a.overlay.png", "sub/c.tiff"):
        (tmp_path / name).touch()
    images = find_images([location(tmp_path)])
    assert [(image.name, image.stem) for image in images] == [("a.png", "a"), ("b.JPG", "b")]
    assert [image.stem for image in find_images([location(tmp_path)], recursive=True)] == ["a", "b", "sub/c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image here"):
        find_images([location(tmp_path / "empty")])


def test_two_images_with_one_stem(location, tmp_path):
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png would both write a\.labels\.png"):
        find_images([location(tmp_path)])


def test_a_file_that_is_named_twice_is_found_once(tmp_path):
    (tmp_path / "a.png").touch()
    places = [Location(str(tmp_path)), Location(str(tmp_path / "a.png")), Location(f"{tmp_path}/./a.png")]
    assert len(find_images(places)) == 1


def test_credentials_are_in_no_message():
    assert str(Location("s3://KEY:SECRET@bucket/images")) == "s3://bucket/images"
    with pytest.raises(UserError, match="nowhere://x/y: not a location that can be opened"):
        Location("nowhere://KEY:SECRET@x/y").open()


def test_without_arrow_an_address_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"opening s3://bucket needs the package 'pyarrow'"):
        Location("s3://bucket").open()


def test_results_are_the_same_from_and_to_either(location, tmp_path, model, run):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "in" / "a.png")
    assert run("segment", model, tmp_path / "in", "-o", tmp_path / "plain")[0] == 0
    code, text, _ = run("segment", model, location(tmp_path / "in").uri, "-o", location(tmp_path / "out").uri)
    assert (code, text.startswith("segmented 1 of 1 image into")) == (0, True)
    names = [tmp_path / folder / "a.labels.png" for folder in ("plain", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()
