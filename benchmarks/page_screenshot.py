"""Takes the README's picture of the page: `page_screenshot.py RUN benchmarks/page.jpg`.

RUN is a run of the demonstration (`./launch.sh`), whose lesions are drawn, so that the picture
shows nobody's skin. Needs requirements-test.txt and Debian's package chromium.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ham_jax.data import image, synthetic  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
MAX_BYTES = 250_000
LESIONS = {"lesion 1.png": ("mel", 3), "lesion 2.png": ("bkl", 4)}  # diagnosis, number


def draw(folder: Path) -> list[Path]:
    """Writes two lesions and a picture unlike them; returns their paths."""
    pictures = {
        name: synthetic.draw(dx, [1, number], [2, number]) for name, (dx, number) in LESIONS.items()
    }
    y, x = np.mgrid[:120, :160]
    sky = np.stack([90 + y / 2, 150 + y / 2, 220 + y / 8], -1)
    sky[(y - 20) ** 2 + (x - 130) ** 2 < 150] = 255, 225, 120
    sky[(y > 45) & (abs(x - 70) < y - 40) & (y < 90)] = 150, 70, 50
    sky[y > 90] = 70, 120, 60
    pictures["roof.png"] = sky.clip(0, 255).astype(np.uint8)
    for name, pixels in pictures.items():
        (folder / name).write_bytes(image.png(pixels))
    return [folder / name for name in pictures]


def fill(page: Page, photographs: list[Path]) -> None:
    """Adds photographs, and asks for the first one's heat map."""
    page.locator("#files").set_input_files(photographs)
    expect(page.locator(".card")).to_have_count(len(photographs))
    expect(page.locator("[aria-busy]")).to_have_count(0, timeout=60_000)
    page.get_by_role("button", name="Heat map").first.click()
    expect(page.locator("img[alt^='Heat map']")).to_have_count(1)


def shoot(address: str, photographs: list[Path], output: Path) -> list[str]:
    """Writes the picture; returns what the browser found wrong."""
    wrong: list[str] = []
    with sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1180})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text))
        page.goto(address)
        fill(page, photographs)
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=output, type="jpeg", quality=85, animations="disabled")
        browser.close()
    return wrong


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 where the browser or the size is wrong, 2 for wrong input."""
    if len(argv) != 2:
        print((__doc__ or "").splitlines()[0], file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "ham_jax.main", "--mode=serve", f"--workdir={argv[0]}"]
    output = Path(argv[1]).absolute()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [*command, "--port=0"], cwd=HERE.parent, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        try:
            assert server.stdout
            address = next(line.split()[1] for line in server.stdout if line.startswith("Open "))
            wrong = shoot(address, draw(Path(folder)), output)
        finally:
            server.terminate()
    if output.stat().st_size > MAX_BYTES:
        wrong.append(f"it has {output.stat().st_size} bytes, more than {MAX_BYTES}")
    print(f"{output}: {'; '.join(wrong) or 'good'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
