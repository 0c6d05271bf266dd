"""The page in headless Chromium: python page.py http://127.0.0.1:8000 [FOLDER FOR PICTURES]

    pip install playwright    (a Chromium of the system is used: apt-get install chromium)

Streaming, stopping, reloading, phone width, keyboard, dark and light, a 100,000-token paste, what
the model read, and a server that goes away (a proxy in this script that is shut).
"""

import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time

from playwright.sync_api import sync_playwright


class Proxy:
    """Passes bytes on to the server until it is shut; slowly, where a test wants to interrupt."""

    def __init__(self, host, port, at=0):
        self.to, self.open, self.pairs, self.slow = (host, port), True, [], False
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", at))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while self.open:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.to)
            self.pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(a, b, b is near), daemon=True).start()

    def copy(self, a, b, back):
        try:
            while data := a.recv(400 if self.slow and back else 65536):
                time.sleep(0.02 if self.slow and back else 0)
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def shut(self):
        self.open = False
        for end in [self.listener, *self.pairs]:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()


def main():
    url = sys.argv[1].rstrip("/")
    pictures = pathlib.Path((sys.argv + [tempfile.mkdtemp()])[2])
    host, port = url.split("//")[1].split(":")
    proxy = Proxy(host, int(port))
    url = f"http://127.0.0.1:{proxy.port}"
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text)
                if line.type == "error" and "ERR_" not in line.text and "status of" not in line.text else None)
        elsewhere = []
        page.on("request", lambda asked: elsewhere.append(asked.url)
                if not asked.url.startswith((url, "data:")) else None)
        status = page.locator("#status")

        def until(what, seconds=30):
            """Waits for an expression; Playwright's own way needs eval, which the page forbids."""
            end = time.time() + seconds
            while not page.evaluate(what):
                assert time.time() < end, f"{what}: {status.inner_text()}"
                time.sleep(0.02)

        def ready():
            until("!document.getElementById('model').disabled")

        def done(seconds=60):
            until("document.getElementById('send').textContent === 'Send'", seconds)

        page.goto(url)
        ready()
        # Keyboard alone: the input has the focus.
        page.keyboard.type("Say something about sparse attention, at some length.")
        page.keyboard.press("Enter")
        until("document.querySelector('.turn.assistant .text')?.textContent.length > 20")
        done()
        assert "tokens/s" in status.inner_text(), status.inner_text()
        print("streaming:", status.inner_text())
        page.screenshot(path=pictures / "answer.png")

        proxy.slow = True
        page.keyboard.type("Again")
        page.keyboard.press("Enter")
        until("document.querySelectorAll('.turn.assistant .text')[1]?.textContent.length > 5")
        page.keyboard.press("Escape")
        done(2)
        assert "stopped" in status.inner_text(), status.inner_text()
        print("stop:", status.inner_text())
        proxy.slow = False

        said = page.locator(".turn").count()
        time.sleep(0.5)
        page.reload()
        ready()
        assert page.locator(".turn").count() == said
        print("reload: all", said, "turns are there")

        button = page.locator("#reads")
        if button.is_visible():
            button.click()
            page.locator("#input").fill("What is read for the next words? " * 20)
            page.keyboard.press("Enter")
            page.locator("#input").press("Enter")
            until("document.querySelectorAll('.word').length > 10")
            done()
            page.locator(".word").nth(8).hover()
            assert page.locator("#context").is_visible()
            warm = page.evaluate(
                "[...document.querySelectorAll('.block')].filter(b => Number(b.style.getPropertyValue('--warm')) > 0).length")
            assert warm > 0
            page.locator(".word").nth(8).click()
            page.screenshot(path=pictures / "reads.png")
            before = page.locator("#legend").inner_text()
            page.locator("#talk").focus()
            page.keyboard.press("ArrowRight")
            print("reads:", before)
            page.set_viewport_size({"width": 375, "height": 720})
            page.screenshot(path=pictures / "phone-reads.png")
            page.locator("#close-context").click()
            button.click()

        page.set_viewport_size({"width": 375, "height": 720})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 375, wide
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=pictures / f"phone-{scheme}.png")
        print("phone: nothing is wider than the screen")
        page.set_viewport_size({"width": 1200, "height": 800})

        # A paste of about 100,000 tokens; the page has to answer within a second all along.
        page.evaluate("""() => {
            window.gaps = 0; let last = performance.now();
            setInterval(() => { const now = performance.now(); window.gaps = Math.max(window.gaps, now - last); last = now; }, 50);
        }""")
        page.locator("#clear").click()
        page.evaluate("navigator.clipboard ?? 0")
        page.locator("#input").focus()
        text = "The quick brown fox jumps over the lazy dog. " * 10_000
        begun = time.time()
        page.evaluate("text => document.execCommand('insertText', false, text)", text)
        page.evaluate("window.gaps = 0")
        inserted = time.time() - begun
        page.keyboard.press("Enter")
        done(120)
        page.locator("#talk").hover()
        page.mouse.wheel(0, -2000)
        time.sleep(0.5)
        gap = page.evaluate("window.gaps")
        notice = page.locator("#notice").inner_text() if page.locator("#notice").is_visible() else ""
        print(f"paste of {len(text)} characters: taken in {inserted:.1f} s, then never still for more than "
              f"{gap:.0f} ms; the server: {notice or status.inner_text()}")
        assert gap < 1000, gap
        page.locator("#clear").click()

        proxy.slow = True
        page.keyboard.type("Tell me a long story.")
        page.keyboard.press("Enter")
        until("document.querySelector('.turn.assistant .text')?.textContent.length > 5")
        proxy.shut()
        page.wait_for_selector("#notice:not([hidden])", timeout=10_000)
        print("gone:", page.locator("#notice").inner_text())
        page.screenshot(path=pictures / "gone.png")
        proxy = Proxy(host, int(port), proxy.port)
        page.locator("#notice button").click()
        until("document.querySelector('.turn.assistant .text')?.textContent.length > 5")
        done()
        assert page.locator("#notice").is_hidden()
        assert page.locator(".turn").count() == 2
        print("back:", status.inner_text())
        assert not wrong, wrong
        assert not elsewhere, elsewhere
        print("no errors on the page, nothing asked of anybody else; pictures in", pictures)
        browser.close()


if __name__ == "__main__":
    main()
