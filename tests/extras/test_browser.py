"""The page of a report in a real Chromium: what a person sees, clicks and types."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pl_patchcore.report.html import Page, PageImage

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&.png"
THRESHOLD = 5.0
READABLE = {"large": 3.0, "normal": 4.5}  # contrast that WCAG 2 asks for at level AA
LOADED = "Promise.all([...document.images].map((image) => image.decode()))"  # rejected if one cannot be
# Text of every element that has some of its own, with its colour and the first opaque background behind it.
TEXTS = """() => [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility() &&
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
  const style = getComputedStyle(element);
  let back = element;
  while (back && getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
  const size = parseFloat(style.fontSize), heavy = Number(style.fontWeight) >= 700;
  return {text: element.textContent, front: style.color, back: getComputedStyle(back ?? document.body).backgroundColor,
    large: size >= 24 || (size >= 18.66 && heavy)};
})"""


def images(count=30, labelled=True):
    """Scores from 1 to 9, a nominal image in every second place; a hostile name among them."""
    generator = np.random.default_rng(0)
    for i in range(count):
        label = i % 2 if labelled else None
        heat = np.full((60, 80), 1.0, np.float32)
        heat[20:40, 30:50] = 4.0
        yield PageImage(
            name=HOSTILE if i == 3 else f"part {i}.png",
            score=float(np.float32(generator.uniform(1, 7) + 2 * (label or 0))),
            image=generator.integers(0, 255, (60, 80, 3), dtype=np.uint8),
            anomaly_map=heat,
            outlines=[np.array([[30, 20], [50, 20], [50, 40], [30, 40]])] if i % 3 else [],
            mask=heat > 2 if label is not None else None,
            label=label,
            defect=(("nominal", HOSTILE, "nominal", "scratch")[i % 4]) if labelled else None,
            order=i,
        )


def write(folder, shown, **options):
    page = Page()
    for image in shown:
        page.add(image)
    thresholds = {"threshold": THRESHOLD, "pixel_threshold": 2.0} | options
    return page.write(folder, HOSTILE, {"image AUROC": "0.9"}, notes=[HOSTILE], **thresholds)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield running
        running.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens pages; in the end none has written an error to its console, opened an alert or asked for an address."""
    said, tabs = [], []

    def make(shown, width=1400, scheme="light", **options):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tabs.append(tab)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("requestfailed", lambda request: said.append(request.url[:200]))
        tab.goto(write(tmp_path, shown, **options).as_uri())
        return tab

    yield make
    for tab in tabs:
        tab.close()
    assert said == []


def names(tab):
    return tab.locator("#grid .name").all_text_contents()


def numbers(tab):
    return [int(text) for text in tab.locator("#verdicts b").all_text_contents()]


def counts(shown, threshold):
    """Caught, missed, false alarms, passed."""
    found = [(image.label, image.score > threshold) for image in shown]
    return [found.count(wanted) for wanted in ((1, True), (1, False), (0, True), (0, False))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_can_be_read(width, scheme, opened):
    tab = opened(images(), width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.title() == tab.locator("h1").inner_text() == HOSTILE
    tab.evaluate(LOADED)
    page = tab.evaluate(TEXTS)
    tab.locator(".tile").first.click()
    inside = tab.evaluate("get('viewer').scrollWidth <= get('viewer').clientWidth")
    assert inside, "the large view scrolls sideways"
    texts = page + tab.evaluate(TEXTS)
    assert len(texts) > 100
    for text in texts:
        assert contrast(text["front"], text["back"]) >= READABLE["large" if text["large"] else "normal"], text


def contrast(front, back):
    """Contrast of two colours as WCAG 2 defines it, from 1 to 21."""
    lights = []
    for colour in (front, back):
        rgb = np.array([float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lights.append(linear @ (0.2126, 0.7152, 0.0722))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_sorting(opened):
    shown = list(images())
    tab = opened(shown)
    by_score = [image.name for image in sorted(shown, key=lambda image: -image.score)]
    assert names(tab) == by_score
    tab.select_option("#sort", "score-up")
    assert names(tab) == by_score[::-1]
    tab.select_option("#sort", "name")
    assert names(tab) == [HOSTILE, *(f"part {i}.png" for i in range(30) if i != 3)]  # 9 comes before 10
    tab.select_option("#sort", "verdict")
    kinds = [(image.label, image.score > THRESHOLD) for image in shown]
    place = {(1, False): 0, (0, True): 1, (1, True): 2, (0, False): 3}
    order = sorted(range(30), key=lambda i: (place[kinds[i]], -shown[i].score))
    assert names(tab) == [shown[i].name for i in order]


def test_filters(opened):
    shown = list(images())
    tab = opened(shown)
    caught, missed, alarms, passed = counts(shown, THRESHOLD)
    assert min(caught, missed, alarms, passed) > 0
    for kind, count in (("defect", caught + alarms), ("ok", missed + passed), ("missed", missed), ("alarm", alarms)):
        tab.select_option("#filter", kind)
        assert len(names(tab)) == count, kind
        assert tab.locator("#count").inner_text() == f"{count} of 30 images"
    tab.select_option("#filter", "missed")
    assert tab.locator("#grid .badges").all_text_contents() == ["ok missed "] * missed
    tab.select_option("#filter", "all")
    tab.select_option("#type", HOSTILE)
    assert set(names(tab)) == {image.name for image in shown if image.defect == HOSTILE}
    tab.select_option("#type", "")
    tab.fill("#search", "PART 1")
    assert set(names(tab)) == {f"part {i}.png" for i in (1, *range(10, 20))}


def test_slider_recounts(opened):
    shown = list(images())
    tab = opened(shown)
    assert numbers(tab) == counts(shown, THRESHOLD)
    assert not tab.locator("#use").is_visible()
    slider, seen = tab.locator("#slider"), [numbers(tab)]
    for key in ["PageUp"] * 3 + ["ArrowLeft"] * 8 + ["Home", "End"]:
        slider.press(key)
        threshold = float(tab.locator("#threshold").inner_text())
        assert numbers(tab) == counts(shown, threshold)
        assert f"--model.image_threshold {threshold:g}" in tab.locator("#use").inner_text()
        rows = tab.locator("#types tr").all_text_contents()
        scratches = [image.score > threshold for image in shown if image.defect == "scratch"]
        assert f"scratch{len(scratches)}{sum(scratches)}{len(scratches) - sum(scratches)}" in rows
        seen.append(numbers(tab))
    assert len({tuple(each) for each in seen}) > 5
    assert seen[-2:] == [counts(shown, -1), counts(shown, 100)]
    tab.select_option("#filter", "defect")
    assert names(tab) == []
    slider.press("Home")  # the grid follows
    assert len(names(tab)) == 30
    tab.click("#reset")
    assert numbers(tab) == counts(shown, THRESHOLD)


def close(tab, by):
    """Closes the large view with `by()` and waits until the browser has told the page, a moment later."""
    heard = "new Promise((done) => viewer.addEventListener('close', () => done(true), {once: true}))"
    tab.evaluate(f"() => {{ window.told = {heard}; }}")
    by()
    assert tab.evaluate("window.told")  # waits for the promise


def test_large_view_by_mouse_and_keys(opened):
    tab = opened(images())
    order, viewer = names(tab), tab.locator("#viewer")
    place = order.index("part 4.png")
    tab.locator(".tile").nth(place).click()
    assert tab.locator("#viewer-name").inner_text() == "part 4.png"
    panels = [box["x"] for box in (panel.bounding_box() for panel in tab.locator("#panels .picture").all())]
    assert panels == sorted(set(panels))
    assert len(panels) == 3  # image, map and mask side by side
    assert [tab.locator(f"{panel} img").count() for panel in ("#panel-image", "#panel-map", "#panel-mask")] == [1, 1, 1]
    assert tab.locator("#panel-image path.outline").get_attribute("d") == "M30.0 20.0L50.0 20.0L50.0 40.0L30.0 40.0Z"
    tab.uncheck("#outlines")
    assert tab.locator("#panel-image path").count() == 0
    close(tab, lambda: tab.click("#close"))
    assert not viewer.is_visible()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.title") == order[place + 1]
    tab.keyboard.press("Enter")
    assert viewer.is_visible()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#viewer-name").inner_text() == order[place + 2]
    close(tab, lambda: tab.keyboard.press("Escape"))
    assert not viewer.is_visible()
    assert tab.evaluate("document.activeElement.title") == order[place + 2]
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.title") in order[place + 4 :]
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("document.activeElement.title") == order[place + 2]


def test_controls_by_tab(opened):
    tab = opened(images())
    reached = []
    for _ in range(8):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:6] == ["slider", "filter", "type", "sort", "search", "tile defect"]


def test_without_labels_and_threshold(opened):
    shown = list(images(3, labelled=False))
    tab = opened(shown, 400, threshold=None, pixel_threshold=None)
    assert "no threshold" in tab.locator("#reason").inner_text()
    assert numbers(tab) == [0, 3]
    assert tab.locator("#filter option").all_text_contents() == ["all images", "defect", "ok"]
    assert not tab.locator("#type-label").is_visible()
    tab.locator(".tile").first.click()
    assert not tab.locator("#panel-mask").is_visible()


def test_mask_of_the_model_where_there_is_no_ground_truth(opened):
    tab = opened(images(2, labelled=False))
    tab.get_by_text("part 1.png").click()
    assert tab.locator("#mask-title").inner_text() == "Mask (above the pixel threshold)"
    shot = Image.open(io.BytesIO(tab.locator("#panel-mask").screenshot())).convert("L")
    assert 0.05 < (np.asarray(shot) > 200).mean() < 0.12  # 20 x 20 of 60 x 80 pixels


def test_many_images_come_in_steps_from_files(opened, monkeypatch):
    monkeypatch.setattr("pl_patchcore.report.html.MOST_INLINE", 0)
    tab = opened(images(130))
    assert len(names(tab)) == 120
    tab.locator(".tile").nth(119).click()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.evaluate(LOADED)
    close(tab, lambda: tab.keyboard.press("Escape"))
    assert len(names(tab)) == 123
    tab.click("#more")
    assert len(names(tab)) == 130
    tab.evaluate(LOADED)
