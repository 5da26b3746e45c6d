"""Images in the server: as data URLs in a message, for models that look at them; never from an address."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from tests.serve.conftest import KEY, Live, Starter
from tests.vision.small import COLOURS, as_bytes, draw, write_encoder, write_image

from tunesmith import api
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.data.templates import get_template
from tunesmith.errors import DataError, RequestError
from tunesmith.files import atomic_folder
from tunesmith.serve.ui.talk import Ask, answers, preview

httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")


def url_of(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(as_bytes(draw(colour, "disc"))).decode()


@pytest.fixture(scope="module")
def eyes(base: Path, tmp_path_factory) -> Path:
    """An adapter that looks, disturbed so that what it sees changes what is said."""
    from tests.laws.small import disturb

    folder = tmp_path_factory.mktemp("eyes")
    encoder = write_encoder(folder / "encoder")
    loaded = api.load(base, dtype="float32", device="cpu")
    adapter = api.attach(loaded, "image_projection", "eyes", encoder=str(encoder), seed=3)
    disturb(adapter, 3, std=3.0)
    with atomic_folder(folder / "eyes") as target:
        save_adapter(
            target, adapter, base=str(loaded.path), identity=loaded.identity,
            template=get_template("chat", loaded.tokenizer).to_dict(), tokenizer=loaded.tokenizer.fingerprint(),
        )  # fmt: skip
    return folder / "eyes"


@pytest.fixture(scope="module")
def seeing(start: Starter, eyes: Path) -> Live:
    """A server with that adapter and one that sees nothing."""
    live = start(names=("alpha",))
    live.engine.call(lambda: live.engine.registry.add("eyes", eyes)).result(60)
    return live


def ask(live: Live, content, model="eyes", role="user") -> httpx.Response:
    body = {"model": model, "temperature": 0, "max_tokens": 6, "messages": [{"role": role, "content": content}]}
    if role != "user":
        body["messages"].append({"role": "user", "content": "Hi."})
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def about(*urls: str, text: str = "What is it?") -> list:
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_an_image_is_seen_as_the_model_alone_sees_it(seeing, eyes, tmp_path) -> None:
    loaded = api.load(eyes, dtype="float32", device="cpu")
    for colour in COLOURS:
        file = write_image(tmp_path / f"{colour}.png", colour)
        url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        alone = api.generate(loaded, "What is it?", image=file, temperature=0, max_new_tokens=6)["text"]
        assert said(ask(seeing, about(url))) == alone
    answers_ = {said(ask(seeing, about(url_of(colour)))) for colour in COLOURS}
    assert len(answers_ | {said(ask(seeing, "What is it?"))}) > 1  # and what is seen matters


def test_requests_with_and_without_images_share_a_batch(seeing) -> None:
    contents = [about(url_of("red")), "What is it?", about(url_of("blue")), about(url_of("green"))] * 3
    alone = [said(ask(seeing, content)) for content in contents[:4]]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(12) as pool:
        together = [*pool.map(lambda content: said(ask(seeing, content)), contents)]
    assert together == alone * 3


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (about("http://elsewhere.test/a.png"), "never fetched"),
        (about("file:///etc/passwd"), "never fetched"),
        (about("/etc/passwd"), "never fetched"),
        (about("data:image/png;base64,!!"), "not base64"),
        (about("data:text/html,hello"), "no data URL of an image"),
        (about("data:image/png;base64," + base64.b64encode(b"nothing").decode()), "image"),
        (about(url_of("red"), url_of("blue")), "about one image"),
        ([{"type": "image_url"}], "image_url"),
        ([{"type": "image_url", "image_url": url_of("red")}], "image_url"),
        ([{"type": "input_audio", "input_audio": {}}], "type"),
    ],
)
def test_what_is_no_image_is_refused(seeing, content, line) -> None:
    found = ask(seeing, content)
    assert found.status_code == 400 and line in found.json()["error"]["message"]


def test_a_model_that_sees_nothing_says_so(seeing) -> None:
    for model in ("alpha", "base"):
        found = ask(seeing, about(url_of("red")), model)
        assert found.status_code == 400 and "looks at no images" in found.json()["error"]["message"]
    found = ask(seeing, about(url_of("red")), role="system")
    assert found.status_code == 400 and "belongs to a message of the user" in found.json()["error"]["message"]


def test_the_page_shows_the_image_to_the_model(seeing, tmp_path) -> None:
    file = write_image(tmp_path / "red.png", "red")
    engine, form = seeing.engine, Ask(temperature=0, max_new_tokens=6)
    texts, _ = [*answers(engine, ["eyes"], [], "What is it?", form, 64, file)][-1]
    assert texts == [said(ask(seeing, about(url_of("red"))))]
    with pytest.raises(RequestError, match="looks at no images"):
        next(answers(engine, ["alpha"], [], "What is it?", form, 64, file))
    assert preview(file).startswith("data:image/png;base64,")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match="the image"):
        preview(broken)
