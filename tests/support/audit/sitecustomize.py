# SPDX-License-Identifier: Apache-2.0
"""With this folder in PYTHONPATH, every Python process lists the files it opens in the file AUDITED_FILES names."""

import os
import sys

_target = os.open(os.environ["AUDITED_FILES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _record(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
        writes = writes or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        os.write(_target, f"{'write' if writes else 'read'} {os.fsdecode(args[0])}\n".encode())


sys.addaudithook(_record)
