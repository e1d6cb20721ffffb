# SPDX-License-Identifier: Apache-2.0
"""The README's screenshot of the page: `python tools/screenshot.py MODEL IMAGE -o docs/serve.png`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from support.browser import chromium  # noqa: E402
from support.served import WAIT_S, Served  # noqa: E402


def main() -> None:
    """Serve the model, send the image from the page, and save what the browser shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="ONNX file to serve")
    parser.add_argument("image", type=Path, help="image to segment")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(options.model, folder) as server,
        chromium(Path(folder) / "profile", size="1280,990") as browser,
    ):
        browser.get(server.url)
        browser.find_element(By.ID, "file").send_keys(str(options.image.absolute()))
        status = browser.find_element(By.ID, "status")
        WebDriverWait(browser, WAIT_S).until(lambda _: "Done in" in status.text)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(options.output))


if __name__ == "__main__":
    main()
