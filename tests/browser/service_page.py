"""The service's page in a browser, over the real application and tiny models; what its tests do with it."""

import base64
import io
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from components.sampling.cascade import compose
from components.sampling.requests import settings_of, with_settings
from components.serving.messages import Event, FinishedImage, ImageJob
from tests.serving_backend import SmallBackend
from tests.tiny_cascade import FEW, SAMPLING, UNET, write_model, write_models
from tests.tiny_palette import PALETTE

SIDE = 16
PIXELS = """image => {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}"""
WATCH = """() => {
  [window.seen, window.told] = [[], []];
  new MutationObserver(async () => {
    const text = document.querySelector("#view .progress")?.textContent;
    if (text && window.told.at(-1) !== text) window.told.push(text);
    const image = document.querySelector("#view .frame img");
    if (!image?.src || image.hidden) return;
    await image.decode().catch(() => null);
    const canvas = Object.assign(document.createElement("canvas"), {width: 16, height: 16});
    canvas.getContext("2d").drawImage(image, 0, 0, 16, 16);
    const now = canvas.toDataURL();
    if (window.seen.at(-1) !== now) window.seen.push(now);
  }).observe(document.getElementById("view"), {subtree: true, childList: true, attributes: true, characterData: true});
}"""
DROP = """([bytes, name, selector]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(bytes), each => each.charCodeAt(0))], name, {type: "image/png"}));
  const target = document.querySelector(selector);
  for (const type of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
  }
}"""


class KeepingBackend(SmallBackend):
    """Its PNGs say how they were made, as those of a replica do."""

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        async with aclosing(super().make(job)) as events:
            async for event in events:
                if isinstance(event, FinishedImage):
                    settings = settings_of(job.requests[event.image], model=self.name, version=self.version)
                    event = event._replace(png=with_settings(event.png, settings))
                yield event


def write_whole_cascade(folder: Path) -> Path:
    """Diffusion and tokens of the tiny cascade, with an image-to-image model of the same size."""
    parts = write_models(folder / "models")
    network = UNET | {"resolution": SIDE, "num_classes": None, "text": None, "condition_image_channels": 4}
    parts["model"] = write_model(folder / "models" / "palette", "unet", network, PALETTE)
    upsamplers = {"upsampler_16": parts.pop("upsampler_16")}
    return compose(folder / "cascade", **parts, upsamplers=upsamplers, sampling=SAMPLING | {"model": FEW})


def ready(page: Page) -> Page:
    """The page, once its controls are built."""
    page.locator("#version:not(:empty)").wait_for()
    return page


def make(page: Page, **fields: str) -> None:
    """Fill fields by their ids, press Make, and wait until every image is finished."""
    for name, value in fields.items():
        field = page.locator(f"#{name}")
        field.select_option(value) if field.evaluate("each => each.tagName") == "SELECT" else field.fill(value)
    page.locator("#make").click()
    finished(page)


def finished(page: Page) -> None:
    page.locator("#make:enabled").wait_for()
    assert page.locator("#trouble").is_hidden(), page.locator("#trouble").text_content()
    page.locator("#view .tile figcaption .tools").first.wait_for()


def pixels(page: Page, tile: int = 0) -> np.ndarray:
    """uint8 (H, W, 3) of a tile's image as it is shown."""
    return decoded(page.locator("#view .frame img").nth(tile).evaluate(PIXELS))


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def drop(page: Page, data: bytes, name: str = "image.png", on: str = "#work") -> None:
    """Drop a file on an element."""
    page.evaluate(DROP, [base64.b64encode(data).decode(), name, on])
