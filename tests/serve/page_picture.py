"""Take the picture of the page under load that the README shows: python tests/serve/page_picture.py URL OUT.png"""

import sys
from pathlib import Path

from webdriver import chromium

PROMPT = "The function returns an array of"


def main(url: str, out: Path) -> None:
    with chromium() as browser:
        browser.cdp("Emulation.setDeviceMetricsOverride", width=1440, height=1250, deviceScaleFactor=1, mobile=False)
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        browser.open(url)
        browser.wait("document.querySelector('#status').textContent === 'ready'")
        browser.type("#prompt", PROMPT)
        browser.click("#send")
        browser.wait("!document.querySelector('#send').disabled")
        num = browser.run("return document.querySelector('#load-num').max")
        browser.type("#load-num", str(int(num) - 4))
        browser.type("#load-tokens", browser.run("return document.querySelector('#load-tokens').max"))
        browser.click("#load-go")
        # Once the first requests have ended and others have their slots.
        browser.wait("/ [1-9][0-9]* of /.test(document.querySelector('#load-note').textContent)")
        browser.click("#send")
        browser.wait(
            "document.querySelectorAll('#slots .decode').length === document.querySelectorAll('#slots li').length"
            " && document.querySelectorAll('#pages .used').length * 2.5 > document.querySelectorAll('#pages i').length"
        )
        out.write_bytes(browser.screenshot())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
