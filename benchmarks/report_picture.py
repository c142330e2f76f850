"""A picture of the top of a report's page, as the README shows it.

Run `python benchmarks/report_picture.py runs/demo/report.html docs/report.png` after `make demo`;
it needs Chromium on PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

WIDTH: Final = 960
HEIGHT: Final = 1_245


def main() -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    page_path, picture_path = (Path(word).resolve() for word in sys.argv[1:3])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_path.as_uri())
        page.screenshot(path=picture_path)
        browser.close()
    # 64 colors are enough, and a third of the size.
    Image.open(picture_path).convert("RGB").quantize(64).save(picture_path, optimize=True)
    print(f"{picture_path}: {picture_path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
