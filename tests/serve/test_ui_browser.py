"""The web page in headless Chromium: what a person does on it, and what nothing that a model wrote can do.

Needs gradio (`pip install 'tunesmith[ui]'`), Playwright (`pip install 'tunesmith[browser]'`) and a Chromium.
"""

from __future__ import annotations

import re
import threading
import time
from functools import partial

import pytest
from tests.browser import chromium
from tests.serve.conftest import KEY, LETTERS, make_registry
from tests.vision.small import write_image

from tunesmith.serve.engine import Engine, Limits

pytest.importorskip("gradio", reason="NOT TESTED, gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED, playwright is not installed")
STOPPED = re.compile("^(Blocked|Refused) .*sandboxed|violates the following Content Security Policy")
PAYLOADS = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "<img src=//elsewhere.test/a.png>",
    "<svg onload=\"document.title='run'\">",
    "<svg><script>document.title='run'</script></svg>",
    "<iframe src=\"javascript:parent.document.title='run'\"></iframe>",
    "<iframe srcdoc=\"<script>parent.document.title='run'</script>\"></iframe>",
    "<a href=\"javascript:document.title='run'\">here</a>",
    "[here](javascript:document.title='run')",
    "![here](//elsewhere.test/b.png)",
    "![here](x\"onerror=\"document.title='run')",
    "<body onload=\"document.title='run'\">",
    "<video><source onerror=\"document.title='run'\"></video>",
    "<audio src=x onerror=\"document.title='run'\">",
    "<details open ontoggle=\"document.title='run'\">a</details>",
    "<input autofocus onfocus=\"document.title='run'\">",
    "<marquee onstart=\"document.title='run'\">a</marquee>",
    "<math><mi xlink:href=\"javascript:document.title='run'\">a</mi></math>",
    "<object data=\"javascript:document.title='run'\"></object>",
    "<embed src=\"javascript:document.title='run'\">",
    "<link rel=stylesheet href=//elsewhere.test/c.css>",
    "<style>@import '//elsewhere.test/d.css'; * { background: url(//elsewhere.test/e.png) }</style>",
    '<meta http-equiv=refresh content="0; url=//elsewhere.test/">',
    "<base href=//elsewhere.test/>",
    "<form action=//elsewhere.test/><button autofocus>a</button></form>",
    "</textarea><script>document.title='run'</script>",
    "</pre></div><script>document.title='run'</script>",
    "${document.title='run'}",
    "{{constructor.constructor(\"document.title='run'\")()}}",
    "<template shadowrootmode=open><img src=x onerror=\"document.title='run'\"></template>",
    "$$\\href{javascript:document.title='run'}{a}$$",
    "\"><img src=x onerror=document.title='run'>",
    "&lt;script&gt;document.title='run'&lt;/script&gt;",
]


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=30_000)
    yield from chromium()


class Site:
    """A page that is served, its engine, and the folder of its runs."""

    def __init__(self, base, adapters, folder, key=None) -> None:
        import uvicorn

        from tunesmith.serve.start import config, listen
        from tunesmith.serve.ui.jobs import Jobs
        from tunesmith.serve.ui.page import Options, create_page

        self.runs, self.wait = folder / "runs", 0.0
        self.runs.mkdir()
        registry = make_registry(base, adapters, ("alpha", "beta"))
        registry.folder = self.runs.resolve()
        self.engine = Engine(registry, Limits(answers=16)).start()
        step = self.engine.batch.step
        self.engine.batch.step = lambda: (time.sleep(self.wait), step())[1]  # a pace that a person can follow
        self.jobs = Jobs(folder)
        door = listen("127.0.0.1", 0)
        app = create_page(self.engine, Options(self.runs, str(base), key=key), self.jobs)
        self.server = uvicorn.Server(config(app, self.engine.limits, lifespan="on"))
        self.thread = threading.Thread(target=partial(self.server.run, [door]), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{door.getsockname()[1]}/"
        while not self.server.started:
            time.sleep(0.05)

    def idle(self) -> bool:
        """Wait until nothing is being answered."""
        end = time.monotonic() + 10
        while self.busy() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.busy()

    def busy(self) -> bool:
        return bool(self.engine.inside or self.engine.batch.rows)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.jobs.stop()


@pytest.fixture(scope="module")
def site(base, adapters, tmp_path_factory):
    one = Site(base, adapters, tmp_path_factory.mktemp("site"))
    yield one
    one.close()


@pytest.fixture
def said() -> list[str]:
    """What the page said on its console, or in a window of its own."""
    return []


@pytest.fixture
def page(browser, site, said):
    """The page; at the end of a test nothing was run, nothing failed, and nothing was asked of anybody else."""
    site.wait = 0.0
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    asked = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("requestfinished", lambda request: asked.append(request.url))
    tab.on("requestfailed", lambda request: asked.append(request.url) if request.failure != "csp" else None)
    tab.goto(site.url)
    tab.wait_for_selector("#question textarea")
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith(site.url)] == []
    assert tab.title() == "Tunesmith"
    context.close()


def ask(page, text: str) -> None:
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def answers(page) -> list[str]:
    return page.locator("#chat .assistant").all_inner_texts()


def choose(page, label: str, name: str) -> None:
    page.get_by_label(label).first.click()
    page.get_by_role("option", name=name, exact=True).click()


def ended(page, count: int) -> str:
    """Wait for the end of an answer; returns the status."""
    sync_api.expect(page.locator("#chat .assistant")).to_have_count(count)
    status = page.locator(".told:visible").first
    sync_api.expect(status).to_contain_text("tokens in")
    return status.inner_text()


def settings(page, **values: object) -> None:
    page.get_by_role("button", name="Settings").first.click()
    settled(page)
    for label, value in values.items():
        field = page.get_by_role("spinbutton", name=re.compile(label)).first
        field.fill(str(value))
        field.press("Tab")
        settled(page)
        sync_api.expect(field).to_have_value(str(value))


def settled(page) -> None:
    """The page takes and hands on values with its next frames, which come late on a busy machine."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 300)))"
    page.evaluate(f"() => new Promise(done => {frames})")


def test_an_answer_streams_and_the_adapter_is_switched(page, site) -> None:
    settings(page, Longest=24, Temperature=0)
    site.wait = 0.05
    ask(page, "Who are you?")
    sync_api.expect(page.locator("#chat .assistant")).to_have_text(re.compile("^.{1,12}$"))  # not yet the whole
    assert "cut at 24 tokens" in ended(page, 1)
    assert set(answers(page)[0]) <= set(LETTERS["base"]) and len(answers(page)[0]) == 24
    site.wait = 0.0
    choose(page, "Answered by", "alpha")
    ask(page, "And now?")
    ended(page, 2)
    first, second = answers(page)
    assert set(first) <= set(LETTERS["base"]) and set(second) <= set(LETTERS["alpha"]) and len(second) == 24
    site.wait = 0.05
    page.get_by_role("button", name="Again").click()
    sync_api.expect(page.locator("#chat .assistant").nth(1)).to_have_text(re.compile("^.{1,12}$"))  # it comes anew
    site.wait = 0.0
    ended(page, 2)
    page.get_by_role("button", name="Clear").click()
    sync_api.expect(page.locator("#chat .turn")).to_have_count(0)


def test_stop_ends_an_answer_and_the_conversation_goes_on(page, site) -> None:
    settings(page, Longest=120, Temperature=0)
    site.wait = 0.1
    ask(page, "Speak long.")
    sync_api.expect(page.locator("#chat .assistant")).to_have_text(re.compile("."))
    page.get_by_role("button", name="Stop").first.click()
    assert site.idle()
    length = len(answers(page)[0])
    assert 0 < length < 120
    page.wait_for_timeout(400)
    assert len(answers(page)[0]) == length
    site.wait = 0.0
    ask(page, "Go on.")
    ended(page, 2)
    assert page.locator("#chat .user").all_inner_texts() == ["Speak long.", "Go on."]


def test_who_leaves_frees_the_engine(browser, site) -> None:
    site.wait = 0.1
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(site.url)
    tab.wait_for_selector("#question textarea")
    ask(tab, "Speak long.")
    sync_api.expect(tab.locator("#chat .assistant")).to_have_text(re.compile("."))
    context.close()
    assert site.idle()


def test_models_answer_side_by_side(page, site) -> None:
    page.get_by_role("tab", name="Side by side").click()
    choose(page, "Answered by (up to", "beta")
    page.fill("#both-question textarea", "Who are you?")
    page.get_by_role("button", name="Ask all").click()
    sync_api.expect(page.locator(".told:visible")).to_contain_text("tokens in", timeout=20_000)
    shown = page.locator(".side:visible")
    assert shown.count() == 3
    for number, (name, label) in enumerate((("base", "tiny-base"), ("alpha", "alpha"), ("beta", "beta"))):
        column = shown.nth(number)
        assert label in column.inner_text()
        said = column.locator("textarea").input_value()
        assert said and set(said) <= set(LETTERS[name])


def test_what_is_wrong_is_one_line(page) -> None:
    settings(page)
    page.get_by_label("Seed").first.fill("<img src=x>")
    ask(page, "Who?")
    status = page.locator(".told:visible").first
    sync_api.expect(status).to_have_text("error: seed: give a whole number, or nothing for a new draw each time, "
                                         "not '<img src=x>'")  # fmt: skip
    assert page.locator("#chat .user").count() == 1


def test_an_image_is_shown_and_kept_from_models_that_see_nothing(page, said, tmp_path) -> None:
    page.get_by_role("button", name="Image, for a model").click()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<svg onload=alert(1)>")
    page.set_input_files("#image input[type=file]", broken)
    sync_api.expect(page.get_by_text("error: the image")).to_be_visible()
    page.get_by_role("button", name="Clear").nth(1).click()
    page.set_input_files("#image input[type=file]", write_image(tmp_path / "red.png", "red"))
    sync_api.expect(page.locator("img.seen")).to_have_attribute("src", re.compile("^data:image/png"))
    ask(page, "What is it?")
    sync_api.expect(page.locator(".told:visible").first).to_contain_text("looks at no images")
    assert set(said) <= {"Method not implemented."}  # Gradio's own, where an upload's progress ends
    said.clear()


@pytest.fixture
def echo(site, base):
    """An engine whose models say what they were asked, so that their words can be anything."""
    each = site.engine.each

    def repeating(models, prompt, settings):
        from tunesmith.inference.answers import Generation
        from tunesmith.inference.batch import Said

        for number, model in enumerate(models):
            with site.engine.registry.using(model) as entry:
                asked = site.engine.ask(entry, prompt(entry), settings)
            yield number, Said(asked, 0, echo.text, (), Generation((), echo.text, "eos"))

    def echo(text: str) -> None:
        echo.text = text

    echo.text = ""
    site.engine.each = repeating
    yield echo
    site.engine.each = each


def test_nothing_that_is_written_runs(page, site, echo) -> None:
    """Payloads as questions, as answers in both tabs, and as names of runs and what they hold."""
    for number, payload in enumerate(PAYLOADS, 1):
        echo(payload)
        ask(page, payload)
        sync_api.expect(page.locator("#chat .assistant")).to_have_count(number)
    written = [payload for payload in PAYLOADS for _ in range(2)]
    assert page.locator("#chat .turn").all_inner_texts() == written  # every one is there to read, as it was written
    assert page.locator("#chat .turn *").count() == 0
    page.get_by_role("tab", name="Side by side").click()
    for payload in PAYLOADS[:10]:
        echo(payload)
        page.fill("#both-question textarea", payload)
        page.get_by_role("button", name="Ask all").click()
        sync_api.expect(page.locator(".side:visible textarea").first).to_have_value(payload)
        page.wait_for_timeout(500)  # a click before the last answer has ended would be ignored


def test_nothing_that_a_run_is_called_or_holds_runs(page, site, said) -> None:
    names = [payload for payload in PAYLOADS if "/" not in payload and len(payload) < 100]
    assert len(names) > 10
    for number, name in enumerate(names):
        folder = site.runs / name
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        if number % 2:
            (folder / "report.html").write_text("".join(PAYLOADS))
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Look again").click()
    page.wait_for_selector("iframe.report")
    for name in names[::2]:
        choose(page, "Runs in", name)
        page.wait_for_function(
            "name => document.querySelector('iframe.report')?.title === 'report of ' + name", arg=name
        )
        assert "Training loss" in page.frame_locator("iframe.report").locator("body").inner_text()
    for name in names[1::2]:
        choose(page, "Runs in", name)
        sync_api.expect(page.locator("iframe.report")).to_have_attribute("title", f"report of {name}")
    assert any(STOPPED.search(line) for line in said)  # the browser says what it did not run
    said.clear()


def test_a_form_previews_data_and_trains(page, site, said, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Say {n}", "completion": "yes {n}"}}\n' for n in range(12)))
    page.get_by_role("tab", name="Data and training").click()
    field = page.get_by_label("Data: file, folder or name")
    field.fill(str(rows))
    field.press("Enter")
    page.get_by_label("Name of the run").fill("by-form")
    page.fill("#more textarea", "train.batch_size=4\ndata.valid_size=4\nadapter.rank=2\nmodel.device=cpu")
    told = page.locator("#said textarea")
    page.get_by_role("button", name="Preview data").click()
    sync_api.expect(told).to_have_value(re.compile(r"\[\[yes \d[\s\S]*done\n$"), timeout=60_000)
    page.get_by_role("button", name="Train", exact=True).click()
    sync_api.expect(told).to_have_value(re.compile(r"by-form\ndone\n$"), timeout=120_000)
    page.get_by_role("tab", name="Runs").click()
    sync_api.expect(page.locator("iframe.report")).to_have_attribute("title", "report of by-form")
    page.reload()
    said.clear()  # what was under way is aborted, and Gradio says so
    page.wait_for_selector("#question textarea")
    choose(page, "Answered by", "by-form")  # it is loaded when it is first asked
    ask(page, "Say 3")
    ended(page, 1)
    assert "by-form" in [entry.name for entry in site.engine.registry.entries]


def test_a_browser_with_the_key_gets_in(browser, base, adapters, tmp_path) -> None:
    site = Site(base, adapters, tmp_path, key=KEY)
    try:
        for password, status in ((KEY, 200), ("wrong-" + KEY, 401)):
            context = browser.new_context(http_credentials={"username": "anybody", "password": password})
            tab = context.new_page()
            assert tab.goto(site.url).status == status
            if status == 200:
                tab.wait_for_selector("#question textarea")
                ask(tab, "Hello")
                sync_api.expect(tab.locator("#chat .assistant")).to_have_count(1)
            context.close()
    finally:
        site.close()
