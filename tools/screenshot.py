# SPDX-License-Identifier: Apache-2.0
"""The README's picture of the page: `screenshot.py MODEL PICTURE -o docs/serve.png`."""

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "serving")]

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from test_page import CHROMIUM, DRIVER, FLAGS  # noqa: E402

from support.served import Served  # noqa: E402


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Served(given.model, folder) as server:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder}/profile", "--window-size=1280,990"):
            options.add_argument(flag)
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
            browser.get(server.url)
            browser.find_element(By.ID, "file").send_keys(str(given.picture.absolute()))
            status = browser.find_element(By.ID, "status")
            WebDriverWait(browser, 60).until(lambda _: "Done in" in status.text)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            browser.save_screenshot(str(given.output))


if __name__ == "__main__":
    main()
