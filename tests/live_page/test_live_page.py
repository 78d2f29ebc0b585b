"""The live page in a real browser."""

import re

import pytest
from browser import CHROMIUM, Browser
from made_up import MadeUp

from tightfit.cluster.live_page.server import LiveServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)"),
]
TOKEN = "tft_secret"
STAGES = "document.querySelectorAll('.stage').length"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def shown(browser):
    """Opens the page on a made-up deployment; at the end the page must have had no problem."""
    servers = []
    browser.problems.clear()

    def show(made_up, **settings):
        servers.append(LiveServer(made_up, "127.0.0.1", 0, **settings))
        browser.open(f"http://127.0.0.1:{servers[-1].port}/")
        return browser

    yield show
    browser.open("about:blank")
    for server in servers:
        server.close()


def text(browser, selector):
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


@pytest.mark.parametrize("num_stages", [1, 2, 5, 16])
def test_every_stage_is_drawn_with_its_layers_its_memory_and_a_line_to_the_next(shown, num_stages):
    browser = shown(MadeUp(num_stages))
    assert browser.wait_for(f"{STAGES} === {num_stages}")
    assert text(browser, ".stage h2") == [f"Stage {i}" for i in range(num_stages)]
    assert browser.run("document.querySelectorAll('.layers rect').length") == 96 + 2
    assert browser.run("document.querySelectorAll('#links .dots').length") == num_stages + 1
    widths = browser.run("[...document.querySelectorAll('.stage .bar i')].map(e => e.offsetWidth)")
    assert len(widths) == 4 * num_stages
    assert all(width > 0 for width in widths)
    assert all("+0.04 %" in t for t in text(browser, ".checked"))
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []


def test_cards_and_lines_do_not_overlap_at_any_width(shown, browser):
    shown(MadeUp(7))
    assert browser.wait_for(f"{STAGES} === 7")
    for width in (380, 700, 1000, 1280, 1900):
        browser.resize(width, 800)
        browser.wait_for(f"innerWidth === {width}")
        overlaps = browser.run(
            "(() => { const b = [...document.querySelectorAll('.cell')].map(e =>"
            " e.getBoundingClientRect()); return b.flatMap((p, i) => b.slice(i + 1).filter(q =>"
            " p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)).length"
            " })()"
        )
        assert overlaps == 0, width
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), width
    browser.resize(1280, 800)


def test_it_shows_load_and_rates_as_they_are(shown):
    made_up = MadeUp(2)
    browser = shown(made_up)
    assert browser.wait_for(f"{STAGES} === 2")
    tiles = dict(zip(text(browser, ".tile h2"), text(browser, ".tile .big"), strict=True))
    rate = re.match(r"([\d.]+) per second", tiles["Tokens generated"])
    assert 30 < float(rate[1]) < 46
    assert tiles["Sequences"] == "18 running 9 waiting"
    assert browser.run("document.querySelectorAll('.queue .wait').length") == 9
    assert browser.run("document.querySelectorAll('.queue .run').length") == 18
    made_up.num_waiting = 1000
    assert browser.wait_for("document.body.textContent.includes('1,000 waiting')")
    assert browser.run("document.querySelectorAll('.queue .wait').length") == 40


def test_it_says_what_is_wrong(shown):
    made_up = MadeUp(2)
    browser = shown(made_up)
    assert browser.wait_for(f"{STAGES} === 2")
    banner = "document.getElementById('banner').textContent"
    made_up.age_s = 20.0
    assert browser.wait_for(f"{banner}.includes('not answered for 20 s')")
    made_up.age_s, made_up.health, made_up.reason = 0.2, "failed", "stage 1's process ended"
    assert browser.wait_for(f"""{banner} === "The service has failed: stage 1's process ended" """)
    assert browser.run("document.getElementById('links').classList.contains('still')")
    made_up.health, made_up.weight_error = "ok", 0.031
    assert browser.wait_for("document.querySelectorAll('.checked b.off').length === 2")
    assert "predicted" in browser.run("document.querySelector('.checked').title")
    assert browser.run("document.getElementById('banner').hidden")
    assert browser.problems == []


def test_a_recovery_is_seen_while_it_lasts_and_afterwards(shown):
    made_up = MadeUp(3)
    browser = shown(made_up)
    assert browser.wait_for(f"{STAGES} === 3")
    assert browser.run("document.getElementById('outages').hidden")
    assert not text(browser, ".spark rect")
    made_up.outages = [(40.0, 52.0), (100.5, 101.5), (150.0, 9999.0)]
    assert browser.wait_for("document.getElementById('health').textContent === 'recovering'")
    assert browser.run("document.getElementById('health').className") == "pill busy"
    banner = "The service is recovering, and requests wait: stage 1's process ended"
    assert text(browser, "#banner") == [banner]
    assert browser.run("document.getElementById('links').classList.contains('still')")
    assert text(browser, "#age")[0].startswith("epoch 3 · 2 recoveries · ")
    now, unseen, seen = text(browser, "#outages li")
    clock = r"^\d\d:\d\d:\d\d"
    assert re.search(clock + r"lost for \d\d seconds · stage 1's process ended$", now)
    assert re.search(clock + r"recovered after less than 2 seconds$", unseen)
    assert re.search(clock + r"recovered after 12 seconds · stage 1's process ended$", seen)
    widths = browser.run(
        "[...document.querySelectorAll('.spark rect')].map(e => e.width.baseVal.value)"
    )
    assert widths[:2] == [12, 2]
    assert len(widths) == 3 * 3
    assert all(width > 0 for width in widths)
    made_up.outages = [(40.0, 52.0)]
    assert browser.wait_for("document.getElementById('health').textContent === 'ok'")
    assert browser.run("document.getElementById('banner').hidden")
    assert text(browser, "#age")[0].startswith("epoch 2 · 1 recovery · ")
    assert len(text(browser, "#outages li")) == 1
    assert browser.problems == []


def test_a_name_that_looks_like_html_is_only_text(shown):
    made_up = MadeUp(1)
    made_up.model = "<img src=x onerror=document.title='taken'>"
    browser = shown(made_up)
    assert browser.wait_for(f"{STAGES} === 1")
    assert text(browser, "h1") == [made_up.model]
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.title").endswith("· Tightfit")


def test_it_says_so_when_the_service_is_gone_and_goes_on_when_it_is_back(browser):
    made_up = MadeUp(1)
    server = LiveServer(made_up, "127.0.0.1", 0)
    port = server.port
    browser.open(f"http://127.0.0.1:{port}/")
    assert browser.wait_for(f"{STAGES} === 1")
    server.close()
    assert browser.wait_for("document.getElementById('health').textContent === 'unreachable'")
    server = LiveServer(made_up, "127.0.0.1", port)
    assert browser.wait_for("document.getElementById('health').textContent === 'ok'")
    browser.open("about:blank")
    server.close()


def test_with_tokens_it_asks_for_one_and_shows_nothing_before(shown):
    browser = shown(MadeUp(2), is_allowed=lambda token: token == TOKEN)

    def give(token):
        browser.run(
            f"(() => {{ document.getElementById('token').value = '{token}';"
            "document.querySelector('#ask button').click(); })()"
        )

    assert browser.wait_for("!document.getElementById('ask').hidden")
    assert browser.run("document.getElementById('main').hidden")
    give("wrong")
    assert browser.wait_for("document.body.textContent.includes('not known here')")
    assert browser.run(STAGES) == 0

    def keeps_the_token():
        give(TOKEN)
        assert browser.wait_for(f"{STAGES} === 2")
        assert browser.run("document.getElementById('ask').hidden")
        browser.run("window.isOld = true")
        browser.call("Page.reload")
        assert browser.wait_for("!window.isOld && document.readyState === 'complete'")
        return browser.wait_for(f"{STAGES} === 2", limit_s=5)

    # A starved Chromium now and then forgets what a page stored right before it was loaded again.
    assert any(keeps_the_token() for _ in range(5))
    browser.run("sessionStorage.clear()")


def test_it_follows_the_browsers_dark_or_light(shown):
    browser = shown(MadeUp(1))
    assert browser.wait_for(f"{STAGES} === 1")
    colours = {}
    for scheme in ("light", "dark"):
        browser.prefer(prefers_color_scheme=scheme)
        colours[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.prefer()
    assert colours == {"light": "rgb(243, 244, 241)", "dark": "rgb(14, 19, 23)"}


def test_it_stands_still_for_who_does_not_want_motion(shown):
    browser = shown(MadeUp(2))
    assert browser.wait_for(f"{STAGES} === 2")
    name = "getComputedStyle(document.querySelector('#links .dots')).animationName"
    assert browser.run(name) == "flow"
    browser.prefer(prefers_reduced_motion="reduce")
    assert browser.run(name) == "none"
    browser.prefer()


def test_it_keeps_a_browser_from_working_hard(shown):
    """Drawing a second's news takes far less than a second, with 16 stages too."""
    browser = shown(MadeUp(16))
    assert browser.wait_for(f"{STAGES} === 16")
    browser.run("""
        window.took = [];
        const before = show;
        show = (live) => {
            const began = performance.now();
            before(live);
            document.body.offsetHeight;  // lay it out
            window.took.push(performance.now() - began);
        };
    """)
    assert browser.wait_for("window.took.length >= 3")
    assert browser.run("Math.min(...window.took)") < 100
