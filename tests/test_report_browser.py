"""The page in a real browser: filter, hover, select; light and dark; hostile text stays text."""

import json
import re
import shutil

import numpy as np
import pytest
from rollout_files import HOSTILE, add_malformed, write_rollouts

from srpo_core.report import answers, report_files
from srpo_core.report.colors import REACH, SCALES, TEXT, weight_shade
from srpo_core.report.escapes import escaped
from srpo_core.rollouts import load, summarize_files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report_files(summarize_files([write_rollouts(path.with_name("rollouts.jsonl"))]), path)
    return path


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1300,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, page):
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page.as_uri())
    yield driver
    assert not re.search("null|undefined|NaN", driver.find_element("tag name", "body").text)
    # Nothing was asked of the network, nothing failed, nothing was blocked.
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert driver.execute_script("return window.hacked") is None


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def choose(browser, name, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", f"filter-{name}")).select_by_value(value)


def test_filters_narrow_the_list_and_reset_widens_it(browser, page):
    summary = summarize_files([page.with_name("rollouts.jsonl")])
    everything = len(texts(browser, ".item"))
    assert everything == len(summary)
    choose(browser, "answer", "right")
    right = int((summary.columns["right"] == 1).sum())
    assert len(texts(browser, ".item")) == right
    assert all("right" in text for text in texts(browser, ".item .top"))
    choose(browser, "perception", "wrong")
    lucky = int(((summary.columns["right"] == 1) & (summary.columns["perception_right"] == 0)).sum())
    assert 0 < lucky < right
    assert texts(browser, "#matches") == [f"{lucky} of {everything} shown"]
    browser.find_element("id", "filter-reset").click()
    assert len(texts(browser, ".item")) == everything
    choose(browser, "format", "nested")
    assert len(texts(browser, ".item")) == 1
    assert "a block opens inside another" in texts(browser, ".verdict")[0]
    assert texts(browser, ".t.fault") == ["<think>"]
    browser.find_element("id", "filter-reset").click()
    browser.find_element("id", "filter-text").send_keys("JUST words")
    assert texts(browser, ".item .preview") == ["just words"]
    browser.find_element("id", "filter-text").send_keys(" nowhere")
    assert texts(browser, ".empty") == ["No response matches."]


@pytest.mark.parametrize(
    ("interference", "figure", "words"),
    [
        (0.02, "0.02", "below 0.1, stay with GRPO: learning from the tokens with low weights hardly moves"),
        (1.5, "1.5", "weights may matter here: learning from the tokens with low weights moves"),
    ],
)
def test_the_overview_says_whether_weights_can_matter(driver, tmp_path, interference, figure, words):
    path = write_rollouts(tmp_path / "rollouts.jsonl", interference=interference)
    report_files(summarize_files([path]), tmp_path / "report.html")
    driver.get((tmp_path / "report.html").as_uri())
    tile = driver.find_element("css selector", ".tile:last-child")
    label, value, note = tile.text.split("\n")  # what is visible
    assert (label, value) == ("Interference", figure)
    assert note.startswith(words)
    assert note.endswith("; on 36 responses")
    assert texts(driver, "#unmeasured") == []
    assert not re.search("null|undefined|NaN", driver.find_element("tag name", "main").text)
    rows = driver.execute_script(
        "const box = (n) => n.getBoundingClientRect(), all = box(document.getElementById('overview'));"
        "return [...document.querySelectorAll('.tile')].filter((t) => box(t).right > all.right - 3).length"
    )
    assert rows == -(-len(texts(driver, ".tile")) // 4)  # every row is filled


@pytest.mark.parametrize("several", [False, True])
def test_the_page_names_the_lines_that_it_leaves_out(driver, tmp_path, several):
    paths = [write_rollouts(tmp_path / name, steps=1) for name in (["a.jsonl", "b.jsonl"] if several else ["b.jsonl"])]
    first, last = add_malformed(paths[-1])
    report_files(summarize_files(paths), tmp_path / "report.html")
    driver.get((tmp_path / "report.html").as_uri())
    assert texts(driver, ".notice.bad")[0].startswith("2 lines could not be read and are left out")
    one, other = texts(driver, ".notice.bad li")
    place = "b.jsonl, line" if several else "line"
    assert one.startswith(f"{place} {first}: not JSON: ")
    assert other.startswith(f"{place} {last}: 'log_probs' is not a field of a rollout")


def test_the_page_says_how_interference_would_be_measured(browser):
    assert "Interference" not in texts(browser, ".tile .label")
    hint = browser.find_element("id", "unmeasured")
    assert hint.text == ("Whether weights can matter was not measured: srpo_core.diagnostics.interference says how.")


def test_a_cell_of_the_table_filters(browser):
    lucky = browser.find_element("xpath", "//button[contains(., 'Lucky')]")
    lucky.click()
    shown = texts(browser, ".item")
    assert shown
    assert f"{len(shown)} of" in texts(browser, "#matches")[0]
    assert "lucky" in texts(browser, "#detail .badge")


def test_selecting_shows_the_response_its_image_and_its_mates(browser):
    items = browser.find_elements("css selector", ".item")
    items[1].click()
    assert items[1].get_attribute("aria-selected") == "true"
    assert items[0].get_attribute("aria-selected") == "false"
    assert texts(browser, "#detail h3") == ["#1"]
    assert browser.current_url.endswith("#response-1")
    assert browser.execute_script("return document.querySelector('.reading img').naturalWidth") == 8
    mates = browser.find_elements("css selector", ".mates button")
    assert len(mates) == 3
    mates[0].click()
    assert texts(browser, "#detail h3") == ["#0"]
    from selenium.webdriver.common.keys import Keys

    browser.find_element("id", "list").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert texts(browser, "#detail h3") == ["#2"]


def test_hovering_a_token_shows_its_numbers(browser, page):
    from selenium.webdriver import ActionChains

    summary = summarize_files([page.with_name("rollouts.jsonl")])
    (scored,) = load(summary, [1])
    browser.find_element("id", "item-1").click()
    token = int(np.abs(scored.scores).argmax())
    node = browser.find_element("css selector", f"[data-token='{token}']")
    ActionChains(browser).move_to_element(node).perform()
    tip = browser.find_element("id", "tooltip")
    assert tip.is_displayed()
    assert f"× {scored.weights[token]:.3f}" in tip.text
    assert f"{scored.scores[token]:+.2f} nats" in tip.text
    assert f"{scored.rollout.old_log_probs[token]:.2f}".replace("-", "−") in tip.text
    ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()
    from selenium.webdriver.common.keys import Keys

    browser.find_element("id", "heat").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert texts(browser, ".t.active") == [scored.rollout.pieces[1]]
    assert f"× {scored.weights[1]:.3f}" in tip.text


def test_a_few_are_not_none_and_nearly_all_are_not_all(browser):
    shares = {
        0: "0 %",
        1e-6: "< 0.1 %",
        0.004: "0.4 %",
        0.26: "26 %",
        0.996: "99.6 %",
        0.999999: "> 99.9 %",
        1: "100 %",
    }
    assert browser.execute_script("return arguments[0].map((v) => percent(v))", list(shares)) == list(shares.values())
    assert browser.execute_script("return [percent(1e-6, 1), percent(0.0004, 1)]") == ["< 0.01 %", "0.04 %"]


def test_a_word_is_not_torn_from_its_space(browser):
    browser.find_element("id", "item-1").click()
    browser.execute_script("document.getElementById('heat').style.width = '120px'")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.t')].map((t) => [t.textContent, t.getClientRects().length])"
    )
    words = [count for text, count in boxes if text.startswith(" ")]
    assert len(words) > 2
    assert set(words) == {1}
    lines = "return new Set([...document.querySelectorAll('.t')].map((t) => t.getBoundingClientRect().bottom)).size"
    assert browser.execute_script(lines) > 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_have_the_colors_of_their_weights_in_both_themes(browser, page, theme):
    if browser.execute_script("return document.documentElement.dataset.theme") != theme:
        browser.find_element("id", "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") == theme
    browser.find_element("id", "item-1").click()
    (scored,) = load(summarize_files([page.with_name("rollouts.jsonl")]), [1])
    script = "return [...document.querySelectorAll('.t')].map((t) => getComputedStyle(t).backgroundColor)"
    colors = [SCALES[theme][shade] for shade in weight_shade(scored.weights)]
    assert browser.execute_script(script) == ["rgb({}, {}, {})".format(*color) for color in colors]
    assert len(set(colors)) > 2
    text = browser.execute_script("return getComputedStyle(document.getElementById('heat')).color")
    assert text == "rgb({}, {}, {})".format(*TEXT[theme])
    browser.find_element("id", "mode-score").click()
    assert browser.execute_script(script)[0] == "rgb({}, {}, {})".format(*SCALES[theme][REACH])


def test_hostile_text_is_shown_and_does_nothing(browser):
    scripts = browser.execute_script("return document.querySelectorAll('script').length")
    for text in HOSTILE:
        item = browser.find_element("css selector", f".item[data-index='{38 + HOSTILE.index(text)}']")
        browser.execute_script("arguments[0].click()", item)
        shown = escaped(text)
        assert shown in texts(browser, ".t")
        assert shown in texts(browser, ".ask")[0]
        assert shown in texts(browser, "#detail h3")[0]
        assert texts(browser, ".facts b")[-1] == escaped(json.dumps({text: text}, ensure_ascii=False))
    everything = browser.execute_script("return document.body.innerText")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u200e\u200f\u2028-\u202e\u2066-\u2069]", everything)
    assert browser.execute_script("return document.querySelectorAll('script').length") == scripts
    assert browser.execute_script("return document.querySelectorAll('#detail img[src=x]').length") == 0


def test_the_page_escapes_what_the_terminal_escapes(browser):
    characters = [chr(code) for code in [*range(0x3000), *range(0xFE00, 0xD7FF + 0x2A00), *range(0xE0000, 0xE0100)]]
    characters = [character for character in characters if not 0xD800 <= ord(character) <= 0xDFFF]
    there = browser.execute_script("return arguments[0].map(escaped)", characters)
    assert there == [escaped(character, keep="\t\n") for character in characters]
    assert len(set(there) - set(characters)) > 150


def test_the_answers_stand_on_top(browser, page):
    expected = answers(summarize_files([page.with_name("rollouts.jsonl")]))
    assert texts(browser, "#answers dt") == [answer.question for answer in expected]
    assert texts(browser, "#answers dd") == [answer.sentence for answer in expected]
    tops = (
        "return ['answers', 'notices', 'overview'].map((id) => document.getElementById(id).getBoundingClientRect().top)"
    )
    assert browser.execute_script(tops) == sorted(browser.execute_script(tops))


def test_every_figure_is_explained_with_the_mouse_and_with_the_keyboard(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    tip = browser.find_element("id", "tooltip")
    for place in (".tile .label", "#shares h2", "#format h2", "#quadrants h2", ".plot h3"):
        marks = f"return [...document.querySelectorAll({place!r})].map((n) => n.querySelectorAll('.help').length)"
        assert set(browser.execute_script(marks)) == {1}, place
    mark = browser.find_element("css selector", ".tile .help")
    ActionChains(browser).move_to_element(mark).perform()
    assert tip.is_displayed()
    assert tip.text == mark.get_attribute("data-help")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    browser.execute_script("document.querySelector('#format .help').focus()")
    assert tip.is_displayed()
    assert tip.text.startswith("The tags that were searched for")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert not tip.text.startswith("The tags that were searched for") or not tip.is_displayed()


def test_the_page_names_the_tags_and_the_images_that_are_missing(browser):
    assert texts(browser, ".tags div") == [
        "perception = <perception> ... </perception>",
        "reasoning = <think> ... </think>",
        "answer = <answer> ... </answer>",
    ]
    assert "8 of 11 images were not found: " in texts(browser, ".notice")[-1]


def test_training_curves_have_axes(browser):
    curves = browser.find_elements("css selector", ".curves .plot")
    assert len(curves) == 6
    for curve in curves:
        words = [node.text for node in curve.find_elements("css selector", "svg text")]
        assert words[-1] == "step"
        assert {"0", "1", "2"} <= set(words)  # three steps
        assert len(words) >= 6  # with two or more ticks of the values
    assert any("%" in text for text in texts(browser, ".curves svg text"))
    ticks = browser.execute_script("return [ticksOf(0, 1, 3), ticksOf(0.31, 0.52, 3), ticksOf(-3, 900, 4)]")
    assert ticks == [[0, 0.5, 1], [0.4, 0.5], [0, 500]]


def test_the_policy_of_the_page_stops_what_it_did_not_bring(driver, page):
    driver.get(page.as_uri())
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    )
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    assert driver.execute_script("return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def test_nothing_overflows_a_narrow_screen(browser):
    browser.set_window_size(390, 900)
    try:
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    finally:
        browser.set_window_size(1300, 1000)
    assert wide <= 0
