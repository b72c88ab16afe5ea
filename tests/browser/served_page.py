"""Drives the page of `tools/ask.py --serve` in Chromium as a user does. `make test-browser` runs it.

    .venv-browser/bin/python tests/browser/served_page.py            # --pictures FOLDER keeps screenshots

It starts the server with the demo's checkpoint in .venv, and needs Playwright itself.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PASTE = """([bytes, type, event]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type}));
  const made = event === "drop" ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
    : new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true});
  document.body.dispatchEvent(made);
}"""


def picture(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 45), colour).save(file, "PNG")
    return file.getvalue()


def hold_answers(page: Page):
    """From now on, the page sees answers of a server that never ends them."""
    page.evaluate("""() => { window.fetch = (url, {signal}) => Promise.resolve(new Response(new ReadableStream({
      start(control) {
        control.enqueue(new TextEncoder().encode('{"text": "It is a <b>'));
        control.enqueue(new TextEncoder().encode('3</b>"}\\n'));
        signal.addEventListener("abort", () => control.error(new DOMException("", "AbortError")));
      }})));}""")


def check(page: Page, url: str, pictures: Path | None, width: int):
    messages, requests = [], []
    page.on("console", lambda m: messages.append(m.text))
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(url)
    ask, question = page.get_by_role("button", name="Ask", exact=True), page.get_by_role("textbox", name="Question")
    asked, answers, waiting = page.locator(".user"), page.locator(".assistant"), page.locator("#images .picture")
    expect(page.locator("#about")).to_have_text("demo/base_checkpoint, up to 1 crops a picture and 20 tokens an answer")
    expect(question).to_be_focused()
    expect(ask).to_be_disabled()

    # A chosen, a dropped and a pasted picture; one is removed again.
    file = {"name": "chosen.png", "mimeType": "image/png", "buffer": picture("red")}
    page.locator("#files").set_input_files([file])
    expect(waiting).to_have_count(1)
    for n, event in ((2, "drop"), (3, "paste")):
        page.evaluate(PASTE, [list(picture("green")), "image/png", event])
        expect(waiting).to_have_count(n)
    page.get_by_role("button", name="Remove chosen.png").click()
    expect(waiting).to_have_count(2)

    # The first question takes the pictures along, and the second remembers the first.
    question.fill("What digit is this?")
    with page.expect_request("**/ask") as sent:
        question.press("Enter")
    (turn,) = json.loads(sent.value.post_data)["turns"]
    assert len(turn["images"]) == 2 and turn["user"] == "What digit is this?", turn
    expect(asked.first.locator("img")).to_have_count(2)
    expect(waiting).to_have_count(0)
    expect(answers.first).not_to_have_attribute("aria-busy", "true", timeout=60_000)
    first = answers.first.inner_text()
    assert first.strip()
    question.fill("And\nwhy?")
    with page.expect_request("**/ask") as sent:
        ask.click()
    turns = json.loads(sent.value.post_data)["turns"]
    assert [t["user"] for t in turns] == ["What digit is this?", "And\nwhy?"], turns
    assert turns[0]["assistant"].strip() == first.strip() and not turns[1]["images"]
    expect(answers.nth(1)).not_to_have_attribute("aria-busy", "true", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    if pictures:
        page.screenshot(path=pictures / f"answered-{width}.png")

    # A file that is no picture: the server's reason is shown, and the question can be asked again without it.
    page.locator("#files").set_input_files([{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    expect(waiting.locator(".name")).to_have_text("notes.txt")
    question.fill("What is this?")
    ask.click()
    expect(page.get_by_role("alert")).to_contain_text("can't be read as an image", timeout=60_000)
    expect(question).to_have_value("What is this?")
    expect(asked).to_have_count(2)
    if pictures:
        page.screenshot(path=pictures / f"error-{width}.png")
    page.get_by_role("button", name="Remove notes.txt").click()
    ask.click()
    expect(answers).to_have_count(3)
    expect(answers.nth(2)).not_to_have_attribute("aria-busy", "true", timeout=60_000)

    # Stop keeps what was seen; what a model writes is text, never part of the page.
    hold_answers(page)
    question.fill("Again?")
    ask.click()
    expect(answers.nth(3)).to_have_text("It is a <b>3</b>")
    expect(ask).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(answers.nth(3)).not_to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()

    # A new conversation, also while an answer is awaited.
    question.fill("Once more?")
    ask.click()
    expect(answers).to_have_count(5)
    page.get_by_role("button", name="New conversation").click()
    expect(asked).to_have_count(0)
    expect(answers).to_have_count(0)
    page.reload()
    question.fill("Hello?")
    with page.expect_request("**/ask") as sent:
        ask.click()
    assert len(json.loads(sent.value.post_data)["turns"]) == 1
    expect(answers.first).not_to_have_attribute("aria-busy", "true", timeout=60_000)

    elsewhere = [r for r in requests if not r.startswith((url, "blob:", "data:"))]
    assert not elsewhere and not messages, (elsewhere, messages)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    command = [ROOT / ".venv/bin/python", "tools/ask.py", "demo/base_checkpoint", "--max_new_tokens", "20"]
    server = subprocess.Popen(
        [*command, "--serve", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = server.stdout.readline()
        if not said.startswith("open http://"):
            sys.exit(f"the server did not start: {said}{server.communicate()[1]}")
        url = said.split()[1] + "/"
        urllib.request.urlopen(url).close()
        with sync_playwright() as playwright:
            found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
            browser = playwright.chromium.launch(executable_path=found[0] if found else None, args=["--no-sandbox"])
            for width, height, scheme in ((1200, 800, "light"), (390, 844, "dark")):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                check(page, url, args.pictures, width)
                page.close()
                print(f"the page works in Chromium {browser.version}, {width} pixels wide, {scheme}", flush=True)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
