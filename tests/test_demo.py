"""The demo: its requests over HTTP, what they refuse, and the page in a browser."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.asking import QUESTIONS, answerer, picture
from tests.helpers import component
from toolkit import Sampling, demo
from toolkit.contracts import Turn
from toolkit.demo_server import Server, hosts
from toolkit.demo_state import KEPT, Desk, orders, shown
from toolkit.session import Answerer
from toolkit.trunk import ScanSteps

OPTIONS = Sampling(max_new_tokens=12, temperature=1.3, top_p=0.97, seed=3)
SENT = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.97, "seed": 3}


def png(number: int) -> bytes:
    held = io.BytesIO()
    picture(number).save(held, "PNG")
    return held.getvalue()


class Page:
    """What the page's script does, by hand."""

    def __init__(self, server: Server) -> None:
        self.server = server
        text = self.ask("GET", "/")[1].decode()
        found = re.search(r'key = "([^"{]+)"', text)
        assert found and "{{" not in text
        self.key = found[1]

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        link.request(method, path, body or None, headers)
        answer = link.getresponse()
        found = answer.status, answer.read()
        link.close()
        return found

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        code, said = self.ask(
            "POST", path, data, **{"X-Demo-Key": self.key, "Content-Length": str(len(data))}
        )
        lines = [json.loads(line) for line in said.splitlines()]
        return code, lines if path == "/ask" and code == 200 else lines[0]

    def begin(self, image: bytes) -> str:
        code, found = self.post("/begin", image)
        assert code == 200, found
        return str(found["conversation"])

    def question(self, conversation: str, text: str, options: Any = SENT) -> tuple[int, Any]:
        return self.post("/ask", {"conversation": conversation, "question": text, "options": options})


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("text", "") for event in events)


@pytest.fixture
def page() -> Iterator[Page]:
    desk = Desk(answerer(prompt="sandwich"))
    with Server(desk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Page(server)
        server.shutdown()
        thread.join()


def test_turns_keep_the_state_and_a_new_image_begins_anew(page: Page) -> None:
    model = answerer(prompt="sandwich")
    chat = model.chat(picture(1))
    expected = [chat.ask(question, OPTIONS) for question in QUESTIONS]
    name = page.begin(png(1))
    for question, wanted in zip(QUESTIONS, expected, strict=True):
        code, events = page.question(name, question)
        assert (code, text_of(events)) == (200, wanted)
        assert events[-1]["done"] and 0 < events[-1]["tokens"] <= 12
        assert all("text" in event for event in events[1:-1])
    assert [event for event in events if "read" in event] == events[:1]
    assert events[0]["read"] == [{"text": f"User: {QUESTIONS[2]}\n\nAssistant:"}]
    other = page.begin(png(2))
    code, events = page.question(other, QUESTIONS[0])
    assert text_of(events) == model.answer(picture(2), QUESTIONS[0], OPTIONS) != expected[0]
    assert {"image": True} in events[0]["read"]
    alone = page.begin(b"")
    assert text_of(page.question(alone, QUESTIONS[0])[1]) == model.answer(None, QUESTIONS[0], OPTIONS)


def test_the_page_is_told_scan_and_layout(page: Page) -> None:
    about = json.loads(page.ask("GET", "/about")[1])
    assert about["options"]["max_new_tokens"] == 256 and about["parameters"] > 1000
    scan = about["scan"]
    assert scan["grid"] == [2, 2] and [o["layers"] for o in scan["orders"]] == [[0], [1], [2], [3]]
    assert scan["orders"][2]["order"] == [0, 2, 1, 3]
    assert [next(iter(s)) for s in scan["layout"]] == ["text", "image", "text"]


@pytest.mark.parametrize("name", ["uni", "bi", "2d", "rotation", "spiral", "hilbert"])
def test_orders_come_back_from_the_steps(name: str) -> None:
    table = component("scan", name)(5, 4, 6)
    assert orders(ScanSteps(table)) == [tuple(row) for row in table]


def test_layouts_as_shown() -> None:
    turns = [Turn("human", "<image>\nhow many?")]
    assert shown(component("prompt", "prefix")(turns)) == [
        {"text": "User: "},
        {"image": True},
        {"text": "\nhow many?\n\nAssistant:"},
    ]


def test_what_is_refused_is_said(page: Page) -> None:
    name = page.begin(png(1))
    for (code, said), wanted in [
        (page.post("/begin", b"GIF89a" * 9), "no JPEG, PNG or WebP"),
        (page.question(name, " "), "the question is empty"),
        (page.question(name, "are there dragons?"), "model.vocab=world"),
        (page.question(name, QUESTIONS[0], {"temperature": -1}), "temperature=-1: must be"),
        (page.question(name, QUESTIONS[0], {"temprature": 1}), "options are "),
        (page.question(name, QUESTIONS[0], [1]), "options are "),
        (page.question("unknown", QUESTIONS[0]), "no longer kept"),
        (page.post("/ask", {"conversation": name}), "lacks its question"),
        (page.post("/ask", b"{"), "no JSON"),
        (page.post("/ask", b"[]"), "no JSON object"),
    ]:
        assert code == 400 and wanted in said["error"], (code, said)
    assert page.question(name, QUESTIONS[0])[0] == 200  # none of it harmed the conversation
    assert page.post("/other", {})[0] == 404 and page.ask("GET", "/etc/passwd")[0] == 404


def test_other_sites_cannot_ask(page: Page) -> None:
    body = json.dumps({"conversation": "x"}).encode()
    assert page.ask("POST", "/stop", body)[0] == 403
    assert page.ask("POST", "/stop", body, **{"X-Demo-Key": "k\u00fc"})[0] == 403
    evil = {"Host": "evil.example", "X-Demo-Key": page.key}
    assert page.ask("POST", "/stop", body, **evil)[0] == 403 and page.ask("GET", "/", **evil)[0] == 403
    huge = {"X-Demo-Key": page.key, "Content-Length": str(1 << 40)}
    assert page.ask("POST", "/begin", b"", **huge)[0] == 413


def test_names_of_this_machine() -> None:
    assert hosts(7860) == {"127.0.0.1:7860", "localhost:7860", "[::1]:7860"}
    assert {"127.0.0.1", "localhost:80"} < hosts(80)  # browsers leave out the port of http


def test_an_answer_can_be_stopped_and_the_conversation_goes_on() -> None:
    desk = Desk(answerer())
    name = desk.begin(png(1))
    events = desk.ask(name, QUESTIONS[1], Sampling(max_new_tokens=200, temperature=2, seed=5))
    with pytest.raises(ValueError, match="still answering"):
        desk.ask(name, QUESTIONS[0], OPTIONS)
    assert "read" in next(events)
    next(events)
    desk.stop(name)
    (last,) = events
    assert last["done"] and last["tokens"] < 150
    left = desk.ask(name, QUESTIONS[0], OPTIONS)
    left.close()  # type: ignore[attr-defined]  # the page was closed before anything came
    assert any("done" in event for event in desk.ask(name, QUESTIONS[0], OPTIONS))


def test_nothing_computes_once_the_desk_is_closed() -> None:
    """Ctrl-C: a thread that is inside torch while Python ends would abort the process."""
    desk = Desk(answerer())
    events = desk.ask(desk.begin(png(1)), QUESTIONS[1], Sampling(max_new_tokens=200, temperature=2, seed=5))
    next(events)
    desk.close()
    reader = threading.Thread(target=lambda: list(events), daemon=True)
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()


def test_a_picture_that_is_too_large_is_refused_in_words(page: Page) -> None:
    code, said = page.post("/begin", b"\x89PNG" + bytes(33 << 20))
    assert code == 413 and "at most 32 MiB" in said["error"]


def test_a_language_model_alone_is_asked_without_a_picture() -> None:
    whole = answerer()
    desk = Desk(Answerer(whole.rwkv, whole.tokenizer, whole.prompt, None, "text"))
    assert desk.about()["scan"] is None
    with pytest.raises(ValueError, match="text has no vision parts"):
        desk.begin(png(1))
    events = list(desk.ask(desk.begin(b""), QUESTIONS[0], OPTIONS))
    assert text_of(events) == whole.answer(None, QUESTIONS[0], OPTIONS)


def test_old_conversations_are_dropped() -> None:
    desk = Desk(answerer())
    first, second = desk.begin(b""), desk.begin(b"")
    for _ in range(KEPT - 2):
        desk.begin(b"")
    desk.stop(first)  # asked for just now: the second is the oldest
    desk.begin(b"")
    desk.stop(first)
    with pytest.raises(ValueError, match="no longer kept"):
        desk.stop(second)


def test_wrong_words_are_told_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, toolkit.demo as d\n"
        "assert d.main(['run=nowhere']) == 2 and d.main(['--help']) == 0\n"
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    for words, message in [
        (["prot=1"], "prot: no such key\n  did you mean: port"),
        (["port=99999"], "port: given 99999, must be"),
        (["--open"], "no option --open"),
        (["run=a", "weights=b"], "weights: given beside run"),
    ]:
        assert demo.main(words) == 2
        assert message in capsys.readouterr().err


def browser() -> Any:
    """Headless Chromium, or a skip that says what is missing."""
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    return sync.sync_playwright(), path


def test_in_a_browser(page: Page, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    model = answerer(prompt="sandwich")
    chat = model.chat(picture(1))
    expected = [chat.ask(q, Sampling(max_new_tokens=12)) for q in QUESTIONS[:2]]
    started, path = browser()
    with started as play:
        window = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = window.new_page()
        faults: list[str] = []
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        tab.goto(page.server.url)
        tab.set_input_files("#file", tmp_path / "a.png")
        tab.fill("#max_new_tokens", "12")
        for number, question in enumerate(QUESTIONS[:2]):
            tab.fill("#question", question)
            tab.press("#question", "Enter")
            tab.locator(".gpt small").nth(number).wait_for()
        said = tab.locator(".gpt .bubble").all_inner_texts()
        assert [s.split() for s in said] == [(e or "(nothing)").split() for e in expected]
        assert tab.locator("#path line").count() == 3 and tab.locator("#orders button").count() == 4
        assert "2 × 2 patches + class token" in tab.inner_text("#layout")
        tab.set_input_files("#file", tmp_path / "b.png")
        assert tab.locator(".turn").count() == 0  # a new picture begins anew
        tab.fill("#question", QUESTIONS[0])
        tab.click("#send")
        tab.wait_for_selector(".gpt small")
        again = model.answer(picture(2), QUESTIONS[0], Sampling(max_new_tokens=12))
        assert tab.inner_text(".gpt .bubble").split() == (again or "(nothing)").split()
        tab.uncheck("#keep")
        tab.fill("#question", QUESTIONS[0])
        tab.press("#question", "Enter")
        tab.locator(".gpt small").nth(1).wait_for()
        assert len(set(tab.locator(".gpt .bubble").all_inner_texts())) == 1  # asked anew: the same answer
        tab.fill("#question", "are there dragons?")
        tab.click("#send")
        tab.wait_for_selector(".error")
        assert "model.vocab=world" in tab.inner_text(".error")
        window.close()
    assert [f for f in faults if "400" not in f] == []  # the refused question is logged by the browser
