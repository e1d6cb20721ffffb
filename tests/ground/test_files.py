# SPDX-License-Identifier: Apache-2.0
import errno
import os
import shutil

import pytest

from internimage_deploy.errors import UserError, one_line
from internimage_deploy.files import atomic_path, require_file, staging_folder, write_error


def test_another_files_error_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.so"), atomic_path(tmp_path / "t.so") as path:
        shutil.copyfile(tmp_path / "missing.so", path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_temporary_folder_is_the_targets(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/t\.bin: no file can be made there"):  # noqa: SIM117
        with staging_folder(tmp_path / "t.bin") as stage:
            (stage / "none" / "file").write_bytes(b"")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_is_the_targets_error_where_no_file_is_named(code, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/t\.bin"), atomic_path(tmp_path / "t.bin"):
        raise OSError(code, os.strerror(code))


def test_a_required_file(tmp_path):
    (tmp_path / "there").touch()
    require_file(tmp_path / "there")
    with pytest.raises(UserError, match=r"/none: no such file$"):
        require_file(tmp_path / "none")
    with pytest.raises(UserError, match=r": is a folder, not a model file$"):
        require_file(tmp_path, "a model file")


def test_an_error_on_one_line():
    assert one_line(ValueError("two\n  lines ")) == "two lines"
    assert one_line(ValueError()) == "ValueError"


def test_a_folder_that_exists_is_not_called_missing(tmp_path):
    error = OSError(errno.ENOENT, "No such file or directory")
    assert "no file can be made there; choose another path" in str(write_error(tmp_path / "x", error))
    assert "its folder does not exist; create it first" in str(write_error(tmp_path / "missing" / "x", error))
