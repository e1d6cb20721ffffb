# SPDX-License-Identifier: Apache-2.0
"""The page, in a real headless Chromium, driven by keyboard and pointer."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.served import WAIT_S, Served, encoded
from support.tiny_models import picture

selenium = pytest.importorskip("selenium", reason="pip install selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from support.browser import CHROMIUM, DRIVER, chromium  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), logs=True) as driver:
        yield driver


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "stripes.png"
    path.write_bytes(encoded(picture(120, 180)[0]))
    return path


@pytest.fixture
def page(browser, server):
    browser.get_log("browser")
    browser.get(server.url + "/")
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def find(page, name):
    return page.find_element(By.ID, name)


def wait(page, condition):
    return WebDriverWait(page, WAIT_S).until(condition)


def send(page, path):
    find(page, "file").send_keys(str(path))
    wait(page, lambda _: "Done in" in find(page, "status").text)


def overlay(page):
    """The overlay's pixels (H, W, 4)."""
    data = page.execute_script("return document.getElementById('overlay').toDataURL('image/png')")
    path = Path(page.capabilities["chrome"]["userDataDir"]) / "overlay.png"
    path.write_bytes(base64.b64decode(data.partition(",")[2]))
    return np.asarray(Image.open(path).convert("RGBA"))


def boxes(page):
    return {box.get_attribute("data-class"): box for box in page.find_elements(By.CSS_SELECTOR, "#classes input")}


def test_a_chosen_image_is_shown_with_its_classes(page, street):
    send(page, street)
    labels = picture(120, 180)[1]
    expected = np.array([(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)], np.uint8)[labels]
    np.testing.assert_array_equal(overlay(page), expected)
    assert set(boxes(page)) == {"red", "green", "blue"}
    shares = [element.text for element in page.find_elements(By.CLASS_NAME, "share")]
    assert shares == ["33 %"] * 3
    times = find(page, "timing").text
    for stage in ("Decoding", "Waiting", "Network", "Total"):
        assert re.search(rf"{stage}\s+[\d.]+ ms", times)
    assert "stripes.png" in find(page, "caption").text
    assert find(page, "model").text == "color"


def test_classes_are_switched_from_the_keyboard(page, street):
    send(page, street)
    box = boxes(page)["green"]
    box.send_keys(Keys.SPACE)
    assert (overlay(page)[:, :, 3] == 0).mean() == pytest.approx(1 / 3, abs=0.02)
    assert not box.is_selected()
    find(page, "none").send_keys(Keys.ENTER)
    assert (overlay(page)[:, :, 3] == 0).all()
    find(page, "all").send_keys(Keys.ENTER)
    assert (overlay(page)[:, :, 3] == 255).all()


def test_the_slider_sets_the_opacity(page, street):
    send(page, street)
    slider = find(page, "opacity")
    slider.send_keys(Keys.HOME)
    assert find(page, "overlay").value_of_css_property("opacity") == "0"
    for _ in range(30):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert find(page, "overlay").value_of_css_property("opacity") == "0.3"
    assert slider.get_attribute("aria-valuetext") == "30 percent"


def test_a_dropped_image_is_segmented(page, street):
    data = base64.b64encode(street.read_bytes()).decode()
    page.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
        """,
        data,
    )
    wait(page, lambda _: "dropped.png" in find(page, "caption").text)
    assert (overlay(page)[:, :, 3] == 255).all()


def test_a_camera_photo_is_segmented(page):
    find(page, "camera-start").send_keys(Keys.ENTER)
    take = find(page, "camera-take")
    wait(page, lambda _: take.is_displayed())
    wait(page, lambda _: page.execute_script("return document.getElementById('video').videoWidth") > 0)
    take.send_keys(Keys.ENTER)
    wait(page, lambda _: "Done in" in find(page, "status").text)
    assert find(page, "result").is_displayed()
    assert not find(page, "video").is_displayed()
    assert "camera photo" in find(page, "caption").text


def test_the_class_under_the_pointer_is_named(page, street):
    send(page, street)
    ActionChains(page).move_to_element(find(page, "overlay")).perform()
    assert find(page, "under").text == "green"


def test_the_whole_page_works_without_a_pointer(page, street):
    send(page, street)
    reached, element = [], page.switch_to.active_element
    for _ in range(20):
        element.send_keys(Keys.TAB)
        element = page.switch_to.active_element
        reached.append(element.get_attribute("id") or element.get_attribute("data-class"))
    wanted = {
        "choose",
        "camera-start",
        "save",
        "save-labels",
        "save-json",
        "opacity",
        "all",
        "none",
        "red",
        "green",
        "blue",
    }
    assert wanted <= set(reached)
    page.execute_script("document.activeElement.blur()")


def test_what_a_screen_reader_gets(page, street):
    send(page, street)
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    for role in ("button", "checkbox", "slider", "image", "group"):
        names = [name for kind, name in named if kind == role]
        assert names, role
        assert all(names), (role, names)
    assert ("status", "") in named or any(role == "status" for role, _ in named)
    (label,) = [name for role, name in named if role == "image" and "stripes" in name]
    assert label.startswith("stripes.png, segmented: ")
    assert "green 33 %" in label
    assert ("heading", "Segmentation") in named


def test_a_file_that_is_no_image_is_rejected_in_words(page, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    find(page, "file").send_keys(str(tmp_path / "no.png"))
    wait(page, lambda _: find(page, "error").is_displayed())
    assert "no.png is not an image" in find(page, "error").text


def test_what_is_saved_is_named_after_the_image_on_show(page, street, tmp_path):
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "saved")})
    send(page, street)
    (tmp_path / "no.png").write_bytes(b"no image")
    find(page, "file").send_keys(str(tmp_path / "no.png"))
    wait(page, lambda _: find(page, "error").is_displayed())
    for name in ("save", "save-labels", "save-json"):
        find(page, name).click()
    names = {f"stripes.{ending}" for ending in ("overlay.png", "labels.png", "labels.json")}
    wait(page, lambda _: {path.name for path in (tmp_path / "saved").glob("*")} >= names)


def test_an_unreadable_file_ends_the_request_before_it(page):
    """The image's request never gets a response here, so that the second file always meets it."""
    page.execute_script(
        """
        window.fetch = (_, { signal }) => new Promise((_, reject) =>
          signal.addEventListener("abort", () => reject(new DOMException("", "AbortError"))));
        $("image").toBlob((blob) => segment(new File([blob], "good.png", { type: "image/png" })));
        """
    )
    wait(page, lambda _: find(page, "busy").is_displayed())
    page.execute_script("segment(new File(['x'], 'no.png', { type: 'image/png' }))")
    wait(page, lambda _: find(page, "error").is_displayed())
    assert not find(page, "busy").is_displayed()
    assert find(page, "status").text == ""


def test_a_reason_of_the_service_is_shown(page, tmp_path):
    big = tmp_path / "big.png"
    noise = np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), np.uint8)
    big.write_bytes(encoded(noise))
    find(page, "file").send_keys(str(big))
    wait(page, lambda _: find(page, "error").is_displayed())
    assert "larger than 4,194,304 bytes" in find(page, "error").text
    page.get_log("browser")  # Chromium notes the 413 itself


def test_the_page_asks_for_the_token(browser, color_path, street, tmp_path):
    with Served(color_path, tmp_path, env={"INTERNIMAGE_DEPLOY_TOKEN": "a-token-of-enough-length"}) as server:
        browser.get(server.url + "/")
        find(browser, "file").send_keys(str(street))
        wait(browser, lambda _: find(browser, "token-form").is_displayed())
        find(browser, "token").send_keys("a-token-of-enough-length", Keys.ENTER)
        wait(browser, lambda _: "Done in" in find(browser, "status").text)
    browser.get_log("browser")


def test_the_page_talks_to_its_own_service_only(page, server, street):
    page.get_log("performance")
    page.get(server.url + "/")
    send(page, street)
    text = "".join(entry["message"] for entry in page.get_log("performance") if "requestWillBeSent" in entry["message"])
    addresses = set(re.findall(r'"url":"([a-z]+://[^/"]+)', text))
    assert addresses == {server.url}
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_images_sent_one_after_the_other_end_with_the_last(page, street, tmp_path):
    other = tmp_path / "blue.png"
    other.write_bytes(encoded(np.full((60, 60, 3), (10, 20, 220), np.uint8)))
    find(page, "file").send_keys(str(street))
    find(page, "file").send_keys(str(other))
    wait(page, lambda _: "blue.png" in find(page, "caption").text)
    assert list(boxes(page)) == ["blue"]
    assert overlay(page).shape == (60, 60, 4)


def test_labels_and_json_are_saved_as_the_service_writes_them(page, street, tmp_path, server):
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    send(page, street)
    for name in ("save-labels", "save-json"):
        find(page, name).click()
    wait(page, lambda _: {path.name for path in tmp_path.iterdir()} >= {"stripes.labels.png", "stripes.labels.json"})
    expected = server.post("/v1/segment", content=street.read_bytes()).content
    assert (tmp_path / "stripes.labels.png").read_bytes() == expected
    saved = json.loads((tmp_path / "stripes.labels.json").read_text())
    assert {entry["class"] for entry in saved["classes"]} == {"red", "green", "blue"}
