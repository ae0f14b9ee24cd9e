"""What clients send that can't be met, and the answer: the cases of the test, and of the table in docs/SERVING.md."""

import base64
import io
import json
import struct
import zlib
from typing import Any, NamedTuple

from PIL import Image

from components.serving.settings import Limits

LIMITS = Limits(
    body_bytes=2**17,
    image_pixels=2**16,
    prompt_characters=200,
    images=4,
    steps=20,
    candidates=3,
    output_pixels=2**12,
    partial_images=8,
)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}


class Bad(NamedTuple):
    """A request, and what it is answered."""

    name: str  # of the table's row
    sent: dict[str, Any]  # arguments of a client's request
    status: int
    param: str | None
    message: str  # one that ends in … goes on
    path: str = GENERATIONS
    method: str = "POST"
    service: str = "open"  # or "keyed", that asks for a key


def png(width: int, height: int, color: Any = "gray", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, format="PNG")
    return file.getvalue()


def claimed(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is as large as this."""
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 64))]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def asked(**fields: Any) -> dict[str, Any]:
    """A body of JSON that would be answered but for these fields."""
    return {"json": {"model": "tiny", "label": "food", "n": 1} | fields}


def form(*, image: bytes | None = png(8, 8), mask: bytes | None = png(8, 8, "white"), **fields: Any) -> dict[str, Any]:
    """A form that would be answered but for these fields."""
    files = {name: (f"{name}.png", data) for name, data in (("image", image), ("mask", mask)) if data is not None}
    return {"data": {"model": "base"} | fields, "files": files}


def raw(body: bytes, headers: dict[str, str] = JSON) -> dict[str, Any]:
    return {"content": body, "headers": headers}


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png(8, 8)
CHUNKS = [b"a" * 2**16] * 9  # sent without a length
NOISE = bytes(range(256)) * 600
KEY = "the-key-of-the-tests"
# fmt: off
CASES = (  # what is sent, what is answered
    Bad("no body", raw(b""), 400, None, 'the body must be a JSON object such as {"prompt": "red heart"}'),
    Bad("JSON that ends too early", raw(b'{"prompt": "red'),
        400, None, "the body is no JSON: Unterminated string starting at (character 11)"),
    Bad("JSON in another encoding", raw('{"prompt": "é"}'.encode("latin-1")),
        400, None, "the body can't be read: send JSON in UTF-8, not too deep"),
    Bad("JSON ten thousand lists deep", raw(b"[" * 10_000),
        400, None, "the JSON must have at most 500 fields, lists and objects: send fewer"),
    Bad("JSON of six hundred fields", asked(**{f"a{number}": 1 for number in range(600)}),
        400, None, "the JSON must have at most 500 fields, lists and objects: send fewer"),
    Bad("JSON of seventy thousand signs", asked(user="!" * 70_000),
        413, None, "the JSON must have at most 65536 signs beside letters and digits: send less"),
    Bad("the same fields in a form's JSON", form(sampling=json.dumps({f"a{number}": {} for number in range(600)})),
        400, None, "the JSON must have at most 500 fields, lists and objects: send fewer", EDITS),
    Bad("a list", raw(b"[1, 2]"), 400, None, 'the body must be a JSON object such as {"prompt": "red heart"}'),
    Bad("a form where JSON is wanted", {"data": {"prompt": "red"}},
        415, None, "send JSON: Content-Type must be application/json"),
    Bad("JSON without a Content-Type", raw(b"{}", {}), 415, None, "send JSON: Content-Type must be application/json"),
    Bad("a body larger than the limit", raw(b'{"prompt": "' + b"a" * 2**17 + b'"}'),
        413, None, "the body must have at most 131072 bytes: send smaller images"),
    Bad("the same in chunks, of no length that is told", raw(CHUNKS),
        413, None, "the body must have at most 131072 bytes: send smaller images"),
    Bad("an unknown field", asked(guidence_scale=2.0),
        400, "guidence_scale", "unknown field 'guidence_scale': is guidance_scale meant?"),
    Bad("an unknown field like none", asked(negative="blue"),
        400, "negative", "unknown field 'negative': leave it out"),
    Bad("half of a character as a field", raw(b'{"\\ud800": 1}'),
        400, None, 'the body must be a JSON object such as {"prompt": "red heart"}'),
    Bad("an unknown model", asked(model="dall-e-3"),
        404, "model", "no model 'dall-e-3' is served here: choose tiny or tokens or palette or base or short or depth"),
    Bad("a model's name that is empty", asked(model=""),
        400, "model", "model is empty: leave it out, or say what it is"),
    Bad("no model where several are served", asked(model=None),
        400, "model", "several models are served: set model to tiny or tokens or palette or base or short or depth"),
    Bad("a prompt that is a number", asked(prompt=7), 400, "prompt", "prompt must be text, not 7"),
    Bad("a prompt with half of a character", raw(b'{"model": "tiny", "prompt": "\\ud800"}'),
        400, "prompt", "prompt must be Unicode, without halves of surrogate pairs"),
    Bad("a prompt of too many characters", asked(prompt="a" * 201),
        400, "prompt", "prompt must have at most 200 characters, not 201"),
    Bad("a prompt of too many tokens", asked(prompt="red apple " * 19),
        400, "prompt", "the prompt is too long: 39 tokens, the model takes at most 6"),
    Bad("a prompt for a model that reads none", asked(model="palette", prompt="red", label=None),
        400, "prompt", "this model reads no prompts: leave the prompt empty"),
    Bad("neither label nor prompt", asked(label=None), 400, "label", "give a label or a prompt"),
    Bad("an unknown label", asked(label="cars"),
        400, "label", "unknown label 'cars': the classes are 0 animals, 1 food, 2 flags"),
    Bad("a label beyond the last", asked(label=3),
        400, "label", "unknown label 3: the classes are 0 animals, 1 food, 2 flags"),
    Bad("a label that is true", asked(label=True), 400, "label", "label must be a number or text, not True"),
    Bad("no image", asked(n=0), 400, "n", "n must be at least 1, not 0"),
    Bad("a thousand images", asked(n=1000), 400, "n", "n must be at most 4 here, not 1000"),
    Bad("half an image more", asked(n=1.5), 400, "n", "n must be a whole number, not 1.5"),
    Bad("n as text", asked(n="2"), 400, "n", "n must be a whole number, not '2'"),
    Bad("a seed of 65 bits", asked(seed=2**64),
        400, "seed", "seed must be at most 9223372036854775807, not 18446744073709551616"),
    Bad("a size in words", asked(size="large"),
        400, "size", "size must be auto or WIDTHxHEIGHT in pixels, such as 64x64, not 'large'"),
    Bad("OpenAI's size of a small model", asked(size="1024x1024"),
        400, "size", "size must have at most 4096 pixels here, not 1024x1024"),
    Bad("a size that the generator does not make", asked(size="32x32"),
        400, "size", "the diffusion generator makes no images of 32x32: ask for auto or 16x16"),
    Bad("a size that is no multiple", asked(model="tokens", size="18x16"),
        400, "size", "size must be multiples of 4 of at least 16x16, not 18x16"),
    Bad("images as addresses", asked(response_format="url"),
        400, "response_format", "response_format must be b64_json, not 'url': no image is kept that a url could name"),
    Bad("an unknown format", asked(output_format="gif"),
        400, "output_format", "output_format must be png, jpeg or webp, not 'gif': no other format is written"),
    Bad("a compression out of range", asked(output_format="jpeg", output_compression=101),
        400, "output_compression", "output_compression must be at most 100, not 101"),
    Bad("a compression of a PNG", asked(output_compression=50),
        400, "output_compression", "output_compression is for jpeg and webp: set output_format, or leave it out"),
    Bad("a transparent background", asked(background="transparent"),
        400, "background", "background must be opaque or auto, not 'transparent': images have no transparency here"),
    Bad("an unknown quality", asked(quality="best"),
        400, "quality", "quality must be auto, low, medium, high, xhigh, max, standard or hd, not 'best'"),
    Bad("stream as text", asked(stream="yes"), 400, "stream", "stream must be true or false, not 'yes'"),
    Bad("previews without a stream", asked(partial_images=2),
        400, "partial_images", "partial_images are sent in a stream: set stream to true"),
    Bad("too many previews", asked(stream=True, partial_images=9),
        400, "partial_images", "partial_images must be at most 8 here, not 9"),
    Bad("an unknown generator", asked(generator="air"),
        400, "generator", "model tiny has no generator 'air'; it has diffusion and tokens"),
    Bad("an option of another generator", asked(top_k=4),
        400, "top_k", "the diffusion generator takes no top_k: leave it out, or choose of steps, …"),
    Bad("no step", asked(steps=0), 400, "steps", "steps must be at least 1, not 0"),
    Bad("more steps than the service allows", asked(steps=21), 400, "steps", "steps must be at most 20 here, not 21"),
    Bad("more steps than the model learned", asked(model="short", label=None, steps=11),
        400, "steps", "base: steps must be in [1, 10], not 11"),
    Bad("more steps by a setting", asked(sampling={"base": {"num_inference_steps": 21}}),
        400, "sampling", "sampling.base.num_inference_steps must be a whole number of at most 20 here, not 21"),
    Bad("the same as text", asked(sampling={"base": {"num_inference_steps": "2_1"}}),
        400, "sampling", "sampling.base.num_inference_steps must be a whole number of at most 20 here, not '2_1'"),
    Bad("half of a character as a stage", raw(b'{"model": "tiny", "sampling": {"\\ud800": {"candidates": 9}}}'),
        400, "sampling", "sampling.\\ud800.candidates must be a whole number of at most 3 here, not 9"),
    Bad("a setting out of range", asked(sampling={"upsampler_16": {"eta": 2.0}}),
        400, "sampling", "upsampler_16.eta: Input should be less than or equal to 1 (got 2.0)"),
    Bad("an unknown setting", asked(sampling={"base": {"top_k": 3}}),
        400, "sampling", "base.top_k: this model takes no such setting; it takes sampler, num_inference_steps, …"),
    Bad("a setting of an unknown stage", asked(sampling={"upsampler_32": {"eta": 0.5}}),
        400, "sampling", "no stage 'upsampler_32' of the diffusion generator: base, upsampler_16"),
    Bad("a setting that is an object", asked(sampling={"base": {"eta": {}}}),
        400, "sampling", "sampling.base.eta must be a number, text, true, false, null or a list, not {}"),
    Bad("settings that are a list", asked(sampling=[1]), 400, "sampling", "sampling must be an object, not [1]"),
    Bad("an unknown sampler", asked(sampler="plms"),
        400, "sampler", "base.sampler: Input should be 'ddpm', 'ddim', 'dpm_solver_pp', …"),
    Bad("guidance below zero", asked(guidance_scale=-1),
        400, "guidance_scale", "guidance_scale must be at least 0, not -1"),
    Bad("guidance that is no number", raw(b'{"model": "tiny", "label": 0, "guidance_scale": NaN}'),
        400, "guidance_scale", "guidance_scale must be a finite number, not nan"),
    Bad("top_p that no model can meet", asked(generator="tokens", top_p=1e-300),
        400, "top_p", "top_p must be of a size from 1e-06 to 1e+09, not 1e-300"),
    Bad("the same as a setting", asked(generator="tokens", sampling={"prior": {"top_p": 1e-300}}),
        400, "sampling", "sampling.prior.top_p must be of a size from 1e-06 to 1e+09, not 1e-300"),
    Bad("a compilation", asked(generator="tokens", sampling={"prior": {"compile_decoding": True}}),
        400, "sampling", "sampling.prior.compile_decoding costs minutes, and is not a client's to set: leave it out"),
    Bad("top_p above one", asked(generator="tokens", top_p=1.5), 400, "top_p", "top_p must be at most 1, not 1.5"),
    Bad("too many candidates", asked(generator="tokens", best_of=4),
        400, "best_of", "best_of must be at most 3 here, not 4"),
    Bad("a condition for a model that takes none", asked(condition=base64.b64encode(png(8, 8)).decode()),
        400, "condition", "the model of stage base takes no condition image"),
    Bad("a condition that is no base64", asked(model="depth", condition="components/models/@"),
        400, "condition", "condition must be an image in base64, and is not base64"),
    Bad("a condition in other letters", asked(model="depth", condition="é"),
        400, "condition", "condition must be an image in base64, and is not base64"),
    Bad("a condition that is no square", asked(model="depth", condition=base64.b64encode(png(8, 4)).decode()),
        400, "condition", "the condition has 8x4 pixels: give a square image"),
    Bad("a model of images to work on, asked for new ones", asked(model="palette", label=None),
        400, "image", "an image to work on is missing: ask /v1/images/edits"),
    Bad("JSON where a form is wanted", asked(),
        415, None, "send the image in a form: Content-Type must be multipart/form-data", EDITS),
    Bad("a form without image", form(image=None),
        400, "image", "image is missing: send it as a file of the form", EDITS),
    Bad("an image that is text", {"data": {"model": "base", "image": "a"}, "files": {"mask": png(8, 8)}},
        400, "image", "image is missing: send it as a file of the form", EDITS),
    Bad("an empty image", form(image=b""), 400, "image", "image is empty: give a PNG, JPEG or WebP file", EDITS),
    Bad("an image that is none", form(image=b"GIF89a, not really"),
        400, "image", "image is neither PNG nor JPEG nor WebP: give such a file", EDITS),
    Bad("an image that is cut off", form(image=png(64, 64)[:-30]),
        400, "image", "image is cut off or damaged: give a whole image file", EDITS),
    Bad("a drawing that is a program", form(image=b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        400, "image", "image is neither PNG nor JPEG nor WebP: give such a file", EDITS),
    Bad("an image of too many pixels", form(image=png(300, 300), mask=png(300, 300)),
        413, "image", "image has 300x300 pixels, more than 65536: give a smaller one", EDITS),
    Bad("a few bytes that claim 3,600,000,000 pixels", form(image=claimed(60_000, 60_000)),
        413, "image", "image is too large to decode: give a smaller one", EDITS),
    Bad("a mask of another size", form(mask=png(4, 8, "white")),
        400, "mask", "the mask has 4x8 pixels, the image 8x8: they must be the same", EDITS),
    Bad("a mask with nothing to make", form(mask=png(8, 8, "black")),
        400, "mask", "the mask has no white pixel: there is nothing to make", EDITS),
    Bad("no mask", form(mask=None),
        400, "mask", "inpainting needs a mask of the image's size, white where pixels are to be made", EDITS),
    Bad("an image smaller than the model's", form(image=png(4, 4), mask=png(4, 4, "white")),
        400, "image", "the image has 4x4 pixels, for inpainting this model takes 8x8", EDITS),
    Bad("an image that is no square", form(image=png(16, 8), mask=png(16, 8, "white")),
        400, "image", "the image has 16x8 pixels, for inpainting this model takes 8x8", EDITS),
    Bad("two images", {"data": {"model": "base"}, "files": [("image[]", png(8, 8)), ("image[]", png(8, 8))]},
        400, "image", "image is given twice: one image is worked on at a time", EDITS),
    Bad("an unknown file", {"data": {"model": "base"}, "files": {"image": png(8, 8), "markup": png(8, 8)}},
        400, "markup", "unknown file 'markup': give image, and mask or condition", EDITS),
    Bad("a field given twice", form(prompt=["a", "b"]),
        400, "prompt", "field 'prompt' is given twice: give it once", EDITS),
    Bad("a condition as a file and as text", {"data": {"model": "base", "condition": "iVBORw0KGgo="},
        "files": {"image": png(8, 8), "condition": png(8, 8)}},
        400, "condition", "condition is given as a file and as text: give it once", EDITS),
    Bad("a setting given twice, once as nothing", form(**{"sampling[base][eta]": ["", "0.5"]}),
        400, "sampling[base][eta]", "field 'sampling[base][eta]' is given twice: give it once", EDITS),
    Bad("an unknown field of the form", form(strength="0.5"),
        400, "strength", "unknown field 'strength': leave it out", EDITS),
    Bad("a number of the form in words", form(n="two"), 400, "n", "n must be a whole number, not 'two'", EDITS),
    Bad("settings of the form that are no JSON", form(sampling="{base"),
        400, "sampling", "sampling must be JSON, not '{base'", EDITS),
    Bad("settings of the form as JSON and as fields", form(**{"sampling": "{}", "sampling[base][eta]": "0.5"}),
        400, "sampling", "sampling is given as JSON and as fields: give it once", EDITS),
    Bad("a task that the generator has not", form(task="rotation"),
        400, "task", "the diffusion generator has no task 'rotation': choose inpainting, uncropping", EDITS),
    Bad("no task where there are several", form(model="palette", mask=None),
        400, "task", "name a task: this model was trained for inpainting, uncropping, …", EDITS),
    Bad("a mask where none is taken", form(model="palette", image=png(16, 16), mask=png(16, 16, "white"), task="jpeg"),
        400, "mask", "jpeg takes no mask: it changes every pixel", EDITS),
    Bad("an edit by a model that works on no images", form(model="tokens"),
        400, "model", "model tokens works on no images: ask /v1/images/generations", EDITS),
    Bad("a form that is cut off", raw(PART, BOUNDARY),
        400, None, "the upload is cut off before its end: send it again", EDITS),
    Bad("a form without a boundary", raw(PART, {"Content-Type": "multipart/form-data"}),
        400, None, "the form can't be read (Missing boundary in multipart): send multipart/form-data", EDITS),
    Bad("a form whose parts are broken", raw(b"--x\r\nnonsense\r\n\r\n--x--\r\n", BOUNDARY),
        400, None, "the form can't be read (Invalid multipart data): send multipart/form-data", EDITS),
    Bad("a hundred and one fields", form(**{f"a{number}": "1" for number in range(101)}),
        400, None, "the form can't be read (Too many fields. …", EDITS),
    Bad("an upload larger than the limit", form(image=NOISE),
        413, None, "the body must have at most 131072 bytes: send smaller images", EDITS),
    Bad("an unknown address", {},
        404, None, "nothing is at this address: /openapi.json names those that there are", "/v1/images/variations"),
    Bad("an unknown model's card", {},
        404, "model", "no model 'gpt' is served here: choose tiny or tokens or …", "/v1/models/gpt", "GET"),
    Bad("another method", {}, 405, None, "GET is not for this address: use POST", GENERATIONS, "GET"),
    Bad("another host's name", {"headers": {"Host": "evil.example"}},
        403, None, "without a key this service answers to localhost and 127.0.0.1 alone", "/v1/models", "GET"),
    Bad("another site's page", asked() | {"headers": {"Origin": "https://evil.example"}},
        403, None, "without a key this service answers no page but its own"),
    Bad("a page of another port", asked() | {"headers": {"Sec-Fetch-Site": "same-site"}},
        403, None, "without a key this service answers no page but its own"),
    Bad("no key", {},
        401, None, "this service needs a key: send the header Authorization: Bearer KEY", "/v1/models", "GET", "keyed"),
    Bad("a wrong key", {"headers": {"Authorization": f"Bearer {KEY}r"}},
        401, None, "this key is not known here: ask whoever runs the service for one", "/v1/models", "GET", "keyed"),
)
# fmt: on


def table() -> str:
    """The cases in Markdown."""
    rows = [f"| {bad.name} | {bad.status} | {bad.param or ''} | {bad.message.replace('|', '/')} |" for bad in CASES]
    return "\n".join(["| what is sent | status | `param` | `message` |", "|---|---|---|---|", *rows])
