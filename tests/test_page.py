"""The page in a real browser without a screen: Debian's Chromium, or whichever is there."""

import io
import shutil

import pytest
from PIL import Image, ImageDraw

from avg_llava_jax.inference.api import AvgLlava
from tests.served import Served

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
QUIET = ["--no-sandbox", "--no-first-run"] + [
    f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")
]
sync_api.expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def served(tiny, tokenizer):
    served = Served(AvgLlava(tiny, None, tokenizer))
    yield served
    served.close()


@pytest.fixture
def page(browser, served):
    """The page, opened. Whatever it asks for comes from the server, and nothing in it goes wrong unseen."""
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    page, elsewhere, wrong = context.new_page(), [], []
    page.on("request", lambda request: elsewhere.append(request.url) if "://127.0.0.1:" not in request.url else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(served.url)
    sync_api.expect(page.locator("#model")).to_contain_text("“tiny” chooses among 4, 8, 16")
    yield page
    context.close()
    assert not wrong and not [url for url in elsewhere if not url.startswith(("data:", "blob:"))]


def photo(width=320, height=200, kind="PNG"):
    image = Image.new("RGB", (width, height), "seagreen")
    ImageDraw.Draw(image).ellipse((20, 20, height - 20, height - 20), "gold")
    file = io.BytesIO()
    image.save(file, kind)
    return {"name": f"photo.{kind.lower()}", "mimeType": f"image/{kind.lower()}", "buffer": file.getvalue()}


def pixels(page):
    return page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")


def ask(page, question):
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def expect(page, where):
    return sync_api.expect(page.locator(where))


def test_a_conversation_about_an_image(page, served, tmp_path):
    page.locator("#file").set_input_files(photo())
    expect(page, "#canvas").to_have_attribute("aria-label", "Image 1, not asked about yet")
    served.engine.held.set()
    ask(page, "yellow is it")
    expect(page, ".turn.model .said").to_have_text("it")  # streamed: the first word alone
    served.engine.held.clear()
    expect(page, ".turn.model .said").to_have_text("it is yellow")
    expect(page, ".turn.model .note").to_contain_text("3 new and 38 visual tokens")
    expect(page, "#granularity").to_have_text("8tokens a tile")
    expect(page, "#tokens").to_contain_text("% of the closest look")
    expect(page, "#time").to_contain_text("s")
    assert page.locator("#bars .fill").count() == 3 and page.locator("#bars .fill.chosen").count() == 1
    label = "Image 1, seen as 4 by 6 cells on 2 by 2 tiles"
    expect(page, "#canvas").to_have_attribute("aria-label", label)

    with_grid = pixels(page)
    page.locator("#grid").uncheck()
    assert pixels(page) != with_grid
    page.locator("#grid").check()
    assert pixels(page) == with_grid

    page.locator("#force").press("ArrowRight")  # by keyboard alone: never more than a glance
    expect(page, "#force-shown").to_have_text("always 4 a tile")
    expect(page, "#thrift").to_be_disabled()
    page.locator("#file").set_input_files([photo(200, 100, "BMP"), photo(90, 200, "JPEG")])
    expect(page, "#thumbs button").to_have_count(3)
    ask(page, "this about what")
    expect(page, ".turn.model >> nth=1 >> .said").to_have_text("what about this")
    expect(page, "#bars").to_have_text("You chose, so the router was not asked.")
    page.locator("#thumbs button").nth(0).click()
    expect(page, "#canvas").to_have_attribute("aria-label", "Image 1, seen as 4 by 4 cells on 2 by 2 tiles")
    page.screenshot(path=tmp_path / "wide.png")

    request = served.engine.requests[-1]
    assert [turn["value"] for turn in request.prompt] == [
        ["", "\nyellow is it"], ["it is yellow"], ["", "\n", "\nthis about what"],
    ]  # fmt: skip
    assert [image.size for image in request.images] == [(320, 200), (200, 100), (90, 200)]
    assert request.granularity == 4 and request.cost_weight == 0

    page.locator("#new").click()
    page.locator("#force").press("Home")
    page.locator("#thrift").press("End")
    ask(page, "now alone text")
    expect(page, ".turn.model .said").to_have_text("text alone now")
    assert served.engine.requests[-1].images == () and served.engine.requests[-1].cost_weight == 10


def test_loading_an_image_takes_no_focus_away(page):
    begin = """async (elsewhere) => {
      const blob = await new Promise((done) => document.createElement("canvas").toBlob(done));
      by("choose").focus();
      const added = add([new File([blob], "blank.png", { type: "image/png" })]);
      if (elsewhere) by(elsewhere).focus();
      await added;
      return document.activeElement.id;
    }"""
    assert page.evaluate(begin, "doubt") == "doubt"
    assert page.evaluate(begin, None) == "question"


def test_a_second_look_is_told(page, served):
    page.locator("#file").set_input_files(photo(320, 200, "PNG"))
    page.locator("#doubt").press("End")
    expect(page, "#doubt-shown").to_have_text("100 %")
    served.engine.looks.set()
    ask(page, "yellow is it")
    expect(page, ".turn.model .note").to_have_text("a glance: 4 a tile, 25 % sure; looking again …")
    expect(page, "#granularity").to_have_text("4tokens a tile")
    expect(page, "#canvas").to_have_attribute("aria-label", "Image 1, seen as 4 by 4 cells on 2 by 2 tiles")
    served.engine.looks.clear()
    told = "a glance: 4 a tile, 25 % sure; a close look: 8 a tile, 75 % sure"
    expect(page, ".turn.model .note >> nth=0").to_have_text(told)
    assert served.engine.requests[-1].escalate == 1.0


def test_what_goes_wrong_is_said_in_words(page, served):
    page.locator("#file").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(page, "#error").to_have_text("“notes.txt” is no image that this browser can read.")
    ask(page, " ")
    expect(page, "#error").to_have_text("Type a question first.")
    ask(page, "crash")
    expect(page, "#error").to_contain_text("the server failed on this request")
    expect(page, "#question").to_have_value("crash")
    ask(page, "crash good")  # after its first word
    expect(page, "#error").to_contain_text("The answer broke off: the server failed")
    expect(page, ".turn").to_have_count(0)
    served.engine.places = 0
    ask(page, "b a")
    expect(page, "#error").to_contain_text("Many are asking right now. Try again in")
    served.engine.places = 4
    page.locator("#ask").click()
    expect(page, ".turn.model .said").to_have_text("a b")
    expect(page, "#error").to_be_hidden()

    served.engine.held.set()
    ask(page, "d c")
    expect(page, ".turn.model >> nth=1 >> .said").to_have_text("c")
    page.locator("#stop").click()
    expect(page, "#error").to_contain_text("Stopped")
    served.until(lambda: served.engine.ends["Cancelled"] == 1)
    expect(page, "#question").to_have_value("d c")
    served.serving.drain(0)
    page.locator("#ask").click()
    expect(page, "#error").to_contain_text("The server cannot be reached")


def test_a_telephone(page, tmp_path):
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#file").set_input_files([photo(4000, 300), photo(300, 4000)])
    ask(page, "a" * 90)
    expect(page, ".turn.model .said").to_have_text("a" * 90)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)


def test_a_page_that_wants_a_key(browser, tiny, tokenizer):
    served = Served(AvgLlava(tiny, None, tokenizer), key="secret")
    page = browser.new_page()
    page.goto(served.url)
    expect(page, "#error").to_contain_text("wants its API key")
    page.locator("#key").fill("secret")
    ask(page, "b a")
    expect(page, ".turn.model .said").to_have_text("a b")
    page.close()
    served.close()
